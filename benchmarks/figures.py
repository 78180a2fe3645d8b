"""What the benchmarks' short forms give: figures, and the targets that they are held against."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One measured number. `target`: the most that it may be; None: for comparison."""

    what: str
    value: float
    target: float | None = None
    unit: str = "× floor"

    @property
    def verdict(self) -> str:
        """Whether the target is met, in a word."""
        return "" if self.target is None else "met" if self.value <= self.target else "missed"


def show(title: str, figures: Iterable[Figure]) -> None:
    """Print a table with the targets beside the figures."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("what")
    for heading in ("figure", "target", "unit", ""):
        table.add_column(heading, justify="left" if heading in ("unit", "") else "right")
    for figure in figures:
        target = "" if figure.target is None else f"≤ {figure.target:g}"
        table.add_row(figure.what, f"{figure.value:.3g}", target, figure.unit, figure.verdict)
    Console(width=110).print(table)
