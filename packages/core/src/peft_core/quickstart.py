"""The main job from end to end: fine-tune a real model, save, load into a fresh base, merge, check.

Uses nothing but the public contract of this package, as a user's program would.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

import peft_core as pc

from . import data as pairs
from . import models, reporting, training
from .errors import DataError

# How far merging may move the logits, as part of how far the adapter moved them, in float32.
_MERGE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Sample:
    """A held-out function, what its docstring says, and what the model wrote before and after training."""

    name: str
    prompt: str
    written_by_hand: str
    before: str
    after: str


@dataclass(frozen=True)
class Report:
    """What the run measured. Losses are in nats per completion token, sizes in bytes.

    ``merge_error`` is the root mean square of (merged - adapted) logits over that of (adapted - base) logits, in float32:
    in 16 bits the rounding of the merged weights would hide what it is to show, the more so after few steps.
    ``failures`` has one line per check that failed.
    """

    method: str
    options: dict[str, Any]
    model: str
    dtype: str
    seed: int
    steps: int
    batch_size: int
    lr: float
    training_examples: int
    held_out_examples: int
    truncated_examples: int
    trainable_parameters: int
    base_parameters: int
    adapter_bytes: int
    seconds_per_step: float
    total_seconds: float
    peak_memory_bytes: int | None
    held_out_before: float
    held_out_after: float
    merge_error: float
    losses: list[float]
    samples: list[Sample]
    adapter: str
    loss_curve: str
    failures: list[str]

    @property
    def fall(self) -> float:
        """By what part the held-out loss fell."""
        return 1 - self.held_out_after / self.held_out_before

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps({**asdict(self), "held_out_fall": self.fall}, indent=2)

    def __rich__(self) -> Group:
        title = f"{self.method} on {self.model}, {self.steps} steps of {self.batch_size}"
        table = Table(title=title, show_header=False)
        share = 100 * self.trainable_parameters / self.base_parameters
        memory = "unknown" if self.peak_memory_bytes is None else f"{self.peak_memory_bytes / 1e9:.2f} GB"
        for label, value in (
            ("trainable parameters", f"{self.trainable_parameters:,} ({share:.2f} % of the base)"),
            ("adapter file", f"{self.adapter_bytes / 1e6:.1f} MB"),
            ("seconds per step", f"{self.seconds_per_step:.2f} ({self.total_seconds:.0f} s in all)"),
            ("peak memory", memory),
            ("held-out loss before", f"{self.held_out_before:.3f}"),
            ("held-out loss after", f"{self.held_out_after:.3f} ({-100 * self.fall:+.1f} %)"),
            ("merged − adapted", f"{100 * self.merge_error:.2f} % of what the adapter does (float32)"),
        ):
            table.add_row(label, value)
        shown = Table(title="Functions from modules that were held out", show_lines=True)
        for heading in ("function", "its docstring", "before training", "after training"):
            shown.add_column(heading, overflow="fold")
        for sample in self.samples:
            shown.add_row(*map(escape, (sample.name, sample.written_by_hand, sample.before, sample.after)))
        return Group(table, shown, f"adapter: {escape(self.adapter)}\nloss curve: {escape(self.loss_curve)}")


def run(
    method: str,
    model: str = "smollm2-135m",
    steps: int = 40,
    out: Path = Path("out"),
    data: Path | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    lr: float = 1e-3,
    batch_size: int = 8,
    max_length: int = 192,
    held_out: int = 128,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    console: Console | None = None,
) -> Report:
    """Fine-tune ``model`` with ``method`` on ``data`` (default: Python's standard library) and check it.

    Writes the adapter, ``loss.png`` and ``metrics.json`` into ``out``. ``held_out`` is how many examples the
    held-out loss is measured on. The same arguments give the same losses. Checks that failed are in
    the report; what the user got wrong raises PeftCoreError before anything is trained.
    """
    begin = time.perf_counter()
    reporting.require("quickstart", matplotlib="the loss curve")
    spec = pc.AdapterSpec(method=method, targets="all-linear", options=dict(options or {}), base_model=model)
    device = str(models.checked_device(device))
    dtype = dtype or models.fast_dtype(device)
    given = pairs.read_pairs(data) if data else None
    with _status(console, f"loading {model}"):
        base, tokenizer = models.load_base(model, dtype, device)
        plan = pc.plan(base, spec)
    if console:
        console.print(plan)
    with _status(console, "reading examples"):
        examples, unseen = pairs.split_by_module(given or pairs.docstring_pairs())
        chosen = _spread(unseen, held_out)
        tokens = [pairs.tokenise(example, tokenizer, max_length) for example in examples]
        held_out_tokens = [pairs.tokenise(example, tokenizer, max_length) for example in chosen]
    shown = _spread(_readable(chosen), 3)
    pad_id = tokenizer.pad_token_id
    probe = _probe(held_out_tokens, pad_id, device)

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot write to {out}: {error}") from error
    before = training.evaluate(base, held_out_tokens, pad_id, console=console, title="held-out loss before")
    with _status(console, "writing docstrings"):
        written_before = [_line(models.complete(base, tokenizer, example.prompt)) for example in shown]

    adapter = pc.attach(base, spec, seed=seed)
    adapter.total_steps = steps
    make_optimizer: Callable[..., torch.optim.Optimizer] = pc.methods()[method].optimizer or torch.optim.AdamW
    torch.manual_seed(seed)  # for dropout
    log = training.train(
        base,
        make_optimizer(adapter.parameters(), lr=lr, weight_decay=0.0),
        pairs.batches(tokens, batch_size, pad_id, seed),
        steps=steps,
        console=console,
    )
    after = training.evaluate(base, held_out_tokens, pad_id, console=console, title="held-out loss after")
    with _status(console, "writing docstrings"):
        written_after = [_line(models.complete(base, tokenizer, example.prompt)) for example in shown]

    peak_memory = reporting.peak_memory()  # of training: the checks that follow hold other models
    with _status(console, "saving, loading into a fresh base, merging"):
        adapter.save(out / "adapter")
        adapted_logits = _logits(base, probe)
        fresh, _ = models.load_base(model, dtype, device)
        pc.load(fresh, out / "adapter")
        loaded_logits = _logits(fresh, probe)
        del fresh
        merge_error = _merge_error(model, out / "adapter", device, probe)
        reporting.plot_losses(log.losses, out / "loss.png", f"{method} on {model}", (before, after))

    failures = []
    if not after < before:
        failures.append(f"the held-out loss did not fall: {before:.3f} before, {after:.3f} after training")
    if not torch.equal(loaded_logits, adapted_logits):
        failures.append("the loaded adapter does not give the outputs of the saved one")
    if not merge_error < _MERGE_TOLERANCE:
        failures.append(
            f"merged and adapted outputs differ by {100 * merge_error:.2f} % of what the adapter does, "
            f"more than {100 * _MERGE_TOLERANCE:.1f} %"
        )
    report = Report(
        method=method,
        options=dict(spec.options),
        model=model,
        dtype=str(dtype).removeprefix("torch."),
        seed=seed,
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        training_examples=len(tokens),
        held_out_examples=len(chosen),
        truncated_examples=sum(example.truncated for example in tokens),
        trainable_parameters=adapter.num_trainable,
        base_parameters=plan.base.num_parameters,
        adapter_bytes=(out / "adapter" / "adapter.safetensors").stat().st_size,
        seconds_per_step=log.seconds_per_step,
        total_seconds=time.perf_counter() - begin,
        peak_memory_bytes=peak_memory,
        held_out_before=before,
        held_out_after=after,
        merge_error=merge_error,
        losses=log.losses,
        samples=[
            Sample(f"{example.module}.{example.name}", example.prompt, example.completion, old, new)
            for example, old, new in zip(shown, written_before, written_after, strict=True)
        ],
        adapter=str(out / "adapter"),
        loss_curve=str(out / "loss.png"),
        failures=failures,
    )
    (out / "metrics.json").write_text(report.to_json() + "\n", encoding="utf-8")
    return report


def _spread(examples: Sequence[pairs.Example], count: int) -> list[pairs.Example]:
    """``count`` of the examples, at even distances, so that every module has its share."""
    count = min(count, len(examples))
    return [examples[index * len(examples) // count] for index in range(count)]


def _readable(examples: Sequence[pairs.Example]) -> list[pairs.Example]:
    """Public functions of middling length: short enough to judge at a glance, with something to say."""
    readable = [e for e in examples if 4 <= e.prompt.count("\n") <= 20 and not e.name.startswith("_")]
    return readable if len(readable) >= 3 else list(examples)


def _line(text: str) -> str:
    """The first line of what was written, up to a closing quote."""
    return text.strip().partition("\n")[0].partition('"""')[0].strip() or "(nothing)"


def _probe(tokens: Sequence[pairs.Tokens], pad_id: int, device: str) -> dict[str, torch.Tensor]:
    """A few held-out examples, whose outputs are compared bit by bit and after merging."""
    batch = pairs.collate(tokens[:4], pad_id)
    return {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}


@torch.no_grad()
def _logits(model: torch.nn.Module, probe: dict[str, torch.Tensor], last: int = 32) -> torch.Tensor:
    """Logits of the probe's real tokens among the ``last`` positions of each example, [tokens, vocabulary]."""
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
    with console.status(text):
        yield
