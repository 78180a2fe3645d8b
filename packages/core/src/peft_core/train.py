"""`peft-core train`: one run from its configuration to the saved adapter, on `AdapterTrainer`.

In `output_dir`: the adapter with its model card, `metrics.json`, `loss.png`, `run.yaml` (the configuration with its
defaults), and `checkpoints/`, from which an interrupted run is resumed. Pre-training leaves the model that it started
from in `base/`; without an adapter, `output_dir` itself is the trained model's checkpoint.
"""

from __future__ import annotations

import inspect
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console, Group
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset, Sampler
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback

from . import models, pretrain, records, training
from .attach import Adapter, attach
from .checkpoint import HEADER
from .data import IGNORED, Tokens, collate
from .errors import ModelError, listed, suggestion
from .records import Prepared
from .runs import RunConfig, RunError, difference
from .spec import DTYPES, AdapterSpec
from .targets import named
from .trainer import AdapterTrainer

_CHECKPOINTS, _CONFIG, _METRICS = "checkpoints", "run.yaml", "metrics.json"
_FULL = "full rank"
_OPTIMIZERS = {"adamw": "adamw_torch", "adafactor": "adafactor", "sgd": "sgd"}
_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
_Batch = dict[str, Any]


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
    training.require_matplotlib()
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
    with models._quiet_transformers():
        based = _on_fresh_base(config, rows, checkpoint)
        job = _classifier(based, rows, held) if kind == "label" else _causal(based, kind, rows, held)
        return _run(config, kind, job, checkpoint, console, start)


@dataclass
class _Job:
    """A model and its examples, whatever the task.

    Attributes:
        spec: of the adapter; None: all of the model is trained.
        examples: what the trainer draws from; `lengths` of each in tokens. batch: makes a batch of some of them.
        evaluate: the model's figures on the held-out examples; None without any. loss: instead of the model's own.
    """

    model: Any
    tokenizer: Any
    spec: AdapterSpec | None
    prepared: Prepared
    held_out: Prepared
    examples: Sequence[Any]
    lengths: list[int]
    batch: Callable[[Sequence[Any]], _Batch]
    evaluate: Callable[[], dict[str, float]] | None
    labels: list[str]
    unit: str
    loss: Callable[..., Tensor] | None = None
    packed: bool = False


def _on_fresh_base(config: RunConfig, rows: list[records.Row], checkpoint: str | None) -> RunConfig:
    """The run on the base that pre-training starts from, which is made unless the run has got beyond it."""
    if config.pretrain is None:
        return config
    path = config.output_dir / pretrain.BASE
    if checkpoint is None:
        path = pretrain.make_base(config, map(records.text_of, rows))
    return config.model_copy(update={"model": config.model.model_copy(update={"path": str(path)})})


def _causal(config: RunConfig, kind: str, rows: list[records.Row], held: list[records.Row]) -> _Job:
    model, tokenizer = models.load_base(config.model.path, _dtype(config), "cpu")
    length = _max_length(config, model, tokenizer)

    def prepare(some: list[records.Row]) -> Prepared:
        if config.pretrain:
            return records.prepare_stream(some, tokenizer, length)
        return records.prepare_causal(some, kind, tokenizer, length)

    prepared, held_out = prepare(rows), prepare(held) if held else Prepared(())
    pad = int(tokenizer.pad_token_id)
    examples: Sequence[Any] = prepared.tokens
    batch: Callable[[Sequence[Any]], _Batch] = _CausalBatch(model, pad)
    if config.data.packing:
        model.config.use_cache = False  # as in training; beside a cache, transformers looks for no packed rows
        _check_packing(model, prepared.tokens)
        examples, batch = records.pack(prepared.tokens, length), _PackedBatch(pad)
    evaluate = None
    if held_out.tokens:
        size = 2 * config.training.batch_size

        def evaluate() -> dict[str, float]:
            return {"loss": training.evaluate(model, held_out.tokens, pad, size)}

    return _Job(
        model,
        tokenizer,
        _spec(config, ()),
        prepared,
        held_out,
        examples,
        [_length(example) for example in examples],
        batch,
        evaluate,
        labels=[],
        unit="nats per token",
        packed=config.data.packing,
    )


