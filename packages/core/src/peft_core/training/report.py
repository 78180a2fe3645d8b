"""What a run measured, as JSON and as a table."""

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
class TrainReport:
    """What a run measured. Losses are in nats, per token or, for a classifier, per example; sizes in bytes.

    Attributes:
        truncated: how many examples were cut to `max_length`.
        dropped: how many were left out, because nothing to learn was within `max_length`.
        evaluations: of the held-out rows: `step`, `loss` and, for a classifier, `accuracy`. The first is before training.
        result: the evaluation of what was saved; None without held-out rows.
        seconds: with those before an interruption, as far as the checkpoint that the run went on from.
    """

    method: str
    options: dict[str, Any]
    model: str
    dtype: str
    format: str
    labels: list[str]
    training_examples: int
    held_out_examples: int
    truncated: int
    dropped: int
    packed_rows: int | None
    trained_modules: list[str]
    trainable_parameters: int
    base_parameters: int
    optimizer: str
    steps: int
    seconds: float
    peak_memory_bytes: int
    adapter_bytes: int
    losses: list[float]
    evaluations: list[dict[str, float]]
    result: dict[str, float] | None
    output_dir: str

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(asdict(self), indent=2)

    def __rich__(self) -> Group:
        table = Table(title=f"{self.method} on {escape(self.model)}", title_justify="left", show_header=False)
        rows = {
            "examples": f"{self.training_examples:,} to train, {self.held_out_examples:,} held out ({self.format})",
            "cut to the length": f"{self.truncated:,}, and {self.dropped:,} left out"
            if self.truncated or self.dropped
            else "none",
            "packed into rows": "" if self.packed_rows is None else f"{self.packed_rows:,}",
            "labels": ", ".join(self.labels),
            "trained in full": ", ".join(self.trained_modules),
            "trainable parameters": share(self.trainable_parameters, self.base_parameters),
            "saved weights": size(self.adapter_bytes),
            "steps": f"{self.steps:,} of {self.optimizer}, {self.seconds:.0f} s",
            "peak memory": size(self.peak_memory_bytes),
            "training loss": f"{self.losses[0]:.3f} → {self.losses[-1]:.3f}" if self.losses else "",
        }
        if self.result:
            for name, figure in self.result.items():
                if name != "step":
                    rows[f"held-out {name}"] = f"{self.evaluations[0][name]:.3f} → {figure:.3f}"
        for label, value in rows.items():
            if value:
                table.add_row(label, escape(value))
        return Group(table, f"weights, metrics.json and loss.png: {escape(self.output_dir)}")
