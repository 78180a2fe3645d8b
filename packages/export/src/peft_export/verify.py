"""Proof that an export computes what the adapted model computes, here or, from golden logits, on another machine."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_core import CheckpointError, MergeError, activate
from peft_core.adapter_file import read_header
from peft_core.dtypes import name_of
from peft_core.files import whole_directory, write_text
from peft_core.models import most_tokens
from peft_core.spec import DTYPE_OF_NAME

from . import card, output, parameters, running
from .adapter_files import Adapters, weights_of
from .checkpoint_files import (
    CODES,
    DTYPE_OF_CODE,
    PLAIN_FLOATS,
    Checkpoint,
    Reader,
    dtype_code,
    open_checkpoint,
    read_entries,
)
from .lora import SVD
from .onnx.runtime import OnnxModel
from .peft_format import CONFIG, WEIGHTS
from .reports import Comparison, Difference, VerifyReport
from .running import Prompt
from .shards import Item, Writer
from .verdict import MAX_DIFFERENCE, MAX_KL, MAX_KL_ROUGH, card_lines

GOLDEN, RESULTS = "golden.safetensors", "results.json"
GREEDY = 64
"""How many tokens a model that generates is let write, where its context has room for them."""
_SHORT = ("bfloat16", "float16")


def verify(
    export: str | Path,
    base: str | Path | None = None,
    adapters: Adapters | None = None,
    *,
    prompts: Sequence[str] = (),
    max_kl: float | None = None,
    dtype: str = "float32",
    record: bool = True,
) -> VerifyReport:
    """Compare an export with the adapted model, or with the golden logits that an earlier comparison left in it.

    Args:
        export: what `merge`, `export_lora` or `export_onnx` wrote.
        base: checkpoint directory; needed with `adapters`, and for a LoRA.
        adapters: what it was made from; None: compare with the golden logits.
        prompts: texts; none: built-in ones. max_kl: the only limit, in place of `MAX_KL` and `MAX_DIFFERENCE`.
        dtype: what both models are run in. float32 shows what the export's rounding does, and nothing else; `auto`, the
            files' own, takes half the memory for 16-bit models, and adds the rounding of every activation.
        record: with `adapters`, keep golden logits in the export and the result in its model card. What has no `export.json` is
            not an export, and is left as it is.

    Raises:
        CheckpointError: an input cannot be read. MergeError: something is missing for the comparison.
        ModelError: a model cannot be loaded or compared. SpecError: a dtype that is none.
    """
    dtype_code(None if dtype == "auto" else dtype)
    started = time.perf_counter()
    directory, source = Path(export), None if base is None else Path(base)
    weights = {} if adapters is None else weights_of(adapters)
    kind = _kind(directory)
    if (weights or kind == "lora") and source is None:
        raise MergeError(
            f"{'the adapter' if weights else 'a LoRA export'} needs its base model: give base (--base DIR)"
        )
    if weights:
        assert source is not None
        reference = _from_adapted_model(kind, directory, source, weights, prompts, dtype)
    elif prompts:
        raise MergeError(
            "golden logits are those of the prompts that they were made with; for others give base and adapters "
            "(--base, --adapter)"
        )
    else:
        reference = _from_golden(directory)
    compared, equal, weight = _answers(kind, directory, source, reference, dtype)
    precisions = _precisions(kind, directory)
    precision = precisions[0]
    computed_in = _computed_in(kind, directory, source, dtype)
    rough = _approximate(kind, directory) or not {computed_in, reference.computed_in}.isdisjoint(_SHORT)
    limit = _limit(kind, precisions, rough) if max_kl is None else max_kl
    nearness = MAX_DIFFERENCE.get(precision) if max_kl is None else None
    generated = 0 if reference.written is None else len(reference.written)
    near = nearness is None or (all(found.difference <= nearness for found in compared) and equal == generated)
    same = weight is None or max_kl is not None or weight.relative <= weight.limit
    report = VerifyReport(
        export=str(export),
        kind=kind,
        against=", ".join(weights) if weights else "golden logits",
        dtype=precision,
        computed_in=computed_in,
        max_kl=limit,
        ok=near and same and all(found.mean_kl <= limit for found in compared),
        prompts=tuple(compared),
        seconds=round(time.perf_counter() - started, 3),
        max_difference=nearness,
        generated=generated,
        generated_equal=equal,
        effect=reference.effect,
        weight=weight,
        shown=max_kl is None and reference.shown,
    )
    if weights and record and (directory / output.MARKER).is_file():
        _record(directory, reference, report)
    return report


class _Reference(NamedTuple):
    """What the export is compared with: for each prompt logits [positions, vocabulary], and what follows the first one when
    it is generated greedily, if anything. `effect`: see `VerifyReport`. `weights`: see `parameters.expected`; None: not known.
    `shown`: whether the base's own weights are others.
    """

    architecture: str
    computed_in: str
    inputs: list[Prompt]
    logits: list[Tensor]
    written: Tensor | None
    effect: float | None
    weights: parameters.Products | None = None
    shown: bool = False


def _from_adapted_model(
    kind: str, directory: Path, source: Path, weights: Mapping[str, float], prompts: Sequence[str], dtype: str
) -> _Reference:
    header = read_header(next(iter(weights)))
    model = running.adapted_model(source, weights, header, dtype)
    config: Any = model.config
    inputs = running.make_prompts(prompts, [directory, source], model)
    logits = running.logits(model, inputs)
    written = _greedy(model, inputs[0].ids) if kind == "onnx" else None
    activate(model, [])
    bare = zip(logits, running.logits(model, inputs), strict=True)
    effect = max(compare("", adapted, found).mean_kl for adapted, found in bare)
    computed_in = name_of(config.dtype)
    plain = kind == "merged" and all(parameter.is_floating_point() for parameter in model.parameters())
    dtypes = _stored_dtypes(directory, source, computed_in, dtype) if plain else []
    answer = _Reference(header.base.architecture, computed_in, inputs, logits, written, effect)
    if not dtypes:
        return answer
    products = parameters.expected(model, weights, dtypes)
    before = parameters.farthest(model, products)
    return answer._replace(weights=products, shown=before.relative > before.limit)


def _stored_dtypes(directory: Path, source: Path, computed_in: str, dtype: str) -> list[torch.dtype]:
    """What a merged export's weights may be rounded to; none where a model is run in less than its files hold."""
    with suppress(CheckpointError):  # a base in another format
        own, base = (_precisions("merged", where) for where in (directory, source))
        if _holds(computed_in, base) and _holds(_run_in(own, dtype), own):
            return [DTYPE_OF_NAME[name] for name in dict.fromkeys([*own, computed_in])]
    return []


