"""A run of `peft-core train`, from its configuration to the saved adapter; `directory` says what it leaves."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from rich.console import Console

from .. import models, reporting
from ..dtypes import name_of
from ..loading import quiet_transformers
from . import directory, pretrain
from .config import RunConfig, RunError
from .report import TrainReport
from .rows import Row, contents_of, format_of, hold_out, read_rows, text_of
from .tasks import Task, causal_task, classification_task
from .trainers import AdapterRunTrainer, FullRunTrainer


def train(config: RunConfig, resume: bool = False, console: Console | None = None) -> TrainReport:
    """Train an adapter as a configuration says, and save it with what was measured.

    Args:
        config: see RUN.yaml.
        resume: continue from the last checkpoint of the same configuration; the result is that of a run without a break.
        console: where progress is shown.

    Raises:
        PeftCoreError: of the kind that says what is wrong with the configuration, the data, the model or the run.
    """
    start = time.perf_counter()
    reporting.require("train", accelerate="the trainer", matplotlib="the loss curve")
    models.checked_device(config.model.used_device)
    checkpoint = directory.start_or_resume(config, resume)
    rows, held, kind, contents = _read(config)
    if checkpoint is not None:
        directory.check_data(config.output_dir, contents)
    if resume and console:
        where = (
            "the beginning, for want of a checkpoint" if checkpoint is None else f"step {checkpoint.rpartition('-')[2]}"
        )
        console.print(f"continuing from {where}")
    with quiet_transformers():
        based = _on_fresh_base(config, rows, checkpoint)
        task = classification_task(based, rows, held) if kind == "label" else causal_task(based, kind, rows, held)
        dtype = name_of(task.model.dtype)
        progress = reporting.progress_bar(console)
        trainer = (FullRunTrainer if task.spec is None else AdapterRunTrainer)(config, task, progress)
        with progress:
            evaluations, result = _trained(trainer, config, checkpoint, contents)
        with directory.writing(config):
            trainer.save_result(config.output_dir)
        history = trainer.state.log_history
        report = TrainReport(
            **trainer.facts(),
            model=config.model.path,
            dtype=dtype,
            format=kind,
            labels=list(task.classes),
            training_examples=len(task.training.tokens),
            held_out_examples=len(task.held_out.tokens),
            truncated=task.training.truncated + task.held_out.truncated,
            dropped=task.training.dropped + task.held_out.dropped,
            packed_rows=None if task.packed is None else len(task.packed),
            optimizer=type(getattr(trainer.optimizer, "optimizer", trainer.optimizer)).__name__,
            steps=trainer.state.global_step,
            seconds=time.perf_counter() - start + trainer.seconds_before,
            peak_memory_bytes=reporting.peak_memory(),
            adapter_bytes=sum(file.stat().st_size for file in config.output_dir.glob("*.safetensors")),
            losses=[float(entry["loss"]) for entry in history if "loss" in entry],
            evaluations=evaluations,
            result=result,
            output_dir=str(config.output_dir),
        )
        if trainer.is_world_process_zero():
            with directory.writing(config):
                _write(report, config, task)
    return report


class _Data(NamedTuple):
    """The rows to train on, the held-out rows, their format, and what tells them from others (see `directory.record`)."""

    rows: list[Row]
    held_out: list[Row]
    kind: str
    contents: dict[str, dict[str, Any]]


def _read(config: RunConfig) -> _Data:
    data, held_out = config.data, list[Row]()
    rows = read_rows(data.train, data.subset, data.split)
    kind = format_of(rows, data.format)
    contents = {"data.train": {"source": data.train, **contents_of(rows, kind)}}
    if data.evaluation is not None:
        held_out = read_rows(data.evaluation, data.subset, data.evaluation_split)
        contents["data.evaluation"] = {"source": data.evaluation, **contents_of(held_out, kind)}
    elif data.hold_out:
        rows, held_out = hold_out(rows, data.hold_out, config.training.seed)
    if config.training.best and not held_out:
        raise RunError("training.best needs held-out data: set data.evaluation or data.hold_out")
    if config.pretrain and kind != "text":
        raise RunError(f"pre-training reads texts, and these rows are {kind}s; give them a column 'text' and no other")
    return _Data(rows, held_out, kind, contents)


def _on_fresh_base(config: RunConfig, rows: list[Row], checkpoint: str | None) -> RunConfig:
    """The run on the base that pre-training starts from, which is created unless the run is already past that."""
    if config.pretrain is None:
        return config
    path = config.output_dir / pretrain.BASE
    if checkpoint is None:
        path = pretrain.make_base(config, map(text_of, rows))
    return config.model_copy(update={"model": config.model.model_copy(update={"path": str(path)})})


def _trained(
    trainer: AdapterRunTrainer | FullRunTrainer,
    config: RunConfig,
    checkpoint: str | None,
    contents: dict[str, dict[str, Any]],
) -> tuple[list[dict[str, float]], dict[str, float] | None]:
    """Train; the evaluations on the way, and the one of what is left in the model at the end."""
    measures = trainer.task.evaluate is not None
    evaluations = [{"step": 0.0, **trainer.measure()}] if measures else []
    if trainer.is_world_process_zero():
        with directory.writing(config):
            directory.record(config, contents)
    trainer.train(resume_from_checkpoint=checkpoint)
    state = trainer.state
    evaluations += [
        {
            name.removeprefix("eval_"): float(value)
            for name, value in entry.items()
            if name == "step" or name.startswith("eval_")
        }
        for entry in state.log_history
        if "eval_loss" in entry
    ]
    if not measures:
        return evaluations, None
    step = float(state.best_global_step if config.training.best else state.global_step)
    measured = [entry for entry in evaluations if entry["step"] == step]
    return evaluations, measured[-1] if measured else {"step": step, **trainer.measure()}


def _write(report: TrainReport, config: RunConfig, task: Task) -> None:
    out = config.output_dir
    (out / directory.METRICS).write_text(report.to_json() + "\n", encoding="utf-8")
    curve = [(int(entry["step"]), entry["loss"]) for entry in report.evaluations]
    title = f"{report.method} on {report.model}"
    reporting.plot_losses(report.losses, out / directory.CURVE, title, evaluations=curve, unit=task.unit)
