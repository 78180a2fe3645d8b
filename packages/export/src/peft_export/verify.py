"""Proof that an export computes what the adapted model computes, here or, from golden logits, on another machine."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from peft_core import CheckpointError, MergeError
from peft_core.checkpoint import read_header
from peft_core.files import whole_directory

from . import card, output
from .checkpoint_files import CODES, DTYPES, Reader, open_checkpoint, read_entries
from .lora import CONFIG
from .shards import Item, Writer
from .streaming import dtype_code

FOLDER, GOLDEN, RESULTS = "verification", "golden.safetensors", "results.json"
MAX_KL: Mapping[str, float] = {"float64": 1e-2, "float32": 1e-2, "bfloat16": 1e-2, "float16": 1e-2}
"""By precision of the export: the mean KL divergence, in nats per token, beyond which it fails."""


@dataclass(frozen=True)
class Comparison:
    """One prompt: KL(adapted ‖ export) of the next-token distributions, in nats, over its positions.

    Attributes:
        difference: largest absolute difference of two logits. agreement: share of positions with the same first choice.
    """

    prompt: str
    positions: int
    mean_kl: float
    max_kl: float
    difference: float
    agreement: float


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found.

    Attributes:
        dtype: of the export's weights. computed_in: what both models were run in.
        ok: every prompt's mean KL is within `max_kl`.
    """

    export: str
    kind: str
    against: str
    dtype: str
    computed_in: str
    max_kl: float
    ok: bool
    prompts: tuple[Comparison, ...]
    seconds: float

    @property
    def mean_kl(self) -> float:
        """That of the worst prompt."""
        return max(found.mean_kl for found in self.prompts)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "mean_kl": self.mean_kl}


def verify(
    export: str | Path,
    base: str | Path | None = None,
    adapters: str | Path | Sequence[str | Path] | Mapping[str, float] | None = None,
    *,
    prompts: Sequence[str] = (),
    max_kl: float | None = None,
    dtype: str = "float32",
    record: bool = True,
) -> VerifyReport:
    """Compare an export with the adapted model, or with the golden logits that an earlier comparison left in it.

    Args:
        export: what `merge` or `export_lora` wrote. base: checkpoint directory; needed with `adapters`, and for a LoRA.
        adapters: what it was made from; None: compare with the golden logits.
        prompts: texts; none: built-in ones. max_kl: see `MAX_KL`.
        dtype: what both models are run in. float32 shows what the export's rounding does, and nothing else; `auto`, the
            files' own, takes half the memory for 16-bit models, and adds the rounding of every activation.
        record: with `adapters`, keep golden logits in the export and the result in its model card.

    Raises:
        CheckpointError: an input cannot be read. MergeError: something is missing for the comparison.
        ModelError: a model cannot be loaded or compared. SpecError: a dtype that is none.
    """
    from . import running

    dtype_code(None if dtype == "auto" else dtype)

    started = time.perf_counter()
    directory = Path(export)
    kind = _kind(directory)
    source = None if base is None else Path(base)
    weights = _weights(adapters)
    if (weights or kind == "lora") and source is None:
        raise MergeError(f"{'the adapter' if weights else 'a LoRA export'} needs its base model: give --base DIR")
    if weights:
        assert source is not None
        header = read_header(next(iter(weights)))
        architecture = header.base.architecture
        reference = running.adapted_model(source, weights, header, dtype)
        config: Any = reference.config
        vocabulary = getattr(config.get_text_config(), "vocab_size", 2)
        inputs = running.make_prompts(prompts, [directory, source], vocabulary)
        expected = running.logits(reference, inputs)
        del reference
    else:
        if prompts:
            raise MergeError(
                "golden logits are those of the prompts that they were made with; for others give --base and --adapter"
            )
        architecture = output.read_marker(directory)["architecture"]
        inputs, expected = _read_golden(directory)
    fields: dict[str, Any] = {}
    if kind == "lora":
        assert source is not None
        fields = output.read_marker(directory)["config"] if (directory / output.MARKER).is_file() else {}
        model = running.with_lora(running.load_model(source, architecture, dtype, fields), directory)
    else:
        model = running.load_model(directory, architecture, dtype)
    precision = _precision(directory if kind == "merged" else source)
    compared = tuple(
        compare(prompt.text, want, found)
        for prompt, want, found in zip(inputs, expected, running.logits(model, inputs), strict=True)
    )
    limit = MAX_KL.get(precision, 1e-2) if max_kl is None else max_kl
    report = VerifyReport(
        export=str(export),
        kind=kind,
        against=", ".join(weights) if weights else "golden logits",
        dtype=precision,
        computed_in=dtype if dtype != "auto" else precision,
        max_kl=limit,
        ok=all(found.mean_kl <= limit for found in compared),
        prompts=compared,
        seconds=round(time.perf_counter() - started, 3),
    )
    if weights and record:
        _record(directory, inputs, expected, report)
    return report


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
    if (directory / CONFIG).is_file():
        return "lora"
    if (directory / "config.json").is_file():
        open_checkpoint(directory)
        return "merged"
    what = "does not exist" if not directory.exists() else f"is no export: it has neither config.json nor {CONFIG}"
    raise CheckpointError(f"'{directory}' {what}")