def _classifier(config: RunConfig, rows: list[records.Row], held: list[records.Row]) -> _Job:
    if config.data.packing:
        raise RunError("data.packing is for causal language models; a classifier reads one text at a time")
    classes = records.classes_of(rows)
    path = models.base_path(config.model.path)
    set_seed(config.training.seed)
    try:
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            path,
            dtype=_dtype(config),
            num_labels=len(classes),
            id2label=dict(enumerate(classes)),
            label2id={name: number for number, name in enumerate(classes)},
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # another head than the one of a finished classifier
        )
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"cannot load {config.model.path} as a sequence classifier: {models._first_line(error)}"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.get_text_config().pad_token_id is None:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    length = _max_length(config, model, tokenizer)
    prepared = records.prepare_labelled(rows, classes, tokenizer, length)
    held_out = records.prepare_labelled(held, classes, tokenizer, length) if held else Prepared(())
    fresh = [*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])]
    batch = _LabelledBatch(tokenizer)
    evaluate = None
    if held_out.tokens:
        size = 2 * config.training.batch_size
        shown = sorted(zip(held_out.tokens, held_out.classes, strict=True), key=lambda pair: len(pair[0].input_ids))
        batches = [shown[at : at + size] for at in range(0, len(shown), size)]

        def evaluate() -> dict[str, float]:
            return _accuracy(model, [batch(some) for some in batches])

    return _Job(
        model,
        tokenizer,
        _spec(config, sorted({key.rpartition(".")[0] for key in fresh})),
        prepared,
        held_out,
        list(zip(prepared.tokens, prepared.classes, strict=True)),
        [len(tokens.input_ids) for tokens in prepared.tokens],
        batch,
        evaluate,
        labels=classes,
        unit="nats per example",
        loss=_class_loss,
    )


