"""`output_dir`: what a run leaves there, and whether a run can start or resume in it.

The adapter with its model card, `metrics.json`, `loss.png`, `run.yaml` (the configuration with its defaults), and
`checkpoints/`, from which an interrupted run is resumed. Pre-training leaves the model that it started from in `base/`;
without an adapter, `output_dir` itself is the trained model's checkpoint.
"""

from __future__ import annotations

import json
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

from ..adapter_file import HEADER
from .config import RunConfig, RunError, difference

CHECKPOINTS, CONFIG, METRICS, CURVE = "checkpoints", "run.yaml", "metrics.json", "loss.png"


def start_or_resume(config: RunConfig, resume: bool) -> str | None:
    """The checkpoint to resume from, or None to start.

    Raises:
        RunError: the directory holds a run that would be lost, or another run than the one to resume.
    """
    out = config.output_dir
    last = _last_checkpoint(out / CHECKPOINTS)
    if not resume:
        if last or any((out / name).exists() for name in (HEADER, METRICS)):
            raise RunError(f"'{out}' holds a run already; continue it with --resume, or choose another output_dir")
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"cannot create output_dir '{out}': {error}") from None
        return None
    if not (out / CONFIG).is_file():
        raise RunError(f"there is nothing to resume in '{out}': it has no {CONFIG}; start without --resume")
    if key := difference(RunConfig.from_file(out / CONFIG), config):
        raise RunError(f"'{out}' holds a run with another {key}; resume it as it was, or choose another output_dir")
    return None if last is None else str(last)


def _last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that was written to its end: the trainer's state comes last."""
    steps = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")}
    numbered = {path: int(step) for path, step in steps.items() if step.isdecimal()}  # checkpoint-old is the user's own
    for path in sorted(numbered, key=numbered.__getitem__, reverse=True):
        try:
            json.loads((path / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return path
    return None