def _precision(directory: Path | None) -> str:
    assert directory is not None
    return str(DTYPES[open_checkpoint(directory).dtype]).removeprefix("torch.")


def _weights(adapters: str | Path | Sequence[str | Path] | Mapping[str, float] | None) -> dict[str, float]:
    if adapters is None:
        return {}
    if isinstance(adapters, (str, Path)):
        adapters = [adapters]
    return dict(adapters) if isinstance(adapters, Mapping) else dict.fromkeys(map(str, adapters), 1.0)


def _read_golden(directory: Path) -> tuple[list[Any], list[Tensor]]:
    """The prompts and logits that a verified export carries."""
    from .running import Prompt

    path = directory / FOLDER / GOLDEN
    if not path.is_file():
        raise MergeError(
            f"'{directory}' carries no golden logits yet; compare it once with --base and --adapter, and they are kept in it"
        )
    try:
        results = json.loads((directory / FOLDER / RESULTS).read_text(encoding="utf-8"))
        texts = [found["prompt"] for found in results["prompts"]]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"'{directory / FOLDER / RESULTS}' is damaged: {error!r}") from None
    entries, _ = read_entries(path)
    try:
        with Reader() as reader:
            stored = [(entries[f"{number}.input_ids"], entries[f"{number}.logits"]) for number in range(len(texts))]
            found = [(reader.read(ids), reader.read(logits)) for ids, logits in stored]
    except KeyError as error:
        raise CheckpointError(f"'{path}' is damaged: {error} is missing") from None
    return [Prompt(text, ids) for text, (ids, _) in zip(texts, found, strict=True)], [logits for _, logits in found]


def _record(directory: Path, inputs: Sequence[Any], expected: Sequence[Tensor], report: VerifyReport) -> None:
    """Keep golden logits in the export, and the result in its card."""
    tensors = {f"{number}.input_ids": prompt.ids for number, prompt in enumerate(inputs)}
    tensors |= {f"{number}.logits": found for number, found in enumerate(expected)}
    items = [Item(key, CODES[t.dtype], tuple(t.shape), t.numel() * t.element_size()) for key, t in tensors.items()]
    with whole_directory(directory / FOLDER, (GOLDEN, RESULTS)) as temporary:
        with Writer(temporary, items, {}, name=GOLDEN) as writer:
            for key, tensor in tensors.items():
                writer.write(key, tensor)
        output.write_json(temporary / RESULTS, report.to_json())
    readme = directory / card.NAME
    if (directory / output.MARKER).is_file() and readme.is_file():
        text = card.with_verification(readme.read_text(encoding="utf-8"), _card_lines(report))
        temporary_file = readme.with_suffix(f".{os.getpid()}.tmp")
        temporary_file.write_text(text, encoding="utf-8")
        os.replace(temporary_file, readme)


def _card_lines(report: VerifyReport) -> list[str]:
    rows = []
    for found in report.prompts:
        prompt = " ".join(found.prompt.split())[:40].replace("|", "/")
        figures = f"{found.mean_kl:.1e} | {found.max_kl:.1e} | {found.difference:.1e} | {100 * found.agreement:.0f} %"
        rows.append(f"| {prompt} | {found.positions} | {figures} |")
    verdict = "passed" if report.ok else "FAILED"
    how = f"{report.dtype} weights, compared with the adapted model in {report.computed_in}"
    return [
        f"{how}: {verdict} (mean KL ≤ {report.max_kl:g} nats).",
        "",
        "| prompt | positions | mean KL | max KL | max logit difference | same first choice |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        "The logits of the adapted model are in `verification/`: `peft-core verify THIS` compares with them elsewhere.",
    ]
