"""transformers' Trainer for a run: what it trains, its arguments, its figures of held-out examples, its progress."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, TrainerState

from ..attach import attach
from ..errors import listed, suggestion
from ..reporting import TrainingError
from ..sites import module_type
from ..targets import named
from ..trainer import AdapterTrainer
from .batches import LengthGroupedSampler
from .config import RunConfig, RunError
from .directory import CHECKPOINTS, writing
from .examples import length_of
from .tasks import Task

_OPTIMIZERS = {"adamw": "adamw_torch", "adafactor": "adafactor", "sgd": "sgd"}
_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


class _RunTrainer:
    """Put before a trainer: trains and measures a task as a configuration says.

    Args:
        in_full: path of a module that is trained in full → what is trained of it.

    Attributes:
        rates: id of a parameter → its learning rate, where that is not the run's.
        seconds_before: what the run took up to the checkpoint that it goes on from.
    """

    accelerator: Any
    args: Any
    model: Any
    state: Any
    control: Any
    callback_handler: Any
    remove_callback: Callable[[Any], None]
    is_world_process_zero: Callable[[], bool]
    _load_from_checkpoint: Any

    def __init__(
        self, config: RunConfig, task: Task, progress: Progress, in_full: Mapping[str, Sequence[nn.Parameter]]
    ) -> None:
        self.config, self.task = config, task
        self.use_cache = getattr(task.model.config, "use_cache", None)  # which the trainer changes
        self.examples: Sequence[Any] = task.training.tokens if task.packed is None else task.packed
        super().__init__(  # type: ignore[call-arg]
            model=task.model,
            args=_arguments(config, task.evaluate is not None),
            train_dataset=self.examples,
            eval_dataset=(),  # the task has its own
            data_collator=task.collator,
            compute_loss_func=task.loss,
            callbacks=[_ProgressCallback(progress)],
        )
        self.remove_callback(PrinterCallback)
        self.rates = _rates(config.training.module_lr, in_full)
        self.seconds_before, self.start = 0.0, time.perf_counter()

    def _save_rng_state(self, output_dir: str) -> None:
        """Every process writes its own; the trainer's state, which tells that a checkpoint is whole, comes after all of them."""
        super()._save_rng_state(output_dir)  # type: ignore[misc]
        self.accelerator.wait_for_everyone()

    def create_optimizer(self, model: Any = None) -> Any:
        """As the trainer's own, with further groups for other learning rates."""
        optimizer = super().create_optimizer(*([] if model is None else [model]))  # type: ignore[misc]
        for group in list(optimizer.param_groups):
            by_rate: dict[float, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                by_rate.setdefault(self.rates.get(id(parameter), group["lr"]), []).append(parameter)
            group["params"] = by_rate.pop(group["lr"], [])
            for rate, parameters in by_rate.items():
                optimizer.add_param_group({**group, "params": parameters, "lr": rate})
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As the trainer's own, but the warm-up, whose first learning rate is zero, never takes the whole run."""
        if self.args.get_warmup_steps(num_training_steps) >= num_training_steps:
            self.args.warmup_steps = num_training_steps - 1
        return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]

    def train(self, resume_from_checkpoint: str | None = None) -> None:
        """As the trainer's own, which would add a step to a run that had made its last one."""
        if resume_from_checkpoint is not None:
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint, TRAINER_STATE_NAME)))
            self.seconds_before = max((entry.get("seconds", 0.0) for entry in state.log_history), default=0.0)
            if state.global_step >= state.max_steps:
                self._restore_finished(state, resume_from_checkpoint)
                return
        super().train(resume_from_checkpoint=resume_from_checkpoint)  # type: ignore[misc]

    def _restore_finished(self, state: TrainerState, checkpoint: str) -> None:
        _find_best(state, self.args)
        best = state.best_model_checkpoint if self.args.load_best_model_at_end else None
        self.state = state
        self._load_from_checkpoint(best or checkpoint)
        self.create_optimizer()
        self.callback_handler.on_train_begin(self.args, state, self.control)

    def measure(self) -> dict[str, float]:
        """The figures of the model as it is."""
        assert self.task.evaluate is not None
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16):
            return self.task.evaluate()

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The task's own figures, in which every token weighs the same."""
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.measure().items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the trainer's own, with the seconds that the run has taken."""
        seconds = self.seconds_before + time.perf_counter() - self.start
        super().log({**logs, "seconds": seconds}, *args, **kwargs)  # type: ignore[misc]

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with writing(self.config):
            super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        lengths = list(map(length_of, self.examples))
        return LengthGroupedSampler(lengths, self.args.train_batch_size, self.args.seed)


