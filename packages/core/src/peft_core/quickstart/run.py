"""The quickstart from end to end: prepare, train, check, report.

The adapter's life (plan, attach, save, load, merge) goes through the public contract of this package, as a user's
program would.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape

import peft_core as pc

from .. import models, reporting
from ..dtypes import name_of
from ..errors import DataError
from ..prompts import complete
from ..training.batches import collate
from ..training.examples import Tokens, pair_tokens
from ..training.losses import evaluate
from . import loop
from .docstrings import Pair, docstring_pairs, read_pairs, split_by_module
from .report import Report, Sample

# How far merging may move the logits, as part of how far the adapter moved them, in float32.
_MERGE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Settings:
    """What the quickstart is to do.

    Attributes:
        out: takes the adapter, `loss.png` and `metrics.json`.
        data: JSON Lines with prompt and completion; None: Python's standard library.
        options: of the method.
        max_length: of an example, in tokens.
        held_out: how many examples the held-out loss is measured on.
    """

    method: str
    model: str = "smollm2-135m"
    steps: int = 40
    out: Path = Path("out")
    data: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    lr: float = 1e-3
    batch_size: int = 8
    max_length: int = 192
    held_out: int = 64
    dtype: torch.dtype = torch.float32
    device: str = "cpu"


def run(settings: Settings, console: Console | None = None) -> Report:
    """Fine-tune a model with a method, and check that the adapter can be saved, loaded and merged.

    The same settings give the same losses. Checks that failed are in the report.

    Raises:
        PeftCoreError: the settings, the data or the model are wrong; nothing was trained. Or training diverged.
    """
    begin = time.perf_counter()
    reporting.require("quickstart", matplotlib="the loss curve")
    ready = _prepare(settings, console)
    before = _measure(ready, "before", console)
    adapter, log = _train(settings, ready, console)
    after = _measure(ready, "after", console)
    peak_memory = reporting.peak_memory()  # of training: the checks hold other models
    with _status(console, "saving, loading into a fresh base, merging"):
        adapter.save(settings.out / "adapter")
        loads_exactly, merge_error = _check(settings, ready)
        title = f"{settings.method} on {settings.model}"
        reporting.plot_losses(log.losses, settings.out / "loss.png", title, (before.loss, after.loss))
    report = Report(
        method=settings.method,
        options=dict(ready.plan.spec.options),
        model=settings.model,
        dtype=name_of(settings.dtype),
        seed=settings.seed,
        steps=settings.steps,
        batch_size=settings.batch_size,
        lr=settings.lr,
        training_examples=len(ready.training),
        held_out_examples=len(ready.held_out),
        truncated_examples=sum(tokens.truncated for tokens in ready.training),
        trainable_parameters=adapter.num_trainable,
        base_parameters=ready.plan.base.num_parameters,
        adapter_bytes=(settings.out / "adapter" / "adapter.safetensors").stat().st_size,
        seconds_per_step=log.seconds_per_step,
        total_seconds=time.perf_counter() - begin,
        peak_memory_bytes=peak_memory,
        held_out_before=before.loss,
        held_out_after=after.loss,
        merge_error=merge_error,
        losses=log.losses,
        samples=[
            Sample(f"{pair.module}.{pair.name}", pair.prompt, pair.completion, old, new)
            for pair, old, new in zip(ready.shown, before.written, after.written, strict=True)
        ],
        adapter=str(settings.out / "adapter"),
        loss_curve=str(settings.out / "loss.png"),
        failures=_failures(before.loss, after.loss, loads_exactly, merge_error),
    )
    (settings.out / "metrics.json").write_text(report.to_json() + "\n", encoding="utf-8")
    return report


@dataclass(frozen=True)
class _Ready:
    """A base with its plan, and the examples; `shown` are the held-out ones that the model writes to."""

    base: Any
    tokenizer: Any
    plan: pc.Plan
    training: list[Tokens]
    held_out: list[Tokens]
    shown: list[Pair]


class _Measured(NamedTuple):
    loss: float
    written: list[str]


def _prepare(settings: Settings, console: Console | None) -> _Ready:
    spec = pc.AdapterSpec(method=settings.method, options=dict(settings.options), base_model=settings.model)
    given = read_pairs(settings.data) if settings.data else None
    with _status(console, f"loading {settings.model}"):
        base, tokenizer = models.load_base(settings.model, settings.dtype, settings.device)
        plan = pc.plan(base, spec)
    if console:
        console.print(plan)
    with _status(console, "reading examples"):
        seen, unseen = split_by_module(given or docstring_pairs())
        chosen = _spread(unseen, settings.held_out)
        training, held_out = (
            [pair_tokens(pair.prompt, pair.completion, tokenizer, settings.max_length) for pair in pairs]
            for pairs in (seen, chosen)
        )
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot write to {settings.out}: {error}") from error
    return _Ready(base, tokenizer, plan, training, held_out, shown=_spread(_readable(chosen), 3))


def _measure(ready: _Ready, when: str, console: Console | None) -> _Measured:
    pad = ready.tokenizer.pad_token_id
    loss = evaluate(ready.base, ready.held_out, pad, console=console, title=f"held-out loss {when}")
    with _status(console, "writing docstrings"):
        written = [_line(complete(ready.base, ready.tokenizer, pair.prompt)) for pair in ready.shown]
    return _Measured(loss, written)


def _train(settings: Settings, ready: _Ready, console: Console | None) -> tuple[pc.Adapter, loop.TrainingLog]:
    adapter = pc.attach(ready.base, ready.plan.spec, seed=settings.seed)
    adapter.total_steps = settings.steps
    make: Callable[..., torch.optim.Optimizer] = pc.methods()[settings.method].optimizer or torch.optim.AdamW
    optimizer = make(adapter.parameters(), lr=settings.lr, weight_decay=0.0)
    batches = loop.batches(ready.training, settings.batch_size, ready.tokenizer.pad_token_id, settings.seed)
    torch.manual_seed(settings.seed)  # for dropout
    return adapter, loop.train(ready.base, optimizer, batches, steps=settings.steps, console=console)


def _check(settings: Settings, ready: _Ready) -> tuple[bool, float]:
    """Whether the saved adapter gives, on a fresh base, the outputs of the trained one bit for bit; the error of merging."""
    probe = _probe(ready.held_out, ready.tokenizer.pad_token_id, settings.device)
    fresh, _ = models.load_base(settings.model, settings.dtype, settings.device)
    pc.load(fresh, settings.out / "adapter")
    loads_exactly = torch.equal(_logits(fresh, probe), _logits(ready.base, probe))
    del fresh
    return loads_exactly, _merge_error(settings.model, settings.out / "adapter", settings.device, probe)


def _failures(before: float, after: float, loads_exactly: bool, merge_error: float) -> list[str]:
    found = []
    if not after < before:
        found.append(f"the held-out loss did not fall: {before:.3f} before, {after:.3f} after training")
    if not loads_exactly:
        found.append("the loaded adapter does not give the outputs of the saved one")
    if not merge_error < _MERGE_TOLERANCE:
        found.append(
            f"merged and adapted outputs differ by {100 * merge_error:.2f} % of what the adapter does, "
            f"more than {100 * _MERGE_TOLERANCE:.1f} %"
        )
    return found


def _spread(examples: Sequence[Pair], count: int) -> list[Pair]:
    """`count` of the examples, at even distances, so that every module has its share."""
    count = min(count, len(examples))
    return [examples[index * len(examples) // count] for index in range(count)]


def _readable(examples: Sequence[Pair]) -> list[Pair]:
    """Public functions of middling length: short enough to judge at a glance, with something to say."""
    readable = [e for e in examples if 4 <= e.prompt.count("\n") <= 20 and not e.name.startswith("_")]
    return readable if len(readable) >= 3 else list(examples)


def _line(text: str) -> str:
    """The first line of what was written, up to a closing quote."""
    return text.strip().partition("\n")[0].partition('"""')[0].strip() or "(nothing)"


