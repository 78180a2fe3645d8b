"""The tasks of `peft-core train`: which model is trained, on which examples, and what is measured of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, set_seed

from .. import models
from ..errors import ModelError, first_line
from ..loading import MISCONFIGURED, UNREADABLE, check_alone, drawn, why
from ..spec import DTYPE_OF_NAME, AdapterSpec
from . import losses
from .batches import Batch, CausalCollator, ClassificationCollator, PackedCollator
from .checks import batch_convention, check_packing, padding_side
from .config import RunConfig, RunError
from .examples import Prepared, Tokens, pack, prepare_causal, prepare_labelled, prepare_stream
from .rows import Row, classes_of


@dataclass
class Task:
    """A model and its examples.

    Attributes:
        spec: of the adapter; None: all of the model is trained.
        collator: makes a batch of examples, or of packed rows.
        evaluate: the model's figures on the held-out examples; None if there are none.
        unit: of the loss.
        loss: instead of the model's own.
        classes: of a classifier.
        packed: the training examples in rows; None: each is a row of its own.
    """

    model: Any
    tokenizer: Any
    spec: AdapterSpec | None
    training: Prepared
    held_out: Prepared
    collator: Callable[[Sequence[Any]], Batch]
    evaluate: Callable[[], dict[str, float]] | None
    unit: str
    loss: Callable[..., Tensor] | None
    classes: Sequence[str] = ()
    packed: list[list[Tokens]] | None = None


def causal_task(config: RunConfig, kind: str, rows: list[Row], held_out_rows: list[Row]) -> Task:
    """A causal language model on texts, pairs or conversations.

    Args:
        kind: the format of the rows.

    Raises:
        ModelError: the model cannot be loaded.
        DataError: the rows do not have the format.
        RunError: a setting does not fit the model or the data.
    """
    model, tokenizer = models.load_base(config.model.path, _dtype(config), "cpu")
    length = _max_length(config, model, tokenizer)

    def prepare(some: list[Row]) -> Prepared:
        if config.pretrain:
            return prepare_stream(some, tokenizer, length)
        return prepare_causal(some, kind, tokenizer, length)

    training, held_out = prepare(rows), prepare(held_out_rows) if held_out_rows else Prepared()
    pad = _pad_id(config, tokenizer)
    convention = batch_convention(model, training.tokens, pad)
    collator: Callable[[Sequence[Any]], Batch] = CausalCollator(model, pad, convention.pads_left)
    packed = None
    if config.data.packing:
        check_packing(model, training.tokens)
        packed, collator = pack(training.tokens, length), PackedCollator(pad)

    def evaluate() -> dict[str, float]:
        size = 2 * config.training.batch_size
        return {"loss": losses.evaluate(model, held_out.tokens, pad, size, left=convention.pads_left)}

    return Task(
        model,
        tokenizer,
        _spec(config),
        training,
        held_out,
        collator,
        evaluate if held_out.tokens else None,
        unit="nats per token",
        loss=None if convention.own_loss else losses.next_token_loss,
        packed=packed,
    )


def classification_task(config: RunConfig, rows: list[Row], held_out_rows: list[Row]) -> Task:
    """A sequence classifier on labelled texts; a head that the checkpoint does not have is trained in full.

    Raises:
        ModelError: the model cannot be loaded.
        DataError: the rows are not texts with labels.
        RunError: a setting does not fit the model or the data.
    """
    if config.data.packing:
        raise RunError("data.packing is for causal language models, and these rows are for a classifier; leave it out")
    classes = classes_of(rows)
    path = models.base_path(config.model.path)
    set_seed(config.training.seed)
    try:
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            path,
            dtype=_dtype(config),
            num_labels=len(classes),
            id2label=dict(enumerate(classes)),
            label2id={name: number for number, name in enumerate(classes)},
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # another head than that of a finished classifier
        )
        tokenizer = models.load_tokenizer(path)
    except UNREADABLE as error:
        raise ModelError(f"cannot load {config.model.path} as a sequence classifier: {why(error, path)}") from error
    check_alone(config.model.path, model)
    lost = drawn(loading)
    models.check_whole(config.model.path, model, [key for key in lost if not _in_head(key, model)])
    # By it, a decoder finds a text's last token: any other id would make it read the padding of the batch.
    model.config.get_text_config().pad_token_id = _pad_id(config, tokenizer)
    length = _max_length(config, model, tokenizer)
    end = model.config.eos_token_id if model.config.is_encoder_decoder else None
    training = prepare_labelled(rows, classes, tokenizer, length, end)
    held_out = prepare_labelled(held_out_rows, classes, tokenizer, length, end)
    collator = ClassificationCollator(tokenizer, padding_side(model, training.tokens, tokenizer))
    evaluate = partial(losses.evaluate_classifier, model, held_out.tokens, collator, 2 * config.training.batch_size)
    return Task(
        model,
        tokenizer,
        _spec(config, sorted({key.rpartition(".")[0] for key in lost})),
        training,
        held_out,
        collator,
        evaluate if held_out.tokens else None,
        unit="nats per example",
        loss=losses.class_loss,
        classes=classes,
    )


def _in_head(key: str, model: Any) -> bool:
    """Whether a classifier's weight is what a checkpoint without its head lacks: outside the trunk, or a pooler in it."""
    trunk = f"{model.base_model_prefix}."
    return model.base_model is model or not key.startswith(trunk) or "pooler" in key.split(".")


def _pad_id(config: RunConfig, tokenizer: Any) -> int:
    if tokenizer.pad_token_id is None:
        raise ModelError(
            f"the tokenizer of {config.model.path} has neither a padding token nor an end of sequence to pad with; set its "
            "pad_token and save it there"
        )
    return int(tokenizer.pad_token_id)


def _spec(config: RunConfig, fresh: Sequence[str] = ()) -> AdapterSpec | None:
    """The adapter's spec, if there is one.

    Args:
        fresh: modules that the checkpoint has no weights for: trained in full, or they would stay random.
    """
    spec = config.adapter
    if spec is None:
        return None
    more = [name for name in fresh if not any(f".{there}." in f".{name}." for there in spec.train_modules)]
    fields = {**spec.model_dump(), "train_modules": (*spec.train_modules, *more)}
    return AdapterSpec(**{**fields, "base_model": spec.base_model or config.model.path})


def _dtype(config: RunConfig) -> torch.dtype:
    if config.model.dtype != "auto":
        return DTYPE_OF_NAME[config.model.dtype]
    try:
        found = AutoConfig.from_pretrained(models.base_path(config.model.path))
    except MISCONFIGURED as error:
        raise ModelError(f"cannot load {config.model.path}: {first_line(error)}") from error
    stored = getattr(found, "dtype", None) or getattr(found.get_text_config(), "dtype", None)
    return models.fast_dtype(config.model.used_device) if stored in (torch.bfloat16, torch.float16) else torch.float32


def _max_length(config: RunConfig, model: Any, tokenizer: Any) -> int:
    """Tokens of the longest example: as configured, if both model and tokenizer can take it."""
    limits = [models.most_tokens(model), tokenizer.model_max_length]
    limit = int(min((one for one in limits if one is not None and one > 0), default=10**9))
    if (config.data.max_length or 0) > limit:
        raise RunError(
            f"data.max_length: {config.data.max_length} is more than the {limit} tokens that the model can take"
        )
    return config.data.max_length or min(512, limit)
