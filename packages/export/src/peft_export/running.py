"""Running models to compare them: the adapted model, an export, and their logits on the same inputs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peft_core as pc
from peft_core import CheckpointError, DataError, MergeError, ModelError
from peft_core.adapter_file import AdapterFile
from peft_core.errors import first_line
from peft_core.loading import MISCONFIGURED, UNREADABLE, check_alone, quiet_transformers, why
from peft_core.models import most_tokens
from peft_core.prompts import whole_text
from peft_core.sharing import stand_ins

from . import output
from .checkpoint_files import Reader, read_entries
from .merge_plan import head_config
from .peft_format import CONFIG, PREFIX, WEIGHTS

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Q: What is 12 times 12? A:",
    "Once upon a time there was a small village by the sea, where",
)
"""Compared where no prompts are given."""

_LONGEST = 64


@dataclass(frozen=True)
class Prompt:
    """An input: its text (a remark, where there is no tokenizer) and its token ids [tokens]."""

    text: str
    ids: Tensor


def make_prompts(texts: Sequence[str], directories: Sequence[Path], model: Any) -> list[Prompt]:
    """Tokenize with the first tokenizer that the directories hold; without any, built-in prompts are random tokens.

    Args:
        model: reads them: they are cut to what it can take.

    Raises:
        ModelError: prompts are given, and there is no tokenizer. DataError: one is empty, or cannot be tokenized.
    """
    longest = min(_LONGEST, most_tokens(model) or _LONGEST)
    tokenizer = next((found for found in map(_tokenizer, directories) if found is not None), None)
    if tokenizer is not None:
        whole = (whole_text(text, "a prompt") for text in texts or PROMPTS)
        made = [Prompt(text, torch.tensor(tokenizer(text)["input_ids"][:longest])) for text in whole]
        for prompt in made:
            if not len(prompt.ids) and texts:
                raise DataError(f"the prompt {prompt.text!r} has no tokens to compare; give one with text")
        return [prompt for prompt in made if len(prompt.ids)]
    if texts:
        raise ModelError(
            f"there is no tokenizer in {' or '.join(map(repr, map(str, directories)))}: prompts cannot be read"
        )
    generator = torch.Generator().manual_seed(0)
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", 2)
    drawn = (torch.randint(0, vocabulary, (min(length, longest),), generator=generator) for length in (5, 9, 16))
    return [Prompt(f"{len(ids)} random tokens", ids) for ids in drawn]


def logits(model: nn.Module, prompts: Sequence[Prompt]) -> list[Tensor]:
    """Each prompt's logits in float32 on the CPU: [tokens, vocabulary], or [1, classes].

    Raises:
        ModelError: the model does not answer to token ids, or answers without logits.
    """
    config: Any = getattr(model, "config", None)
    check_text(model, "only models of text are compared")
    out = []
    for prompt in prompts:
        ids = prompt.ids[None]
        inputs = {"input_ids": ids}
        if getattr(config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = shifted(ids, decoder_start(config))
        answer = run(model, inputs, "token ids alone", "only models of text are compared")
        if getattr(answer, "logits", None) is None:
            raise ModelError(f"{type(model).__name__} has no logits to compare: it has no head")
        found = answer.logits.float()
        out.append(found.reshape(-1, found.shape[-1]).cpu())
    return out


def check_text(model: nn.Module, remedy: str) -> None:
    """Raises ModelError for a model whose main input is not token ids."""
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise ModelError(f"{type(model).__name__} takes {model.main_input_name}; {remedy}")


@torch.no_grad()
def run(model: nn.Module, inputs: Mapping[str, Any], kind: str, remedy: str) -> Any:
    """The model's answer to inputs of a kind that not every model is content with.

    Raises:
        ModelError: this one is not.
    """
    try:
        return model(**inputs)
    except pc.PeftCoreError:  # ours says what is wrong itself
        raise
    except Exception as error:  # a model that misses an input fails in whatever way
        what = f"{type(error).__name__}: {first_line(error)}"
        raise ModelError(f"{type(model).__name__} cannot be run on {kind} ({what}); {remedy}") from error


@torch.no_grad()
def greedy(model: nn.Module, ids: Tensor, count: int) -> Tensor:
    """The likeliest continuation [count] of a prompt [tokens], whatever the model's settings for generation say."""
    config: Any = model.config
    inputs: dict[str, Any] = {"input_ids": ids[None]}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids.new_full((1, 1), decoder_start(config))
    next_ids = "decoder_input_ids" if len(inputs) == 2 else "input_ids"
    written = []
    for _ in range(count):
        answer = model(**inputs, use_cache=True)
        written.append(answer.logits[0, -1:].argmax(-1))
        inputs |= {next_ids: written[-1][None], "past_key_values": answer.past_key_values}
    return torch.cat([ids[:0], *written])


def decoder_start(config: Any) -> int:
    """The token that a decoder of its own begins with."""
    return getattr(config, "decoder_start_token_id", None) or 0


def shifted(ids: Tensor, start: int) -> Tensor:
    """What a decoder of its own reads for texts [..., tokens]: the start token, and the texts but for their last token."""
    return torch.cat([torch.full_like(ids[..., :1], start), ids[..., :-1]], dim=-1)


def adapted_model(base: Path, adapters: Mapping[str, float], header: AdapterFile, dtype: str) -> nn.Module:
    """The base with the adapters attached and active, in evaluation mode.

    Raises:
        CheckpointError: an adapter does not fit. ModelError: the base cannot be loaded.
    """
    config = output.read_config(base)
    fields = head_config(base, header, config)
    model = load_model(base, header.base.architecture, dtype, fields, stand_ins(header.trained))
    active = {f"adapter{number}": weight for number, weight in enumerate(adapters.values())}
    _resize(model, header)
    for name, directory in zip(active, adapters, strict=True):
        pc.load(model, directory, name=name)
    pc.activate(model, active)
    return model