def _probe(tokens: Sequence[Tokens], pad_id: int, device: str) -> dict[str, torch.Tensor]:
    """A few held-out examples, whose outputs are compared bit by bit and after merging."""
    batch = collate(tokens[:4], pad_id)
    return {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}


@torch.no_grad()
def _logits(model: torch.nn.Module, probe: dict[str, torch.Tensor], last: int = 32) -> torch.Tensor:
    """Logits of the probe's real tokens among the `last` positions of each example, [tokens, vocabulary]."""
    logits: torch.Tensor = model(**probe).logits[:, -last:]
    return logits[probe["attention_mask"][:, -last:].bool()].float()


def _merge_error(model: str, adapter: Path, device: str, probe: dict[str, torch.Tensor]) -> float:
    """How far merging moves the logits of a base in float32, as part of how far the adapter moves them."""
    base, _ = models.load_base(model, torch.float32, device)
    plain = _logits(base, probe)
    loaded = pc.load(base, adapter)
    adapted = _logits(base, probe)
    loaded.merge(keep="none")
    # What nothing was moved by counts as the rounding of the base's own output.
    moved = max(_rms(adapted - plain), torch.finfo(torch.float32).eps * _rms(plain))
    return _rms(_logits(base, probe) - adapted) / moved


def _rms(difference: torch.Tensor) -> float:
    return math.sqrt(difference.square().mean().item())


@contextmanager
def _status(console: Console | None, text: str) -> Iterator[None]:
    """A line that moves while something takes its time."""
    if console is None:
        yield
        return
    with console.status(escape(text)):
        yield
