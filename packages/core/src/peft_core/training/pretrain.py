"""A base model to pre-train: random weights of a configuration, and a tokenizer, as a checkpoint directory.

From there on a run is like any other, and its result is loaded and merged like any other.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from .. import models
from ..errors import ModelError, first_line, suggestion
from ..files import whole_directory
from ..loading import MISCONFIGURED
from .config import RunConfig, RunError

BASE = "base"
_END = "<|endoftext|>"
# Of the files of models and tokenizers.
_SUFFIXES = {".json", ".safetensors", ".bin", ".jinja", ".model"}
_NAMES = {"vocab.txt", "merges.txt"}
# What transformers raises for a configuration that does not fit together.
_WRONG = (*MISCONFIGURED, TypeError, ArithmeticError, AssertionError, RuntimeError)


def make_base(run: RunConfig, texts: Iterable[str]) -> Path:
    """Draw the weights of the run's model and make its tokenizer, in `output_dir`/base: the same ones for the same run.

    Args:
        run: its section `pretrain` says what to make.
        texts: what a new tokenizer is trained on.

    Raises:
        ModelError: the configuration or the tokenizer cannot be read, or they do not fit each other.
        RunError: one of them would be replaced by what is made.
    """
    asked = run.pretrain
    assert asked is not None
    _check_inputs(run)
    config = _configuration(run.model.path, asked.config)
    tokenizer = (
        _existing_tokenizer(asked.tokenizer or run.model.path)
        if asked.vocab_size is None
        else train_tokenizer(texts, asked.vocab_size)
    )
    text_config = config.get_text_config()
    if "vocab_size" not in asked.config:
        text_config.vocab_size = len(tokenizer)
    if text_config.vocab_size < len(tokenizer):
        raise ModelError(
            f"pretrain.config: vocab_size {text_config.vocab_size} is less than the tokenizer's {len(tokenizer)}; leave it out"
        )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(text_config, name, getattr(tokenizer, name))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.training.seed)
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except _WRONG as error:
            line = first_line(error)
            raise ModelError(f"cannot make a causal language model of {run.model.path}: {line}") from error
    target = run.output_dir / BASE
    with whole_directory(target, _loadable(target)) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return target


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer of `vocab_size` tokens, or fewer where the texts are too few; the same for the same texts."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE

    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[_END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=_END, pad_token=_END)


def _check_inputs(run: RunConfig) -> None:
    assert run.pretrain is not None
    target = (run.output_dir / BASE).resolve()
    for key, source in {"model.path": run.model.path, "pretrain.tokenizer": run.pretrain.tokenizer}.items():
        if source is not None and Path(source).resolve().is_relative_to(target):
            raise RunError(f"{key}: '{source}' would be replaced by the run's own base; choose another output_dir")


def _loadable(directory: Path) -> list[str]:
    """What an earlier run left that transformers would load with what this one writes."""
    found = directory.iterdir() if directory.is_dir() else ()
    return [entry.name for entry in found if entry.suffix in _SUFFIXES or entry.name in _NAMES]


def _configuration(source: str, changed: dict[str, Any]) -> Any:
    """The configuration at a path, or the defaults of a model type, with some fields changed."""
    try:
        if source in CONFIG_MAPPING:
            known = CONFIG_MAPPING[source]().to_dict()
        else:
            known = AutoConfig.from_pretrained(_configured(source)).to_dict()
        model_type = known.pop("model_type")
        if unknown := sorted(changed.keys() - known.keys()):
            raise ModelError(
                f"pretrain.config: a {model_type} has no field '{unknown[0]}'{suggestion(unknown[0], known)}"
            )
        return AutoConfig.for_model(model_type, **{**known, **changed})
    except _WRONG as error:
        raise ModelError(f"cannot make a configuration of {source}: {first_line(error)}") from error


def _configured(source: str) -> str:
    if Path(source).is_file():
        return source
    try:
        return models.base_path(source)
    except ModelError as error:
        near = suggestion(source, CONFIG_MAPPING)
        raise ModelError(f"{error}; to pre-train, a config.json or a model type will do{near}") from None


def _existing_tokenizer(source: str) -> Any:
    remedy = "name a directory in pretrain.tokenizer, or train one with pretrain.vocab_size"
    if source in CONFIG_MAPPING or Path(source).is_file():
        raise ModelError(f"{source} comes without a tokenizer: {remedy}")
    try:
        return models.load_tokenizer(source if Path(source).is_dir() else models.base_path(source))
    except _WRONG as error:
        raise ModelError(f"cannot load a tokenizer from {source} ({first_line(error)}): {remedy}") from error