class AdapterRunTrainer(_RunTrainer, AdapterTrainer):
    """Trains an adapter, which it attaches to the task's model."""

    def __init__(self, config: RunConfig, task: Task, progress: Progress) -> None:
        assert task.spec is not None
        self.adapter = attach(task.model, task.spec, seed=config.training.seed)
        parameters = dict(self.adapter.named_parameters())
        trained = self.adapter.plan.trained
        in_full = {path: [parameters[key] for key in keys.values()] for path, keys in trained.items()}
        super().__init__(config, task, progress, in_full)

    def names_optimizer(self) -> bool:
        """Whether the run names one, be it the trainer's default."""
        return self.config.training.optimizer != "auto"

    def facts(self) -> dict[str, Any]:
        """The fields of the report about what is trained."""
        plan = self.adapter.plan
        return {
            "method": plan.spec.method,
            "options": dict(plan.spec.options),
            "trained_modules": list(plan.trained),
            "trainable_parameters": self.adapter.num_trainable,
            "base_parameters": plan.base.num_parameters,
        }

    def save_result(self, directory: Path) -> None:
        """Write the adapter; every process of a run calls this, for its part of the weights."""
        self.adapter.save(directory)


class FullRunTrainer(_RunTrainer, Trainer):  # type: ignore[misc]
    """Trains all of the task's model."""

    def __init__(self, config: RunConfig, task: Task, progress: Progress) -> None:
        found = {path: list(module.parameters(recurse=False)) for path, module in task.model.named_modules()}
        super().__init__(config, task, progress, {path: parameters for path, parameters in found.items() if parameters})

    def facts(self) -> dict[str, Any]:
        """The fields of the report about what is trained."""
        size = self.task.model.num_parameters()
        return {
            "method": "full rank",
            "options": {},
            "trained_modules": [],
            "trainable_parameters": size,
            "base_parameters": size,
        }

    def save_result(self, directory: Path) -> None:
        """Write model and tokenizer, in the run's first process."""
        if self.is_world_process_zero():
            if self.use_cache is not None:
                self.task.model.config.use_cache = self.use_cache
            self.task.model.save_pretrained(directory)
            self.task.tokenizer.save_pretrained(directory)


class _ProgressCallback(TrainerCallback):  # type: ignore[misc]
    """Moves the progress bar, evaluates an epoch before a step's checkpoint, and stops a run that has diverged.

    It also tells the sampler its epoch.
    """

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.task = progress.add_task("training", total=None, note="")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _find_best(state, args)
        self.progress.update(self.task, total=state.max_steps, completed=state.global_step)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The trainer's own call does not reach it where several processes resume within an epoch: batches are skipped by a
        # loader around this one, and the run would go on in the order of the first epoch.
        kwargs["train_dataloader"].set_epoch(int(state.epoch))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update(self.task, completed=state.global_step)
        # The trainer would evaluate after the checkpoint, from which a run would go on without the evaluation.
        if args.eval_strategy == "epoch" and (state.epoch.is_integer() or state.global_step >= state.max_steps):
            control.should_evaluate = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if any("eval_loss" in entry and entry["step"] == state.global_step for entry in state.log_history):
            control.should_evaluate = False

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        for name, shown in (("loss", "loss"), ("eval_loss", "held-out loss")):
            if name not in logs:
                continue
            if not math.isfinite(logs[name]):
                raise TrainingError(f"the {shown} is {logs[name]} at step {state.global_step}; lower training.lr")
            self.progress.update(self.task, note=f"{shown} {logs[name]:.3f}")


def _find_best(state: Any, args: Any) -> None:
    """Let the best checkpoint be the one here: the directory may have been moved since."""
    if state.best_model_checkpoint is not None:
        state.best_model_checkpoint = str(Path(args.output_dir, Path(state.best_model_checkpoint).name))


def _rates(asked: Mapping[str, float], modules: Mapping[str, Sequence[nn.Parameter]]) -> dict[int, float]:
    """Id of a parameter → its learning rate, where that is not the run's.

    Raises:
        RunError: no module that is trained in full has one of the names.
    """
    rates: dict[int, float] = {}
    for name, rate in asked.items():
        paths = [path for path in modules if named(name, path)]
        if not paths:
            known = sorted(set(map(module_type, modules)))
            remedy = f"expected one of {listed(known)}" if known else "name it in adapter.train_modules"
            raise RunError(
                f"training.module_lr: no module named '{name}' is trained in full{suggestion(name, known)}; {remedy}"
            )
        rates.update((id(parameter), rate) for path in paths for parameter in modules[path])
    return rates


def _arguments(config: RunConfig, evaluates: bool) -> TrainingArguments:
    asked = config.training
    chosen: dict[str, Any] = {} if asked.optimizer == "auto" else {"optim": _OPTIMIZERS[asked.optimizer]}
    known = {field.name for field in fields(TrainingArguments)}
    renamed = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    chosen[renamed] = asked.checkpoint_activations
    return TrainingArguments(
        output_dir=str(config.output_dir / CHECKPOINTS),
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
        use_cpu=config.model.used_device == "cpu",
        dataloader_pin_memory=config.model.used_device not in ("cpu", "mps"),
        **chosen,
    )
