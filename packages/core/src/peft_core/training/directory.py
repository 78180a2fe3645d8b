"""`output_dir`: what a run leaves there, and whether a run can start or resume in it.

The adapter with its model card, `metrics.json`, `loss.png`, `run.yaml` (the configuration with its defaults), `data.json`
(what tells the data from other data), and `checkpoints/`, from which an interrupted run is resumed. Pre-training leaves the
model that it started from in `base/`; without an adapter, `output_dir` itself is the trained model's checkpoint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from ..adapter_file import HEADER
from ..errors import CheckpointError, first_line, listed, reason
from ..files import write_text
from ..reporting import TrainingError
from .config import CONFIG, RunConfig, RunError, differences

CHECKPOINTS, DATA, METRICS, CURVE = "checkpoints", "data.json", "metrics.json", "loss.png"
_PROCESSES = "processes"


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
            raise RunError(f"cannot create output_dir '{out}': {reason(error)}") from None
        return None
    if not (out / CONFIG).is_file():
        raise RunError(f"there is nothing to resume in '{out}': it has no {CONFIG}; start without --resume")
    if changed := differences(RunConfig.from_file(out / CONFIG), config):
        raise RunError(
            f"'{out}' holds a run with another configuration: {listed(changed)}; resume it as it was, or choose another "
            "output_dir"
        )
    return None if last is None else str(last)


def record(config: RunConfig, data: Mapping[str, Mapping[str, Any]]) -> None:
    """Leave what resuming compares. `data`: key of the configuration → `source` and what `contents_of` its rows says."""
    write_text(config.output_dir / DATA, json.dumps({**data, _PROCESSES: _processes()}, indent=2) + "\n")
    movable = config.model_copy(update={"output_dir": Path()})  # relative to the file: the directory it lies in
    write_text(config.output_dir / CONFIG, movable.to_yaml())


def check_data(out: Path, data: Mapping[str, Mapping[str, Any]]) -> None:
    """Make sure that a run goes on with the data that it began with, divided among as many processes.

    With other rows, rows that were held out would be trained on, and with other labels, a head would get other classes. With
    another number of processes the batches would be others, and the steps so far would stand for other rows.

    Raises:
        RunError: names the file and what changed in it, or both numbers of processes.
    """
    try:
        before = json.loads((out / DATA).read_text(encoding="utf-8"))
        processes = int(before.get(_PROCESSES, _processes()))
        changes = {key: _changes(before[key], found) for key, found in data.items() if before[key] != found}
    except (OSError, ValueError, KeyError, TypeError):
        raise RunError(
            f"'{out / DATA}', which says what data the run began with, is missing or damaged; choose another output_dir"
        ) from None
    if changes:
        key, changed = next(iter(changes.items()))
        raise RunError(
            f"{key}: '{data[key]['source']}' has changed since the run in '{out}' began ({changed}); put it back as it "
            "was, or choose another output_dir"
        )
    if processes != _processes():
        raise RunError(
            f"the run in '{out}' was divided among {processes} processes, and this is one of {_processes()}; resume it with "
            f"{processes} (torchrun --nproc-per-node), or choose another output_dir"
        )


@contextmanager
def writing(config: RunConfig) -> Iterator[None]:
    """Around what is written into `output_dir`: a full disk, say, stops the run, and loses nothing of it.

    Raises:
        TrainingError: something could not be written.
    """
    try:
        yield
    except (OSError, RuntimeError, CheckpointError) as error:  # torch.save fails with a RuntimeError
        # So does waiting for a process that is gone.
        awaited = ", do all processes still run" if isinstance(error, RuntimeError) and _processes() > 1 else ""
        raise TrainingError(
            f"'{config.output_dir}' could not be written (is there room{awaited}?): {first_line(error)}; {config.go_on}"
        ) from error


def _processes() -> int:
    """As torchrun says it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    if before["rows"] != now["rows"]:
        return f"it had {before['rows']} rows, and has {now['rows']}"
    if before.get("labels") != now.get("labels"):
        return (
            f"its labels were {listed(before.get('labels', ['none']))}, and are {listed(now.get('labels', ['none']))}"
        )
    return f"it has {now['rows']} rows as before, with other values"


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