def _holds(dtype: str, stored: Sequence[str]) -> bool:
    """Whether weights of these precisions are the same in this one."""
    return all(
        torch.promote_types(DTYPE_OF_NAME[name], DTYPE_OF_NAME[dtype]) == DTYPE_OF_NAME[dtype] for name in stored
    )


def _answers(
    kind: str, directory: Path, source: Path | None, reference: _Reference, dtype: str
) -> tuple[list[Comparison], int, Difference | None]:
    """The export's logits compared with the reference's; how many of its tokens, from the first on, it writes, too; the
    parameter that is farthest from what it should be, where that is known.
    """
    if kind != "onnx":
        model = _load(kind, directory, source, reference.architecture, dtype)
        compared = _compared(reference, running.logits(model, reference.inputs))
        return compared, 0, parameters.farthest(model, reference.weights) if reference.weights else None
    export = OnnxModel(directory)
    ways = export.logits([prompt.ids for prompt in reference.inputs]).items()
    compared = [comparison for way, found in ways for comparison in _compared(reference, found, way)]
    if reference.written is None:
        return compared, 0, None
    same = export.greedy(reference.inputs[0].ids, len(reference.written)) == reference.written
    return compared, int(same.cumprod(0).sum()), None


def _compared(reference: _Reference, found: Sequence[Tensor], way: str = "") -> list[Comparison]:
    triples = zip(reference.inputs, reference.logits, found, strict=True)
    return [replace(compare(prompt.text, want, answer), way=way) for prompt, want, answer in triples]


def _load(kind: str, directory: Path, source: Path | None, architecture: str, dtype: str) -> nn.Module:
    """A merged checkpoint, or the base with a LoRA applied."""
    if kind == "merged":
        return running.load_merged(directory, architecture, dtype)
    assert source is not None
    fields = output.read_marker(directory)["config"] if (directory / output.MARKER).is_file() else {}
    model = running.load_model(source, architecture, dtype, fields, running.names_in_lora(directory))
    return running.with_lora(model, directory)


def _greedy(model: nn.Module, ids: Tensor) -> Tensor | None:
    """What the adapted model writes after the first prompt; None if it writes nothing."""
    if not getattr(model, "can_generate", lambda: False)():
        return None
    length = most_tokens(model)
    return running.greedy(model, ids, GREEDY if length is None else max(0, min(GREEDY, length - len(ids))))


def compare(prompt: str, expected: Tensor, found: Tensor) -> Comparison:
    """Two sets of logits [positions, vocabulary] for one prompt. What is not finite counts as infinitely far.

    Raises:
        MergeError: their sizes differ.
    """
    if expected.shape != found.shape:
        raise MergeError(
            f"the export answers with logits of shape {list(found.shape)}, the adapted model with {list(expected.shape)}"
        )
    p, q = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).clamp(min=0.0).nan_to_num(nan=float("inf"))
    difference = (expected.double() - found.double()).abs().max().nan_to_num(nan=float("inf"))
    agreement = (expected.argmax(-1) == found.argmax(-1)).double().mean()
    return Comparison(prompt, len(expected), float(kl.mean()), float(kl.max()), float(difference), float(agreement))


