"""What the quickstart measured, as JSON and as a table."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from ..errors import size
from ..reporting import share


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
    """What the quickstart measured. Losses are in nats per completion token, sizes in bytes.

    Attributes:
        merge_error: root mean square of (merged - adapted) logits over that of (adapted - base) logits, in float32: in
            16 bits the rounding of the merged weights would hide what it is to show, the more so after few steps.
        failures: one line for each check that failed.
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
    peak_memory_bytes: int
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
        table = Table(title=escape(title), show_header=False)
        for label, value in (
            ("trainable parameters", share(self.trainable_parameters, self.base_parameters)),
            ("adapter file", size(self.adapter_bytes)),
            ("seconds per step", f"{self.seconds_per_step:.2f} ({self.total_seconds:.0f} s in all)"),
            ("peak memory", size(self.peak_memory_bytes)),
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