def _run(
    config: RunConfig, kind: str, job: _Job, checkpoint: str | None, console: Console | None, start: float
) -> TrainReport:
    out, model = config.output_dir, job.model
    dtype = str(model.dtype).removeprefix("torch.")
    adapter = None if job.spec is None else attach(model, job.spec, seed=config.training.seed)
    with training.progress_bar(console) as progress:
        trainer = (_FullTrainer if adapter is None else _AdapterTrainer)(
            model=model,
            args=_arguments(config, job.evaluate is not None),
            train_dataset=_Examples(job.examples),
            eval_dataset=_Examples(()),
            data_collator=job.batch,
            compute_loss_func=job.loss,
            callbacks=[_Show(progress)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.lengths, trainer.figures = job.lengths, job.evaluate
        trainer.rates = _rates(config.training.module_lr, _in_full(model, adapter))
        evaluations = [{"step": 0.0, **trainer.measure()}] if job.evaluate else []
        if trainer.is_world_process_zero():
            (out / _CONFIG).write_text(config.to_yaml(), encoding="utf-8")
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
    if adapter is not None:
        adapter.save(out)
    elif trainer.is_world_process_zero():
        model.save_pretrained(out)
        job.tokenizer.save_pretrained(out)
    size = model.num_parameters() if adapter is None else adapter.plan.base.num_parameters
    report = TrainReport(
        method=_FULL if adapter is None else adapter.plan.spec.method,
        options={} if adapter is None else dict(adapter.plan.spec.options),
        model=config.model.path,
        dtype=dtype,
        format=kind,
        labels=job.labels,
        training_examples=len(job.prepared.tokens),
        held_out_examples=len(job.held_out.tokens),
        truncated=job.prepared.truncated + job.held_out.truncated,
        dropped=job.prepared.dropped + job.held_out.dropped,
        packed_rows=len(job.examples) if job.packed else None,
        trained_modules=[] if adapter is None else list(adapter.plan.trained),
        trainable_parameters=size if adapter is None else adapter.num_trainable,
        base_parameters=size,
        optimizer=type(getattr(trainer.optimizer, "optimizer", trainer.optimizer)).__name__,
        steps=state.global_step,
        seconds=time.perf_counter() - start,
        peak_memory_bytes=training.peak_memory(),
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
        training.plot_losses(report.losses, out / "loss.png", title, evaluations=curve, unit=job.unit)
    return report


class _Measuring:
    """Before a trainer: draws examples of like length together, and measures what the job measures.

    Attributes:
        lengths: of the training examples. figures: see `_Job.evaluate`.
        rates: id of a parameter → its learning rate, where that is not the run's.
    """

    args: Any
    state: Any
    control: Any
    callback_handler: Any
    log: Callable[[dict[str, float]], None]
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
        return _LikeLengths(self.lengths, self.args.train_batch_size, self.args.seed)


class _AdapterTrainer(_Measuring, AdapterTrainer):
    """Trains an adapter."""


class _FullTrainer(_Measuring, Trainer):  # type: ignore[misc]
    """Trains all of a model."""


def _in_full(model: nn.Module, adapter: Adapter | None) -> dict[str, list[nn.Parameter]]:
    """Paths of the modules that are trained in full, and what is trained of them."""
    if adapter is None:
        found = {path: list(module.parameters(recurse=False)) for path, module in model.named_modules()}
        return {path: parameters for path, parameters in found.items() if parameters}
    parameters = dict(adapter.named_parameters())
    return {path: [parameters[key] for key in keys.values()] for path, keys in adapter.plan.trained.items()}


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


class _LikeLengths(Sampler[int]):
    """An order by (seed, epoch) in which batches hold examples of like length: half of a step would be padding otherwise."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, window: int = 16) -> None:
        self.lengths, self.batch_size, self.seed, self.window, self.epoch = lengths, batch_size, seed, window, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        draws = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=draws).tolist()
        batches: list[list[int]] = []
        for start in range(0, len(order), self.window * self.batch_size):
            chunk = sorted(
                order[start : start + self.window * self.batch_size], key=lambda number: self.lengths[number]
            )
            batches += [chunk[at : at + self.batch_size] for at in range(0, len(chunk), self.batch_size)]
        rest = batches.pop() if len(batches[-1]) < self.batch_size else []
        for number in torch.randperm(len(batches), generator=draws).tolist():
            yield from batches[number]
        yield from rest


class _Examples(Dataset[Any]):
    def __init__(self, examples: Sequence[Any]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, number: int) -> Any:
        return self.examples[number]


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
                raise training.TrainingError(
                    f"the {shown} is {logs[name]} at step {state.global_step}; lower training.lr"
                )
            self.progress.update(self.task, note=f"{shown} {logs[name]:.3f}")


class _CausalBatch:
    """Padded on the left, so that logits are needed for the last positions only, if the model can leave out others."""

    def __init__(self, model: nn.Module, pad: int) -> None:
        self.known, self.pad = set(inspect.signature(model.forward).parameters), pad

    def __call__(self, examples: Sequence[Tokens]) -> _Batch:
        batch: _Batch = collate(examples, self.pad)
        labels = batch["labels"]
        if "logits_to_keep" in self.known:
            first = int((labels != IGNORED).any(0).nonzero()[0])
            kept = labels.shape[1] - first + 1  # a label is predicted one position earlier
            batch.update(labels=labels[:, -kept:], logits_to_keep=kept)
        return {name: value for name, value in batch.items() if name in self.known}


class _PackedBatch:
    """Rows of several examples: positions start anew with each, by which transformers keeps them apart."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, rows: Sequence[Sequence[Tokens]]) -> _Batch:
        length = max(map(_length, rows))
        ids = torch.full((len(rows), length), self.pad)
        labels = torch.full((len(rows), length), IGNORED)
        positions = torch.zeros((len(rows), length), dtype=torch.long)
        for number, row in enumerate(rows):
            at = 0
            for tokens in row:
                end = at + len(tokens.input_ids)
                ids[number, at:end] = torch.tensor(tokens.input_ids)
                labels[number, at + 1 : end] = torch.tensor(
                    tokens.labels[1:]
                )  # the first has no predecessor of its own
                positions[number, at:end] = torch.arange(end - at)
                at = end
            positions[number, at:] = torch.arange(length - at)
        return {"input_ids": ids, "position_ids": positions, "labels": labels}


class _LabelledBatch:
    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, examples: Sequence[tuple[Tokens, int]]) -> _Batch:
        padded = self.tokenizer.pad({"input_ids": [tokens.input_ids for tokens, _ in examples]}, return_tensors="pt")
        return {**padded, "labels": torch.tensor([number for _, number in examples])}


def _class_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Mean over all examples of a step, however they are divided into forward passes."""
    total = cross_entropy(outputs.logits.float(), labels, reduction="sum")
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


@torch.no_grad()
def _accuracy(model: Any, batches: Sequence[_Batch]) -> dict[str, float]:
    was_training = model.training
    model.eval()
    loss, right, count = 0.0, 0, 0
    for batch in batches:
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        labels = batch.pop("labels")
        logits = model(**batch).logits.float()
        loss += cross_entropy(logits, labels, reduction="sum").item()
        right += int((logits.argmax(-1) == labels).sum())
        count += len(labels)
    model.train(was_training)
    return {"loss": loss / count, "accuracy": right / count}


@torch.no_grad()
def _check_packing(model: Any, examples: Sequence[Tokens]) -> None:
    """Refuse an architecture that lets an example see the one before it in its row."""
    remedy = "set data.packing to false"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise RunError(
            f"{type(model).__name__} takes no position_ids, by which packed examples are kept apart; {remedy}"
        )
    first, second = (Tokens(tokens.input_ids[:32], tokens.labels[:32]) for tokens in (examples[0], examples[-1]))

    def logits(row: list[Tokens]) -> Tensor:
        batch = _PackedBatch(0)([row])
        found: Tensor = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
        return found[0].float()

    mine, expected = logits([first, second])[len(first.input_ids) :], logits([second])
    off = ((mine - expected).norm() / expected.norm()).item()
    if off > (1e-4 if model.dtype == torch.float32 else 3e-2):
        raise RunError(
            f"{type(model).__name__} lets packed examples see each other (logits are off by {off:.1%}); {remedy}"
        )


def _arguments(config: RunConfig, evaluates: bool) -> TrainingArguments:
    asked = config.training
    chosen = {} if asked.optimizer == "auto" else {"optim": _OPTIMIZERS[asked.optimizer]}
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
        activation_checkpointing=asked.checkpoint_activations,
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
    try:
        stored = RunConfig.from_data(
            yaml.safe_load((out / _CONFIG).read_text(encoding="utf-8")), what=str(out / _CONFIG)
        )
    except FileNotFoundError:
        raise RunError(f"there is nothing to resume in '{out}': it has no {_CONFIG}; start without --resume") from None
    if key := difference(stored, config):
        raise RunError(f"'{out}' holds a run with another {key}; resume it as it was, or choose another output_dir")
    return None if last is None else str(last)


def _last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that was written to its end: the trainer's state comes last."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in found:
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return path
    return None


def _spec(config: RunConfig, fresh: Sequence[str]) -> AdapterSpec | None:
    """The adapter's spec, if there is one. Modules that the checkpoint has no weights for are trained in full, or they
    would stay random.
    """
    spec = config.adapter
    if spec is None:
        return None
    more = [name for name in fresh if not any(f".{there}." in f".{name}." for there in spec.train_modules)]
    fields = {**spec.model_dump(), "train_modules": (*spec.train_modules, *more)}
    return AdapterSpec(**{**fields, "base_model": spec.base_model or config.model.path})


def _dtype(config: RunConfig) -> torch.dtype:
    if config.model.dtype != "auto":
        return DTYPES[config.model.dtype]
    try:
        found = AutoConfig.from_pretrained(models.base_path(config.model.path))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load {config.model.path}: {models._first_line(error)}") from error
    device = "cuda" if config.model.device == "auto" and torch.cuda.is_available() else "cpu"
    stored = getattr(found, "dtype", None) or getattr(found.get_text_config(), "dtype", None)
    return models.fast_dtype(device) if stored in (torch.bfloat16, torch.float16) else torch.float32


def _max_length(config: RunConfig, model: Any, tokenizer: Any) -> int:
    """Tokens of the longest example: as asked for, if both model and tokenizer can take it."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limit = min(int(positions or 10**9), int(min(tokenizer.model_max_length, 10**9)))
    if (config.data.max_length or 0) > limit:
        raise RunError(
            f"data.max_length: {config.data.max_length} is more than the {limit} tokens that the model can take"
        )
    return config.data.max_length or min(512, limit)


def _length(example: Tokens | Sequence[Tokens]) -> int:
    return len(example.input_ids) if isinstance(example, Tokens) else sum(map(_length, example))
