"""The tasks of `peft-core train`: which model is trained, on which examples, and what is measured of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, set_seed

from . import models, records, training
from .batches import Batch, CausalBatch, LabelledBatch, PackedBatch, length_of
from .data import IGNORED, Tokens, collate
from .errors import ModelError, first_line
from .records import Prepared
from .runs import RunConfig, RunError
from .spec import DTYPES, AdapterSpec


class Reading(NamedTuple):
    """How a causal language model takes a batch.

    Attributes:
        left: padding on the left beside positions from 0 changes nothing for it; else `collate` pads on the right.
        shifts: its own loss is that of the next token, as labels are given to transformers' models.
    """

    left: bool = True
    shifts: bool = True


@dataclass
class Job:
    """A model and its examples, whatever the task.

    Attributes:
        spec: of the adapter; None: all of the model is trained.
        examples: what the trainer draws from; `lengths` of each in tokens. batch: makes a batch of some of them.
        evaluate: the model's figures on the held-out examples; None without any. loss: instead of the model's own.
    """

    model: Any
    tokenizer: Any
    spec: AdapterSpec | None
    prepared: Prepared
    held_out: Prepared
    examples: Sequence[Any]
    lengths: list[int]
    batch: Callable[[Sequence[Any]], Batch]
    evaluate: Callable[[], dict[str, float]] | None
    labels: list[str]
    unit: str
    loss: Callable[..., Tensor] | None = None
    packed: bool = False


def causal(config: RunConfig, kind: str, rows: list[records.Row], held: list[records.Row]) -> Job:
    """A causal language model on texts, pairs or conversations.

    Raises:
        ModelError: it cannot be loaded. DataError: the rows do not fit. RunError: a setting does not fit model or data.
    """
    model, tokenizer = models.load_base(config.model.path, _dtype(config), "cpu")
    length = _max_length(config, model, tokenizer)

    def prepare(some: list[records.Row]) -> Prepared:
        if config.pretrain:
            return records.prepare_stream(some, tokenizer, length)
        return records.prepare_causal(some, kind, tokenizer, length)

    prepared, held_out = prepare(rows), prepare(held) if held else Prepared(())
    pad = int(tokenizer.pad_token_id)
    examples: Sequence[Any] = prepared.tokens
    reading = reading_of(model, prepared.tokens, pad)
    batch: Callable[[Sequence[Any]], Batch] = CausalBatch(model, pad, reading.left)
    if config.data.packing:
        model.config.use_cache = False  # as in training; beside a cache, transformers looks for no packed rows
        check_packing(model, prepared.tokens)
        examples, batch = records.pack(prepared.tokens, length), PackedBatch(pad)
    evaluate = None
    if held_out.tokens:
        size = 2 * config.training.batch_size

        def evaluate() -> dict[str, float]:
            return {"loss": training.evaluate(model, held_out.tokens, pad, size, left=reading.left)}

    return Job(
        model,
        tokenizer,
        _spec(config, ()),
        prepared,
        held_out,
        examples,
        [length_of(example) for example in examples],
        batch,
        evaluate,
        labels=[],
        unit="nats per token",
        loss=None if reading.shifts else _next_token_loss,
        packed=config.data.packing,
    )


def classifier(config: RunConfig, rows: list[records.Row], held: list[records.Row]) -> Job:
    """A sequence classifier on labelled texts; a head that the checkpoint does not have is trained in full.

    Raises:
        ModelError: it cannot be loaded. DataError: the rows do not fit. RunError: a setting does not fit model or data.
    """
    if config.data.packing:
        raise RunError("data.packing is for causal language models; a classifier reads one text at a time")
    classes = records.classes_of(rows)
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
            ignore_mismatched_sizes=True,  # another head than the one of a finished classifier
        )
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load {config.model.path} as a sequence classifier: {first_line(error)}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.get_text_config().pad_token_id is None:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    length = _max_length(config, model, tokenizer)
    prepared = records.prepare_labelled(rows, classes, tokenizer, length)
    held_out = records.prepare_labelled(held, classes, tokenizer, length) if held else Prepared(())
    fresh = [*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])]
    batch = LabelledBatch(tokenizer)
    evaluate = None
    if held_out.tokens:
        size = 2 * config.training.batch_size
        shown = sorted(zip(held_out.tokens, held_out.classes, strict=True), key=lambda pair: len(pair[0].input_ids))
        batches = [shown[at : at + size] for at in range(0, len(shown), size)]

        def evaluate() -> dict[str, float]:
            return _accuracy(model, [batch(some) for some in batches])

    return Job(
        model,
        tokenizer,
        _spec(config, sorted({key.rpartition(".")[0] for key in fresh})),
        prepared,
        held_out,
        list(zip(prepared.tokens, prepared.classes, strict=True)),
        [len(tokens.input_ids) for tokens in prepared.tokens],
        batch,
        evaluate,
        labels=classes,
        unit="nats per example",
        loss=_class_loss,
    )


def _spec(config: RunConfig, fresh: Sequence[str]) -> AdapterSpec | None:
    """The adapter's spec, if there is one. Modules that the checkpoint has no weights for are trained in full, or they
    would stay random.
    """
    spec = config.adapter
    if spec is None:
        return None
    more = [name for name in fresh if not any(f".{there}." in f".{name}." for there in spec.train_modules)]
    fields = {**spec.model_dump(), "train_modules": (*spec.train_modules, *more)}
    return AdapterSpec(**{**fields, "base_model": spec.base_model or config.model.path})


def _dtype(config: RunConfig) -> torch.dtype:
    if config.model.dtype != "auto":
        return DTYPES[config.model.dtype]
    try:
        found = AutoConfig.from_pretrained(models.base_path(config.model.path))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load {config.model.path}: {first_line(error)}") from error
    device = "cuda" if config.model.device == "auto" and torch.cuda.is_available() else "cpu"
    stored = getattr(found, "dtype", None) or getattr(found.get_text_config(), "dtype", None)
    return models.fast_dtype(device) if stored in (torch.bfloat16, torch.float16) else torch.float32


def _max_length(config: RunConfig, model: Any, tokenizer: Any) -> int:
    """Tokens of the longest example: as asked for, if both model and tokenizer can take it."""
    limits = [models.most_tokens(model), tokenizer.model_max_length]
    limit = int(min((one for one in limits if one is not None and one > 0), default=10**9))
    if (config.data.max_length or 0) > limit:
        raise RunError(
            f"data.max_length: {config.data.max_length} is more than the {limit} tokens that the model can take"
        )
    return config.data.max_length or min(512, limit)


@torch.no_grad()
def reading_of(model: Any, examples: Sequence[Tokens], pad: int) -> Reading:
    """How the model must be given a batch to read each example as it reads one alone.

    Raises:
        RunError: a token sees those that follow, which it should predict.
    """
    if getattr(model, "is_quantized", False):
        return Reading()  # its kernels may need the GPU, where it is not yet
    ids = max(examples, key=length_of).input_ids[:32]
    first = len(ids) // 2
    rows = torch.tensor([ids, ids[:first] + ids[: len(ids) - first]])  # they begin alike
    own = model(input_ids=rows, labels=rows)
    alone, otherwise = own.logits[:, :first].float()
    if (off := _off(otherwise, alone)) > _tolerance(model):
        raise RunError(
            f"{type(model).__name__} lets a token see those that follow (logits are off by {off:.1%}), so that "
            "there is nothing to predict; take a causal model, or set is_decoder to true in the config.json of one like BERT"
        )
    known = inspect.signature(model.forward).parameters
    pair = [Tokens(some, some) for some in (ids[:first], ids)]

    def in_batch(left: bool) -> float:
        batch = collate(pair, pad, left)
        del batch["labels"]
        logits = model(**{name: value for name, value in batch.items() if name in known}).logits.float()
        start = logits.shape[1] - first if left else 0
        return max(_off(logits[0, start : start + first], alone), _off(logits[1, :first], alone))

    off = in_batch(left=True)
    following = _next_token_loss(own, rows)
    same = cross_entropy(own.logits.flatten(0, 1).float(), rows.flatten())
    return Reading(
        left=off <= _tolerance(model) or off <= 2 * in_batch(left=False),  # both: by rounding
        shifts=bool((own.loss - following).abs() <= (own.loss - same).abs()),
    )


@torch.no_grad()
def check_packing(model: Any, examples: Sequence[Tokens]) -> None:
    """Refuse an architecture that lets an example see the one before it in its row."""
    remedy = "set data.packing to false"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise RunError(
            f"{type(model).__name__} takes no position_ids, by which packed examples are kept apart; {remedy}"
        )
    first, second = (Tokens(tokens.input_ids[:32], tokens.labels[:32]) for tokens in (examples[0], examples[-1]))

    def logits(row: list[Tokens]) -> Tensor:
        batch = PackedBatch(0)([row])
        found: Tensor = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
        return found[0].float()

    off = _off(logits([first, second])[len(first.input_ids) :], logits([second]))
    if off > _tolerance(model):
        raise RunError(
            f"{type(model).__name__} lets packed examples see each other (logits are off by {off:.1%}); {remedy}"
        )


def _off(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def _tolerance(model: Any) -> float:
    """What rounding may change of logits, as a part of them."""
    return 1e-4 if model.dtype == torch.float32 else 3e-2


def _next_token_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Mean over all labels of a step, however they are divided into forward passes."""
    wanted = labels[:, 1:]
    total = cross_entropy(
        outputs.logits[:, :-1].flatten(0, 1).float(), wanted.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total / ((wanted != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)


def _class_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Mean over all examples of a step, however they are divided into forward passes."""
    total = cross_entropy(outputs.logits.float(), labels, reduction="sum")
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


@torch.no_grad()
def _accuracy(model: Any, batches: Sequence[Batch]) -> dict[str, float]:
    was_training = model.training
    model.eval()
    loss, right, count = 0.0, 0, 0
    for batch in batches:
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        labels = batch.pop("labels")
        logits = model(**batch).logits.float()
        loss += cross_entropy(logits, labels, reduction="sum").item()
        right += int((logits.argmax(-1) == labels).sum())
        count += len(labels)
    model.train(was_training)
    return {"loss": loss / count, "accuracy": right / count}