def _kind(directory: Path) -> str:
    kind = output.read_marker(directory)["kind"] if (directory / output.MARKER).is_file() else ""
    if kind == "onnx":
        return "onnx"
    if (directory / CONFIG).is_file() and kind != "merged":
        return "lora"
    if (directory / "config.json").is_file():
        open_checkpoint(directory)
        return "merged"
    what = "does not exist" if not directory.exists() else f"is not an export: it has neither config.json nor {CONFIG}"
    raise CheckpointError(f"'{directory}' {what}")


def _precisions(kind: str, directory: Path) -> list[str]:
    """Of the export's weights; the one that most of them have comes first."""
    if kind == "onnx":
        return [str(output.read_marker(directory)["report"]["precision"])]
    if kind == "lora":
        entries, _ = read_entries(directory / WEIGHTS)
        weights = Checkpoint(directory, entries, {})
    else:
        weights = open_checkpoint(directory)
    codes = dict.fromkeys([weights.dtype, *(entry.dtype for entry in weights.entries.values() if len(entry.shape) > 1)])
    return [name_of(DTYPE_OF_CODE[code]) for code in codes if code in PLAIN_FLOATS]


def _computed_in(kind: str, directory: Path, source: Path | None, dtype: str) -> str:
    """What the export is run in."""
    model = ("merged", source) if kind == "lora" and source is not None else (kind, directory)
    return _run_in(_precisions(*model), dtype) if dtype == "auto" else dtype


def _run_in(precisions: Sequence[str], dtype: str) -> str:
    """What a model whose weights have these precisions is run in."""
    return precisions[0] if dtype == "auto" else dtype


def _approximate(kind: str, directory: Path) -> bool:
    """Whether an export was made to compute something else: factors by truncated SVD."""
    if kind != "lora" or not (directory / output.MARKER).is_file():
        return False
    return SVD in output.read_marker(directory)["report"].get("losses", ())


def _limit(kind: str, precisions: Sequence[str], rough: bool) -> float:
    limit = max(MAX_KL[precision] for precision in precisions)
    return max(limit, MAX_KL_ROUGH) if rough and kind != "onnx" else limit


def _from_golden(directory: Path) -> _Reference:
    """The prompts, logits and greedy tokens that a verified export carries."""
    path = directory / output.FOLDER / GOLDEN
    if not path.is_file():
        raise MergeError(
            f"'{directory}' carries no golden logits yet; compare it once with base and adapters "
            "(--base, --adapter), and they are kept in it"
        )
    try:
        results = json.loads((directory / output.FOLDER / RESULTS).read_text(encoding="utf-8"))
        rows = results["prompts"]
        texts = [found["prompt"] for found in rows if found.get("way") == rows[0].get("way")]
    except (ValueError, KeyError, TypeError, IndexError, OSError) as error:
        raise CheckpointError(f"'{directory / output.FOLDER / RESULTS}' is damaged: {error!r}") from None
    entries, _ = read_entries(path)
    try:
        with Reader() as reader:
            stored = [(entries[f"{number}.input_ids"], entries[f"{number}.logits"]) for number in range(len(texts))]
            found = [(reader.read(ids), reader.read(logits)) for ids, logits in stored]
            written = reader.read(entries["0.greedy"]) if "0.greedy" in entries else None
    except KeyError as error:
        raise CheckpointError(f"'{path}' is damaged: {error} is missing") from None
    prompts = [Prompt(text, ids) for text, (ids, _) in zip(texts, found, strict=True)]
    architecture = output.read_marker(directory)["architecture"]
    computed_in = str(results.get("computed_in", ""))
    logits = [logits for _, logits in found]
    return _Reference(architecture, computed_in, prompts, logits, written, results.get("effect"))


def _record(directory: Path, reference: _Reference, report: VerifyReport) -> None:
    """Keep golden logits in the export, and the result in its card."""
    tensors = {f"{number}.input_ids": prompt.ids for number, prompt in enumerate(reference.inputs)}
    tensors |= {f"{number}.logits": found for number, found in enumerate(reference.logits)}
    if reference.written is not None:
        tensors["0.greedy"] = reference.written
    items = [Item(key, CODES[t.dtype], tuple(t.shape), t.numel() * t.element_size()) for key, t in tensors.items()]
    with whole_directory(directory / output.FOLDER, (GOLDEN, RESULTS)) as temporary:
        with Writer(temporary, items, {}, name=GOLDEN) as writer:
            for key, tensor in tensors.items():
                writer.write(key, tensor)
        output.write_json(temporary / RESULTS, report.to_json())
    readme = directory / card.NAME
    if readme.is_file():  # which its owner may have edited, with an editor that does not write UTF-8
        text = readme.read_text(encoding="utf-8", errors="surrogateescape")
        write_text(readme, card.with_verification(text, card_lines(report)))