def _resize(model: Any, header: AdapterFile) -> None:
    """Give the vocabulary the size that it had in training; its new rows are the adapter's."""
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # a model of several parts has no one vocabulary
        return
    name = next((name for name, module in model.named_modules() if module is embedding), "")
    shape = header.base.shapes.get(f"{name}.weight")
    if shape and shape[0] != len(embedding.weight):
        model.resize_token_embeddings(shape[0], mean_resizing=False)


def load_merged(directory: Path, architecture: str, dtype: str) -> nn.Module:
    """A transformers model of this class from files that must hold all of it: what they lack would be drawn at random.

    Raises:
        CheckpointError: they lack a tensor. ModelError: see `load_model`.
    """
    model, lost = _loaded(directory, architecture, dtype, {})
    if lost:
        raise CheckpointError(
            f"'{directory}' lacks '{lost[0]}'{f' and {len(lost) - 1} more tensors' if lost[1:] else ''} of a {architecture}: "
            "it is not as it was exported; export it again"
        )
    return model


def load_model(
    directory: Path,
    architecture: str,
    dtype: str,
    fields: Mapping[str, Any] | None = None,
    replaced: Collection[str] = (),
) -> nn.Module:
    """A transformers model of this class, in this dtype or (`auto`) that of its files.

    Args:
        fields: of its configuration, in place of the files'. replaced: parameters that will be given other values, so that the
            files may have them in another size.

    Raises:
        ModelError: transformers has no such class, or cannot load the directory.
    """
    return _loaded(directory, architecture, dtype, fields or {}, replaced)[0]


def _loaded(
    directory: Path, architecture: str, dtype: str, fields: Mapping[str, Any], replaced: Collection[str] = ()
) -> tuple[nn.Module, Sequence[str]]:
    """The model, in evaluation mode, and what of it is not in the files."""
    import transformers

    cls = getattr(transformers, architecture, None)
    if cls is None:
        raise ModelError(f"the model is a {architecture or 'model of unknown class'}, which transformers does not have")
    names = fields.get("id2label", {})
    labels = (
        {"id2label": {int(number): name for number, name in names.items()}, "label2id": fields["label2id"]}
        if names
        else {}
    )
    try:
        with quiet_transformers():
            model, found = cls.from_pretrained(
                directory, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **labels
            )
    except UNREADABLE as error:
        raise ModelError(f"cannot load '{directory}' as {architecture}: {why(error, directory)[:300]}") from error
    check_alone(directory, model)
    for name, there, here in sorted(found["mismatched_keys"]):
        if name not in replaced:
            sizes = f"{list(there)} in its files and {list(here)} in a model of its configuration"
            raise ModelError(f"cannot load '{directory}' as {architecture}: '{name}' is {sizes}")
    if "pad_token_id" in fields:  # as an argument, a configuration that does not know it would not take it
        model.config.get_text_config().pad_token_id = fields["pad_token_id"]
    return model.eval(), sorted(found["missing_keys"])


def names_in_lora(directory: Path) -> list[str]:
    """The tensors of a LoRA in PEFT's format as the model calls them; those of modules trained in full are its parameters."""
    return [key.removeprefix(PREFIX) for key in read_entries(directory / WEIGHTS)[0]]


def with_lora(model: nn.Module, directory: Path) -> nn.Module:
    """The model with a LoRA adapter in PEFT's format applied, read from the files as any runtime would.

    Raises:
        CheckpointError: the files are damaged. MergeError: they belong to another model.
    """
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        alphas, ranks = config["alpha_pattern"], config["rank_pattern"]
        default = config["lora_alpha"], config["r"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"'{directory / CONFIG}' is damaged: {error!r}") from None
    entries, _ = read_entries(directory / WEIGHTS)
    with Reader() as reader:
        tensors = {key.removeprefix(PREFIX): reader.read(entry) for key, entry in entries.items()}
    for name, A in tensors.items():
        path = name.removesuffix(".lora_A.weight")
        if name.endswith(".lora_B.weight"):
            continue
        module = _submodule(model, path if path != name else name.rpartition(".")[0], directory)
        if path == name:
            _replace(module, name.rpartition(".")[2], A)
        else:
            own = next((key for key in map(re.escape, (path, f"{path}.weight")) if key in {**alphas, **ranks}), "")
            scale = alphas.get(own, default[0]) / ranks.get(own, default[1])
            module.register_forward_hook(_add(A, tensors[f"{path}.lora_B.weight"], scale))
    return model


def _add(A: Tensor, B: Tensor, scale: float) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
        x = inputs[0].to(A.dtype)
        return y + (scale * (x @ A.T) @ B.T).to(y.dtype)

    return hook


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    """A new parameter, so that a tied one elsewhere stays as it is."""
    old = getattr(module, name)
    setattr(module, name, nn.Parameter(value.to(old.dtype), requires_grad=False))


def _submodule(model: nn.Module, path: str, directory: Path) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise MergeError(f"'{directory}' belongs to another model: this one has no '{path}'") from None


def _tokenizer(directory: Path) -> Any:
    if not any(
        (directory / name).is_file()
        for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    ):
        return None
    import transformers

    try:
        with quiet_transformers():
            return transformers.AutoTokenizer.from_pretrained(directory)
    except MISCONFIGURED:
        return None
