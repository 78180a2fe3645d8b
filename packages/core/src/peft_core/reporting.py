"""What a run shows: progress, figures, its curve of losses, its memory, and what it needs for that."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .errors import PeftCoreError


class TrainingError(PeftCoreError):
    """Training cannot continue."""


def progress_bar(console: Console | None) -> Progress:
    """A progress bar with a column `note` beside it; without a console, nothing is shown."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=console,
        disable=console is None,
    )


def peak_memory() -> int:
    """The most bytes this process has held, on the GPU where one was used."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def share(trainable: int, base: int) -> str:
    """A number of parameters and its share of the base's, for a table."""
    return f"{trainable:,} ({100 * trainable / base:.2f} % of the base)"


def plot_losses(
    losses: Sequence[float],
    path: Path,
    title: str,
    held_out: tuple[float, float] | None = None,
    evaluations: Sequence[tuple[int, float]] = (),
    unit: str = "nats per token",
) -> None:
    """Write the loss curve as a PNG.

    Args:
        losses: of each training step.
        held_out: the held-out loss before and after training.
        evaluations: (step, held-out loss) on the way.
        unit: of the losses.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color="0.75", linewidth=1, label="training, each step")
    axes.plot(steps, _smoothed(losses), color="C0", label="training, smoothed")
    if held_out:
        axes.plot([0, len(losses)], held_out, "o", color="C3", label="held out, before and after")
    if evaluations:
        axes.plot(*zip(*evaluations, strict=True), "o-", color="C3", label="held out")
    axes.set(xlabel="step", ylabel=f"loss ({unit})")
    axes.set_title(title, parse_math=False)  # a path may hold dollars
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def require(extra: str, **uses: str) -> None:
    """Say now what would be missing at the end.

    Args:
        extra: of peft-core, which installs the packages.
        uses: package → what needs it.

    Raises:
        TrainingError: a package is not installed.
    """
    for package, use in uses.items():
        if importlib.util.find_spec(package) is None:
            raise TrainingError(f'{use} needs {package}: pip install "peft-core[{extra}]"')


def _smoothed(losses: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start at zero."""
    smooth, average = [], 0.0
    for step, loss in enumerate(losses, start=1):
        average = weight * average + (1 - weight) * loss
        smooth.append(average / (1 - weight**step))
    return smooth
