"""`peft-core train`: one run from its configuration to the saved adapter, on `AdapterTrainer`.

In `output_dir`: the adapter with its model card, `metrics.json`, `loss.png`, `run.yaml` (the configuration with its
defaults), and `checkpoints/`, from which an interrupted run is resumed. Pre-training leaves the model that it started
from in `base/`; without an adapter, `output_dir` itself is the trained model's checkpoint.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from torch import nn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, TrainerState

from . import files, jobs, models, pretrain, records, reporting
from .attach import attach
from .batches import Examples, LikeLengths
from .checkpoint import HEADER
from .errors import listed, suggestion
from .jobs import Job
from .runs import RunConfig, RunError, difference
from .spec import AdapterSpec
from .targets import named
from .trainer import AdapterTrainer

_CHECKPOINTS, _CONFIG, _METRICS = "checkpoints", "run.yaml", "metrics.json"
_OPTIMIZERS = {"adamw": "adamw_torch", "adafactor": "adafactor", "sgd": "sgd"}
_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


@dataclass(frozen=True)
class TrainReport:
    """What a run measured. Losses are in nats, per token or, for a classifier, per example; sizes in bytes.

    Attributes:
        truncated, dropped: examples that were cut to `max_length`; left out because nothing to learn was within it.
        evaluations: of the held-out rows: `step`, `loss` and, for a classifier, `accuracy`. The first is before training.
        result: the evaluation of what was saved; None without held-out rows.
        seconds: of this process, without those before an interruption.
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
    peak_memory_bytes: int | None
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
        share = 100 * self.trainable_parameters / self.base_parameters
        rows = {
            "examples": f"{self.training_examples:,} to train, {self.held_out_examples:,} held out ({self.format})",
            "cut to the length": f"{self.truncated:,}, and {self.dropped:,} left out"
            if self.truncated or self.dropped
            else "none",
            "packed into rows": "" if self.packed_rows is None else f"{self.packed_rows:,}",
            "labels": ", ".join(self.labels),
            "trained in full": ", ".join(self.trained_modules),
            "trainable parameters": f"{self.trainable_parameters:,} ({share:.2f} % of the base)",
            "saved weights": f"{self.adapter_bytes / 1e6:.1f} MB",
            "steps": f"{self.steps:,} of {self.optimizer}, {self.seconds:.0f} s",
            "peak memory": "unknown" if self.peak_memory_bytes is None else f"{self.peak_memory_bytes / 1e9:.2f} GB",
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


def train(config: RunConfig, resume: bool = False, console: Console | None = None) -> TrainReport:
    """Train an adapter as a configuration says, and save it with what was measured.

    Args:
        resume: go on from the last checkpoint of the same configuration; the result is that of a run without the break.
        console: where progress is shown.

    Raises:
        PeftCoreError: of the kind that says what is wrong with the configuration, the data, the model or the run.
    """
    start = time.perf_counter()
    reporting.require("train", accelerate="the trainer", matplotlib="the loss curve")
    checkpoint = _start_or_resume(config, resume)
    held: list[records.Row] = []
    rows = records.read_rows(config.data.train, config.data.subset, config.data.split)
    kind = records.format_of(rows, config.data.format)
    if config.data.evaluation is not None:
        held = records.read_rows(config.data.evaluation, config.data.subset, config.data.evaluation_split)
    elif config.data.hold_out:
        rows, held = records.hold_out(rows, config.data.hold_out, config.training.seed)
    if config.training.best and not held:
        raise RunError("training.best needs held-out data: set data.evaluation or data.hold_out")
    if config.pretrain and kind != "text":
        raise RunError(f"pre-training reads texts, and these rows are {kind}s; give a column text alone")
    with models.quiet_transformers():
        based = _on_fresh_base(config, rows, checkpoint)
        job = jobs.classifier(based, rows, held) if kind == "label" else jobs.causal(based, kind, rows, held)
        return _run(config, kind, job, checkpoint, console, start)


def _on_fresh_base(config: RunConfig, rows: list[records.Row], checkpoint: str | None) -> RunConfig:
    """The run on the base that pre-training starts from, which is made unless the run has got beyond it."""
    if config.pretrain is None:
        return config
    path = config.output_dir / pretrain.BASE
    if checkpoint is None:
        path = pretrain.make_base(config, map(records.text_of, rows))
    return config.model_copy(update={"model": config.model.model_copy(update={"path": str(path)})})


def _run(
    config: RunConfig, kind: str, job: Job, checkpoint: str | None, console: Console | None, start: float
) -> TrainReport:
    out, model = config.output_dir, job.model
    dtype = str(model.dtype).removeprefix("torch.")
    subject = _FullModel(job) if job.spec is None else _Adapted(job.model, job.spec, config.training.seed)
    with reporting.progress_bar(console) as progress:
        trainer = subject.trainer(
            model=model,
            args=_arguments(config, job.evaluate is not None),
            train_dataset=Examples(job.examples),
            eval_dataset=Examples(()),
            data_collator=job.batch,
            compute_loss_func=job.loss,
            callbacks=[_Show(progress)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.lengths, trainer.figures = job.lengths, job.evaluate
        trainer.rates = _rates(config.training.module_lr, subject.in_full())
        evaluations = [{"step": 0.0, **trainer.measure()}] if job.evaluate else []
        if trainer.is_world_process_zero():
            files.write_text(out / _CONFIG, config.to_yaml())
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
        result = None
        if job.evaluate:
            step = float(state.best_global_step if config.training.best else state.global_step)
            measured = [entry for entry in evaluations if entry["step"] == step]
            result = measured[-1] if measured else {"step": step, **trainer.measure()}
    subject.save(out, trainer.is_world_process_zero())
    report = TrainReport(
        **subject.facts(),
        model=config.model.path,
        dtype=dtype,
        format=kind,
        labels=job.labels,
        training_examples=len(job.prepared.tokens),
        held_out_examples=len(job.held_out.tokens),
        truncated=job.prepared.truncated + job.held_out.truncated,
        dropped=job.prepared.dropped + job.held_out.dropped,
        packed_rows=len(job.examples) if job.packed else None,
        optimizer=type(getattr(trainer.optimizer, "optimizer", trainer.optimizer)).__name__,
        steps=state.global_step,
        seconds=time.perf_counter() - start,
        peak_memory_bytes=reporting.peak_memory(),
        adapter_bytes=sum(file.stat().st_size for file in out.glob("*.safetensors")),
        losses=[float(entry["loss"]) for entry in state.log_history if "loss" in entry],
        evaluations=evaluations,
        result=result,
        output_dir=str(out),
    )
    if trainer.is_world_process_zero():
        (out / _METRICS).write_text(report.to_json() + "\n", encoding="utf-8")
        curve = [(int(entry["step"]), entry["loss"]) for entry in evaluations]
        title = f"{report.method} on {report.model}"
        reporting.plot_losses(report.losses, out / "loss.png", title, evaluations=curve, unit=job.unit)
    return report


class _Measuring:
    """Before a trainer: draws examples of like length together, and measures what the job measures.

    Attributes:
        lengths: of the training examples. figures: see `Job.evaluate`.
        rates: id of a parameter → its learning rate, where that is not the run's.
    """

    args: Any
    state: Any
    control: Any
    callback_handler: Any
    log: Callable[[dict[str, float]], None]
    _load_from_checkpoint: Any
    lengths: Sequence[int] = ()
    figures: Callable[[], dict[str, float]] | None = None
    rates: Mapping[int, float] = {}

    def create_optimizer(self, model: Any = None) -> Any:
        """The trainer's own, with groups of their own for other learning rates."""
        optimizer = super().create_optimizer(model)  # type: ignore[misc]
        for group in list(optimizer.param_groups):
            by_rate: dict[float, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                by_rate.setdefault(self.rates.get(id(parameter), group["lr"]), []).append(parameter)
            group["params"] = by_rate.pop(group["lr"], [])
            for rate, parameters in by_rate.items():
                optimizer.add_param_group({**group, "params": parameters, "lr": rate})
        return optimizer

    def train(self, resume_from_checkpoint: str | None = None) -> None:
        """As the trainer's own, which would add a step to a run that had made its last one."""
        if resume_from_checkpoint is not None:
            folder = Path(resume_from_checkpoint)
            state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
            if state.global_step >= state.max_steps:
                best = state.best_model_checkpoint if self.args.load_best_model_at_end else None
                self.state = state
                self._load_from_checkpoint(best or resume_from_checkpoint)
                self.create_optimizer()
                return
        super().train(resume_from_checkpoint=resume_from_checkpoint)  # type: ignore[misc]

    def measure(self) -> dict[str, float]:
        """The figures of the model as it is."""
        assert self.figures is not None
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16):
            return self.figures()

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The job's own figures, which weigh every token alike."""
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.measure().items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return LikeLengths(self.lengths, self.args.train_batch_size, self.args.seed)


class _AdapterTrainer(_Measuring, AdapterTrainer):
    """Trains an adapter."""


class _FullTrainer(_Measuring, Trainer):  # type: ignore[misc]
    """Trains all of a model."""


class _Adapted:
    """What is trained: an adapter on the model."""

    trainer = _AdapterTrainer

    def __init__(self, model: nn.Module, spec: AdapterSpec, seed: int) -> None:
        self.adapter = attach(model, spec, seed=seed)

    def in_full(self) -> dict[str, list[nn.Parameter]]:
        """Paths of the modules that are trained in full, and what is trained of them."""
        parameters = dict(self.adapter.named_parameters())
        trained = self.adapter.plan.trained
        return {path: [parameters[key] for key in keys.values()] for path, keys in trained.items()}

    def facts(self) -> dict[str, Any]:
        """The fields of the report that tell of it."""
        made = self.adapter.plan
        return {
            "method": made.spec.method,
            "options": dict(made.spec.options),
            "trained_modules": list(made.trained),
            "trainable_parameters": self.adapter.num_trainable,
            "base_parameters": made.base.num_parameters,
        }

    def save(self, out: Path, first: bool) -> None:
        """Write it; every process of a run calls this, for its part of the weights."""
        self.adapter.save(out)


class _FullModel:
    """What is trained: all of the model."""

    trainer = _FullTrainer

    def __init__(self, job: Job) -> None:
        self.model, self.tokenizer = job.model, job.tokenizer

    def in_full(self) -> dict[str, list[nn.Parameter]]:
        """See `_Adapted.in_full`."""
        found = {path: list(module.parameters(recurse=False)) for path, module in self.model.named_modules()}
        return {path: parameters for path, parameters in found.items() if parameters}

    def facts(self) -> dict[str, Any]:
        """See `_Adapted.facts`."""
        size = self.model.num_parameters()
        return {
            "method": "full rank",
            "options": {},
            "trained_modules": [],
            "trainable_parameters": size,
            "base_parameters": size,
        }

    def save(self, out: Path, first: bool) -> None:
        """Write model and tokenizer, in the run's first process."""
        if first:
            self.model.save_pretrained(out)
            self.tokenizer.save_pretrained(out)


def _rates(asked: Mapping[str, float], modules: Mapping[str, Sequence[nn.Parameter]]) -> dict[int, float]:
    """Id of a parameter → its learning rate.

    Raises:
        RunError: no module that is trained in full has one of the names.
    """
    rates: dict[int, float] = {}
    for name, rate in asked.items():
        paths = [path for path in modules if named(name, path)]
        if not paths:
            known = sorted({path.rpartition(".")[2] for path in modules})
            raise RunError(
                f"training.module_lr: no module that is trained in full is named '{name}'{suggestion(name, known)}; "
                f"there are {listed(known) or 'none: name it in adapter.train_modules'}"
            )
        rates.update((id(parameter), rate) for path in paths for parameter in modules[path])
    return rates


class _Show(TrainerCallback):  # type: ignore[misc]
    """Moves the progress bar, and stops a run that has diverged."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.task = progress.add_task("training", total=None, note="")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update(self.task, total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        for name, shown in (("loss", "loss"), ("eval_loss", "held-out loss")):
            if name not in logs:
                continue
            if not math.isfinite(logs[name]):
                raise reporting.TrainingError(
                    f"the {shown} is {logs[name]} at step {state.global_step}; lower training.lr"
                )
            self.progress.update(self.task, note=f"{shown} {logs[name]:.3f}")


def _arguments(config: RunConfig, evaluates: bool) -> TrainingArguments:
    asked = config.training
    chosen: dict[str, Any] = {} if asked.optimizer == "auto" else {"optim": _OPTIMIZERS[asked.optimizer]}
    known = {field.name for field in fields(TrainingArguments)}
    renamed = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    chosen[renamed] = asked.checkpoint_activations
    return TrainingArguments(
        output_dir=str(config.output_dir / _CHECKPOINTS),
        num_train_epochs=asked.epochs or 1.0,
        max_steps=asked.steps or -1,
        per_device_train_batch_size=asked.batch_size,
        gradient_accumulation_steps=asked.accumulate,
        learning_rate=asked.lr,
        lr_scheduler_type=_SCHEDULES[asked.schedule],
        warmup_steps=asked.warmup,
        weight_decay=asked.weight_decay,
        max_grad_norm=asked.max_grad_norm,
        bf16=asked.autocast,
        eval_strategy="no" if not evaluates else "steps" if asked.evaluate_every else "epoch",
        eval_steps=asked.evaluate_every,
        save_strategy="steps" if asked.save_every else "epoch",
        save_steps=asked.save_every or 500,
        save_total_limit=asked.keep,
        load_best_model_at_end=asked.best,
        metric_for_best_model="loss" if asked.best else None,
        greater_is_better=False if asked.best else None,
        seed=asked.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        log_level="error",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=config.model.device == "cpu" or not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        **chosen,
    )


def _start_or_resume(config: RunConfig, resume: bool) -> str | None:
    """The checkpoint to go on from, or None to start.

    Raises:
        RunError: the directory holds a run that would be lost, or another one than is to be resumed.
    """
    out = config.output_dir
    last = _last_checkpoint(out / _CHECKPOINTS)
    if not resume:
        if last or any((out / name).exists() for name in (HEADER, _METRICS)):
            raise RunError(f"'{out}' holds a run already; go on with --resume, or choose another output_dir")
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"output_dir '{out}' cannot be made: {error}") from None
        return None
    if not (out / _CONFIG).is_file():
        raise RunError(f"there is nothing to resume in '{out}': it has no {_CONFIG}; start without --resume")
    stored = RunConfig.from_file(out / _CONFIG)
    if key := difference(stored, config):
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
