"""transformers' Trainer and TRL's: checkpoints, resuming, the best model, what a plain Trainer does, and restoring in place."""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

import peft_core as pc
from peft_core.testing.checks import Snapshot, randomise, same_bits
from peft_core.testing.families import FAMILIES
from peft_core.trainer import Reference

pytestmark = pytest.mark.usefixtures("quiet")
LLAMA = FAMILIES["llama"]
INSTALLED = [(name, dict(info.trials[0])) for name, info in sorted(pc.methods().items())]
METHODS = [*INSTALLED, ("stepper", {}), ("stepper", {"owns": True})]
ADAPTER_FILES = {"README.md", "adapter.json", "adapter.safetensors"}
TRAINER_FILES = {"optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json", "training_args.bin"}


def rows(count: int = 24, length: int = 9) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(0, 60, (count, length), generator=generator)
    return [{"input_ids": ids, "labels": ids} for ids in drawn]


def settings(out: Path, **changed: Any) -> TrainingArguments:
    fields: dict[str, Any] = dict(
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        log_level="error",
    )
    return TrainingArguments(str(out), **{**fields, **changed})


def adapted(
    method: str = "stepper",
    options: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **fields: Any,
) -> tuple[nn.Module, pc.Adapter]:
    model = LLAMA.build(dtype=dtype)
    return model, pc.attach(model, pc.AdapterSpec(method=method, options=dict(options or {}), **fields), seed=seed)


def trained(
    model: nn.Module,
    out: Path,
    cls: type[Trainer] = pc.AdapterTrainer,
    resume: Path | None = None,
    **changed: Any,
) -> Trainer:
    trainer = cls(model=model, args=settings(out, **changed), train_dataset=rows(), eval_dataset=rows(6))
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def everything(adapter: pc.Adapter) -> dict[str, Tensor]:
    """All that training may change: parameters, training state, masters, and the base as it stands."""
    bank = adapter.bank
    masters = {f"master {path}": owned.master for path, owned in bank.owned.items() if owned.master is not None}
    return {
        **adapter.model.state_dict(),
        **{f"state {key}": value for key, value in bank.state.items()},
        **masters,
    }


def assert_same(one: pc.Adapter, other: pc.Adapter) -> None:
    here, there = everything(one), everything(other)
    assert here.keys() == there.keys()
    for key, value in here.items():
        assert same_bits(value, there[key]), f"'{key}' differs"
    assert one.steps == other.steps


# Checkpoints


def test_a_checkpoint_holds_the_adapter_and_what_the_trainer_needs(stepper: Any, tmp_path: Path) -> None:
    model, adapter = adapted()
    trained(model, tmp_path, save_strategy="steps", save_steps=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-8"]
    files = {path.name for path in (tmp_path / "checkpoint-8").iterdir()}
    assert files == ADAPTER_FILES | TRAINER_FILES | {"state.safetensors"}
    loaded = pc.load(LLAMA.build(), tmp_path / "checkpoint-8", trainable=True)
    assert_same(loaded, adapter)
    assert adapter.total_steps == 8 and adapter.steps == 8


def test_save_model(stepper: Any, tmp_path: Path, llama_directory: Path) -> None:
    model, adapter = adapted()
    trainer = pc.AdapterTrainer(
        model=model,
        args=settings(tmp_path / "run"),
        train_dataset=rows(),
        processing_class=AutoTokenizer.from_pretrained(llama_directory),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert_same(pc.load(LLAMA.build(), tmp_path / "saved", trainable=True), adapter)
    AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert not list(tmp_path.rglob("model*.safetensors"))


class Classifier(nn.Module):
    """No PreTrainedModel."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = nn.Linear(9, 12), nn.Linear(12, 2)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.trunk(input_ids.float() / 60).tanh())
        return {"loss": nn.functional.cross_entropy(logits, labels[:, 0] % 2), "logits": logits}


def classifier() -> tuple[nn.Module, pc.Adapter]:
    torch.manual_seed(0)
    model = Classifier()
    return model, pc.attach(model, pc.AdapterSpec(method="stepper", targets=["trunk"], train_modules=["head"]))


def test_a_second_run_begins_anew_and_resumes_where_it_was(stepper: Any, tmp_path: Path) -> None:
    model, adapter = adapted()
    trained(model, tmp_path / "first")
    adapter.save(tmp_path / "adapter")
    trained(model, tmp_path / "second", save_strategy="steps", save_steps=3)
    other = LLAMA.build()
    resumed = pc.load(other, tmp_path / "adapter", trainable=True)
    trained(other, tmp_path / "again", resume=tmp_path / "second" / "checkpoint-3")
    assert [(step.index, step.run_start) for step in stepper.steps] == [
        *((index, 0) for index in range(8)),
        *((index, 8) for index in range(8, 16)),
        *((index, 8) for index in range(11, 16)),
    ]
    assert {step.total_steps for step in stepper.steps} == {8}
    assert_same(resumed, adapter)


def test_a_model_that_is_not_transformers(stepper: Any, tmp_path: Path) -> None:
    model, adapter = classifier()
    trained(model, tmp_path, save_strategy="steps", save_steps=3)
    assert not list(tmp_path.rglob("model*"))
    again, resumed = classifier()
    trained(again, tmp_path / "again", resume=tmp_path / "checkpoint-3", save_strategy="steps", save_steps=3)
    assert_same(resumed, adapter)


def test_adapters_in_training_each_have_a_directory(stepper: Any, tmp_path: Path) -> None:
    def several() -> dict[str, pc.Adapter]:
        model = LLAMA.build()
        for name, target in (("frozen", "k_proj"), ("a", "q_proj"), ("b", "v_proj"), ("idle", "o_proj")):
            pc.attach(model, pc.AdapterSpec(method="stepper", targets=[target]), name=name, seed=len(name))
        for parameter in pc.adapters(model)["frozen"].parameters():
            parameter.requires_grad_(False)
        pc.activate(model, ["frozen", "a", "b"])
        return pc.adapters(model)

    found = several()
    trained(found["a"].model, tmp_path, save_strategy="steps", save_steps=4)
    folders = {path.name for path in (tmp_path / "checkpoint-4").iterdir() if path.is_dir()}
    assert folders == {"a", "b"}
    again = several()
    trained(
        again["a"].model,
        tmp_path / "again",
        resume=tmp_path / "checkpoint-4",
        save_strategy="steps",
        save_steps=4,
    )
    for name, adapter in found.items():
        assert_same(again[name], adapter)
    assert [adapter.steps for adapter in found.values()] == [0, 8, 8, 0]


# Resuming


@pytest.mark.parametrize("stop", [3, 6], ids=["in an epoch", "between epochs"])
@pytest.mark.parametrize(
    "method, options", METHODS, ids=lambda value: value if isinstance(value, str) else str(dict(value))
)
def test_resuming_is_never_having_stopped(
    method: str, options: dict[str, Any], stop: int, stepper: Any, tmp_path: Path
) -> None:
    can = pc.AdapterSpec(method=method, options=options).capabilities
    fields = {"dropout": 0.1 if can.dropout else 0.0}
    model, adapter = adapted(method, options, **fields)
    whole = trained(model, tmp_path, save_strategy="steps", save_steps=stop)
    again, resumed = adapted(method, options, seed=5, **fields)
    torch.manual_seed(123)
    rest = trained(
        again,
        tmp_path / "again",
        resume=tmp_path / f"checkpoint-{stop}",
        save_strategy="steps",
        save_steps=stop,
    )
    assert_same(resumed, adapter)
    assert losses(rest) == losses(whole) and len(losses(whole)) == 8


@pytest.mark.parametrize(
    "method, options", METHODS, ids=lambda value: value if isinstance(value, str) else str(dict(value))
)
def test_resuming_on_a_16_bit_base(method: str, options: dict[str, Any], stepper: Any, tmp_path: Path) -> None:
    """With accumulation, clipping, weight decay and adapter parameters of another dtype than the base."""
    changed = dict(
        gradient_accumulation_steps=2,
        max_grad_norm=0.1,
        weight_decay=0.1,
        save_strategy="steps",
        save_steps=2,
        max_steps=5,
    )
    model, adapter = adapted(method, options, torch.bfloat16)
    trained(model, tmp_path, **changed)
    again, resumed = adapted(method, options, torch.bfloat16)
    trained(again, tmp_path / "again", resume=tmp_path / "checkpoint-2", **changed)
    assert_same(resumed, adapter)
    assert not all(
        same_bits(one, other)
        for one, other in zip(adapted(method, options)[1].parameters(), adapter.parameters(), strict=True)
    )


def test_resuming_after_an_interruption(stepper: Any, tmp_path: Path) -> None:
    class Interrupt(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                raise KeyboardInterrupt

    model, adapter = adapted()
    trained(model, tmp_path / "whole", save_strategy="steps", save_steps=2)
    broken, _ = adapted()
    args = settings(tmp_path / "run", save_strategy="steps", save_steps=2)
    with pytest.raises(KeyboardInterrupt):
        pc.AdapterTrainer(model=broken, args=args, train_dataset=rows(), callbacks=[Interrupt()]).train()
    again, resumed = adapted()
    trainer = pc.AdapterTrainer(model=again, args=args, train_dataset=rows())
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 8
    assert_same(resumed, adapter)


def test_a_model_init_that_attaches(stepper: Any, tmp_path: Path) -> None:
    trainer = pc.AdapterTrainer(model_init=lambda: adapted()[0], args=settings(tmp_path), train_dataset=rows())
    trainer.train()
    model, adapter = adapted()
    trained(model, tmp_path)
    assert_same(pc.adapters(trainer.model)["default"], adapter)


def test_a_checkpoint_of_another_adapter_is_refused(stepper: Any, tmp_path: Path, refused: Any) -> None:
    model, _ = adapted()
    trained(model, tmp_path, save_strategy="steps", save_steps=8)
    other, adapter = adapted(options={"r": 3})
    before = everything(copy.deepcopy(adapter))
    with refused(pc.CheckpointError, "checkpoint-8", "another layout", "r 2 there and 3 here"):
        trained(other, tmp_path / "again", resume=tmp_path / "checkpoint-8")
    assert all(same_bits(value, before[key]) for key, value in everything(adapter).items())
    (tmp_path / "checkpoint-8" / "adapter.json").unlink()
    with refused(pc.CheckpointError, "checkpoint-8", "no adapter.json"):
        trained(model, tmp_path / "again", resume=tmp_path / "checkpoint-8")


# The best model


@pytest.mark.parametrize("options", [{}, {"owns": True}], ids=str)
def test_the_best_model_is_loaded_at_the_end(stepper: Any, options: dict[str, Any], tmp_path: Path) -> None:
    model, adapter = adapted(options=options)
    each = dict(save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2)
    trainer = trained(
        model,
        tmp_path,
        **each,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,
    )
    best = Path(trainer.state.best_model_checkpoint or "")
    assert best.name != "checkpoint-8"
    assert_same(pc.load(LLAMA.build(), best, trainable=True), adapter)
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric


def test_only_the_best_checkpoint_is_kept(stepper: Any, tmp_path: Path) -> None:
    model, _ = adapted()
    each = dict(save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, save_total_limit=1)
    trained(
        model,
        tmp_path,
        **each,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


# Optimizers


def test_the_methods_own_optimizer_is_used_unless_another_is_chosen(stepper: Any, tmp_path: Path) -> None:
    def optimizer(**changed: Any) -> torch.optim.Optimizer:
        model, adapter = adapted(train_modules=["lm_head", "norm"])
        made = pc.AdapterTrainer(
            model=model, args=settings(tmp_path, weight_decay=0.5, **changed), train_dataset=rows()
        ).create_optimizer()
        held = [parameter for group in made.param_groups for parameter in group["params"]]
        assert {id(p) for p in held} == {id(p) for p in adapter.parameters()}
        return made

    own = optimizer()
    assert type(own).__name__ == "StepperAdamW"
    assert [(group["lr"], group["weight_decay"]) for group in own.param_groups] == [(0.01, 0.5), (0.01, 0.0)]
    model, _ = adapted()
    plain = Trainer(model=model, args=settings(tmp_path), train_dataset=rows()).create_optimizer()
    assert own.param_groups[0]["fused"] == plain.param_groups[0]["fused"]  # as fast as the trainer's default
    assert type(optimizer(optim="sgd")).__name__ == "SGD"
    model, adapter = adapted()
    mine = torch.optim.Adam(adapter.parameters())
    trainer = pc.AdapterTrainer(model=model, args=settings(tmp_path), train_dataset=rows(), optimizers=(mine, None))
    assert trainer.create_optimizer() is mine


def test_the_methods_own_optimizer_is_told_what_adam_is_told(stepper: Any, tmp_path: Path) -> None:
    def made(cls: type[Trainer], **changed: Any) -> dict[str, Any]:
        args = settings(tmp_path, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6, **changed)
        return cls(model=adapted()[0], args=args, train_dataset=rows()).create_optimizer().defaults

    own, plain = made(pc.AdapterTrainer), made(Trainer)
    assert own["betas"] == plain["betas"] == (0.8, 0.95) and own["eps"] == plain["eps"] == 1e-6


def test_the_reference_has_a_mode_of_its_own(tmp_path: Path) -> None:
    """TRL puts it into evaluation mode once, and the policy into training mode for every step."""
    model = FAMILIES["gpt2"].build()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    adapter = pc.attach(model, pc.AdapterSpec(method="sound"))
    randomise(adapter)
    ids = rows(1)[0]["input_ids"][None]
    with adapter.disabled():
        expected = model.eval()(ids).logits
    reference = Reference(model).eval()
    model.train()
    model.lm_head.eval()
    assert same_bits(reference(ids).logits, expected)
    assert model.training and not model.lm_head.training and all(m.training for m in model.transformer.modules())
    model.eval()
    reference.train()
    assert same_bits(reference(ids).logits, expected)  # nobody has asked the policy for dropout


def test_a_run_whose_optimizer_never_steps_the_adapter_ends_in_an_error(stepper: Any, tmp_path: Path) -> None:
    model, _ = adapted()
    wrong = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    trainer = pc.AdapterTrainer(
        model=model, args=settings(tmp_path, max_steps=2), train_dataset=rows(), optimizers=(wrong, None)
    )
    with pytest.raises(pc.OptimizerStepError, match="received gradients, but no optimizer"):
        trainer.train()
    args = settings(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    trainer = pc.AdapterTrainer(model=model, args=args, train_dataset=rows(), optimizers=(wrong, None))
    with pytest.raises(pc.OptimizerStepError, match="no optimizer"):
        trainer.train()
    assert not list(tmp_path.rglob("adapter.json"))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(stepper: Any, reentrant: bool, tmp_path: Path) -> None:
    model, adapter = adapted()
    trained(model, tmp_path)
    again, other = adapted()
    known = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if known else "gradient_checkpointing"  # as it was called before
    trained(again, tmp_path, **{name: True, f"{name}_kwargs": {"use_reentrant": reentrant}})
    for one, two in zip(adapter.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two)


# What is refused


def test_models_without_an_adapter_in_training(stepper: Any, tmp_path: Path, refused: Any) -> None:
    def make(model: Any, **changed: Any) -> Any:
        return pc.AdapterTrainer(model=model, args=settings(tmp_path, **changed), train_dataset=rows())

    with refused(pc.AdapterError, "no adapter", "attach"):
        make(LLAMA.build())
    model, adapter = adapted()
    with refused(pc.AdapterError, "push_to_hub"):
        make(model, push_to_hub=True)
    for parameter in adapter.parameters():
        parameter.requires_grad_(False)
    trainer = make(model, eval_strategy="no")
    trainer.evaluate(rows())
    for use in (trainer.train, trainer.save_model):
        with refused(pc.AdapterError, "default", "trainable=True"):
            use()
    model, adapter = adapted()
    trainer = make(model)
    pc.activate(model, [])
    with refused(pc.AdapterError, "default", "active"):
        trainer.train()
    pc.activate(model, "default")
    model.lm_head.weight.requires_grad_(True)  # type: ignore[union-attr]
    with refused(pc.AdapterError, "'lm_head.weight'", "train_modules"):
        trainer.train()
    with refused(pc.AdapterError, "attach", "'some/model'"):
        make("some/model")


# A plain Trainer


def test_a_plain_trainer_trains_and_saves_the_adapter(stepper: Any, tmp_path: Path) -> None:
    model, adapter = adapted()
    trainer = trained(model, tmp_path, Trainer, save_strategy="steps", save_steps=4, optim="adamw_torch")
    assert {path.name for path in (tmp_path / "checkpoint-8").iterdir()} == ADAPTER_FILES | TRAINER_FILES | {
        "state.safetensors"
    }
    assert_same(pc.load(LLAMA.build(), tmp_path / "checkpoint-8", trainable=True), adapter)
    before = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(tmp_path / "saved"))
    loaded = pc.load(LLAMA.build(), tmp_path / "saved")
    assert Trainer(model=loaded.model, args=settings(tmp_path), eval_dataset=rows(6)).evaluate()["eval_loss"] == before
    own, same = adapted()
    trained(own, tmp_path, optim="adamw_torch")
    assert_same(same, adapter)


def test_a_plain_trainer_does_not_resume_without_the_adapter(stepper: Any, tmp_path: Path) -> None:
    """It finds no model in the checkpoint, and says so instead of going on with a fresh adapter."""
    model, _ = adapted()
    trained(model, tmp_path, Trainer, save_strategy="steps", save_steps=4)
    again, resumed = adapted()
    before = everything(copy.deepcopy(resumed))
    with pytest.raises(ValueError, match="Can't find a valid checkpoint"):
        trained(again, tmp_path, Trainer, resume=tmp_path / "checkpoint-4")
    assert all(same_bits(value, before[key]) for key, value in everything(resumed).items())
    trained(again, tmp_path, resume=tmp_path / "checkpoint-4")  # an AdapterTrainer goes on from it


def test_a_plain_trainer_that_would_not_find_its_best_model_is_refused(stepper: Any, tmp_path: Path) -> None:
    model, _ = adapted()
    each = dict(save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True)
    with pytest.raises(pc.AdapterError, match=r"Trainer cannot load an adapter back .* use peft_core\.AdapterTrainer"):
        trained(model, tmp_path, Trainer, **each)
    saving = model.save_pretrained  # as a decorator of some library would stand between the two
    model.save_pretrained = lambda *args, **options: saving(*args, **options)
    with pytest.raises(pc.AdapterError, match="Trainer cannot load an adapter back"):
        trained(model, tmp_path, Trainer, **each)


def test_a_user_saves_the_model_while_an_adapter_trainer_runs(stepper: Any, tmp_path: Path) -> None:
    class Saving(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            model.save_pretrained(tmp_path / "mine")

    model, _ = adapted()
    each = dict(save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True)
    args = settings(tmp_path / "run", **each)
    pc.AdapterTrainer(model, args, train_dataset=rows(), eval_dataset=rows(6), callbacks=[Saving()]).train()
    assert (tmp_path / "mine" / "adapter.json").is_file()


def test_a_plain_trainer_on_a_plain_module(stepper: Any, tmp_path: Path) -> None:
    """It saves the whole state dict, adapter included. What the method keeps beside it is missed at the first step."""
    model, adapter = classifier()
    each = dict(save_strategy="steps", save_steps=3)
    trained(model, tmp_path, Trainer, **each)
    held = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    assert {f"peft_core/default/{key.replace('.', '/')}" for key, _ in adapter.named_parameters()} <= held.keys()
    again, _ = classifier()
    with pytest.raises(
        pc.OptimizerStepError, match="optimizer was resumed without the training state of method 'stepper'"
    ):
        trained(again, tmp_path, Trainer, resume=tmp_path / "checkpoint-3", **each)


def test_a_plain_trainer_on_a_plain_module_resumes_a_method_without_state(tmp_path: Path) -> None:
    def made() -> tuple[nn.Module, pc.Adapter]:
        torch.manual_seed(0)
        model = Classifier()
        return model, pc.attach(model, pc.AdapterSpec(method="sound", targets=["trunk"], train_modules=["head"]))

    each = dict(save_strategy="steps", save_steps=3)
    model, adapter = made()
    trained(model, tmp_path, Trainer, **each)
    again, resumed = made()
    trained(again, tmp_path, Trainer, resume=tmp_path / "checkpoint-3", **each)
    assert_same(resumed, adapter)


# TRL


WORDS = [[f"w{(7 * row + 3 * place) % 40}" for place in range(6)] for row in range(16)]
FINE_TUNING = [{"prompt": " ".join(words[:3]), "completion": " " + " ".join(words[3:])} for words in WORDS]
PREFERENCES = [{**row, "chosen": row["completion"], "rejected": " w1 w2"} for row in FINE_TUNING]


class Trl:
    """TRL's trainers with the mixin, on the tiny Llama."""

    def __init__(self, tokenizer: Any) -> None:
        import trl

        self.tokenizer = tokenizer

        class SFT(pc.AdapterTrainerMixin, trl.SFTTrainer):  # type: ignore[misc]
            pass

        class DPO(pc.AdapterTrainerMixin, trl.DPOTrainer):  # type: ignore[misc]
            pass

        self.kinds = {"sft": (SFT, trl.SFTConfig), "dpo": (DPO, trl.DPOConfig)}

    def make(
        self, kind: str, model: nn.Module, out: Path, given: Mapping[str, Any] | None = None, **changed: Any
    ) -> Trainer:
        from datasets import Dataset

        cls, config = self.kinds[kind]
        data = (
            FINE_TUNING
            if kind == "sft"
            else [{k: v for k, v in row.items() if k != "completion"} for row in PREFERENCES]
        )
        fields = {**settings(out).to_dict(), **changed}
        names = "max_steps per_device_train_batch_size learning_rate save_strategy logging_steps report_to disable_tqdm use_cpu"
        kept = {name: fields[name] for name in [*names.split(), "dataloader_pin_memory", "log_level", *changed]}
        kept = {"activation_checkpointing": False, **kept}
        return cls(
            model=model,
            args=config(str(out), **kept),
            train_dataset=Dataset.from_list(data),
            processing_class=self.tokenizer,
            **(given or {}),
        )

    def train(self, kind: str, model: nn.Module, out: Path, resume: Path | None = None, **changed: Any) -> Trainer:
        trainer = self.make(kind, model, out, **changed)
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return trainer


@pytest.fixture
def trl(llama_directory: Path) -> Trl:
    return Trl(AutoTokenizer.from_pretrained(llama_directory))


def test_the_documented_trainer_of_trl(
    llama: nn.Module, llama_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import trl
    from datasets import Dataset

    page = (Path(__file__).resolve().parent.parent / "docs" / "coming-from-hf-peft.md").read_text(encoding="utf-8")
    code = page.partition("## Trainers")[2].partition("```python\n")[2].partition("```")[0]
    short = partial(trl.SFTConfig, max_steps=2, use_cpu=True, bf16=False, report_to="none")
    monkeypatch.setattr(trl, "SFTConfig", short)
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(llama_directory)
    given = {"model": llama, "tokenizer": tokenizer, "dataset": Dataset.from_list(FINE_TUNING)}
    exec(code.replace('method="miss"', 'method="sound"'), given)
    saved = pc.load(FAMILIES["llama"].build(), tmp_path / "my-adapter")
    assert all(
        torch.equal(mine, its) for mine, its in zip(saved.parameters(), given["adapter"].parameters(), strict=True)
    )
    assert (tmp_path / "out" / "checkpoint-2" / "adapter.json").is_file()


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_trls_trainers_resume(kind: str, trl: Trl, stepper: Any, tmp_path: Path) -> None:
    each = dict(max_steps=4, save_strategy="steps", save_steps=2)
    model, adapter = adapted()
    whole = trl.train(kind, model, tmp_path, **each)
    files = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert files >= ADAPTER_FILES | TRAINER_FILES and not any(name.startswith("model") for name in files)
    again, resumed = adapted(seed=5)
    rest = trl.train(kind, again, tmp_path / "again", resume=tmp_path / "checkpoint-2", **each)
    assert_same(resumed, adapter)
    assert losses(rest) == losses(whole)
    assert adapter.total_steps == 4 and type(whole.optimizer.optimizer).__name__ == "StepperAdamW"


def test_the_reference_of_dpo_is_the_model_without_the_adapter(
    trl: Trl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import trl.trainer.dpo_trainer as module

    def one(given: Mapping[str, Any] | None = None, **changed: Any) -> tuple[pc.Adapter, Trainer]:
        model, adapter = adapted("sound")
        randomise(adapter, std=0.05)
        before = Snapshot.of(LLAMA.build())
        trainer = trl.make("dpo", model, tmp_path, given, max_steps=3, **changed)
        trainer.train()
        before.assert_same_values(model)
        return adapter, trainer

    explicit, _ = one({"ref_model": LLAMA.build()})
    monkeypatch.setattr(module, "create_model_from_path", lambda *a, **k: pytest.fail("a second model was loaded"))
    adapter, trainer = one()
    assert_same(adapter, explicit)
    assert trainer.state.log_history[0]["rewards/margins"] != 0.0  # the adapter does not start at zero
    precomputed, _ = one(precompute_ref_log_probs=True)
    for ours, theirs in zip(precomputed.parameters(), explicit.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_an_adapter_that_is_not_trained_is_part_of_the_reference(trl: Trl, tmp_path: Path) -> None:
    def first() -> nn.Module:
        model, adapter = adapted("sound")
        randomise(adapter, seed=3)
        for parameter in adapter.parameters():
            parameter.requires_grad_(False)
        return model

    model = first()
    second = pc.attach(model, pc.AdapterSpec(method="sound", options={"r": 2}), name="second")
    pc.activate(model, ["default", "second"])
    trl.train("dpo", model, tmp_path, max_steps=3)
    again = first()
    other = pc.attach(again, pc.AdapterSpec(method="sound", options={"r": 2}), name="second")
    pc.activate(again, ["default", "second"])
    trl.make("dpo", again, tmp_path, {"ref_model": first()}, max_steps=3).train()
    assert_same(second, other)
    assert list(pc.adapters(model)) == ["default", "second"] and all(a.active for a in pc.adapters(model).values())


def test_what_trl_cannot_do_with_adapters(trl: Trl, stepper: Any, tmp_path: Path, refused: Any) -> None:
    for fields in ({"train_modules": ["lm_head"]}, {"targets": ["lm_head", "q_proj"]}):
        with refused(pc.AdapterError, "output head", "TRL"):
            trl.make("sft", adapted(**fields)[0], tmp_path)
    with refused(pc.AdapterError, "moved weight into the base", "precompute_ref_log_probs=True"):
        trl.make("dpo", adapted(options={"owns": True})[0], tmp_path)
    with refused(pc.AdapterError, "sync_ref_model", "ref_model="):
        trl.make("dpo", adapted()[0], tmp_path, sync_ref_model=True)
    with refused(pc.AdapterError, "disable_dropout", "'default'"):
        trl.make("dpo", adapted("sound", dropout=0.1)[0], tmp_path)
    with refused(pc.AdapterError, "peft_config", "peft_core.attach"):
        trl.make("sft", adapted()[0], tmp_path, {"peft_config": object()})


def test_a_method_that_owns_its_weights_trains_with_precomputed_references(
    trl: Trl, stepper: Any, tmp_path: Path
) -> None:
    model, adapter = adapted(options={"owns": True})
    trainer = trl.train("dpo", model, tmp_path, max_steps=3, precompute_ref_log_probs=True)
    assert losses(trainer)[0] == pytest.approx(0.6931, abs=1e-3)
    assert adapter.steps == 3


# Several processes


def _worker(rank: int, port: int, out: Path) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    from peft_core.testing.methods import register_sound

    register_sound()

    def run(where: Path, resume: Path | None = None) -> pc.Adapter:
        model, adapter = adapted("sound", dropout=0.1)
        each = dict(
            save_strategy="steps",
            save_steps=2,
            max_steps=4,
            per_device_train_batch_size=2,
            ddp_backend="gloo",
        )
        trained(model, where, resume=resume, **each)
        return adapter

    whole = run(out)
    resumed = run(out / "again", out / "checkpoint-2")
    assert_same(resumed, whole)
    torch.save([parameter.detach() for parameter in whole.parameters()], out / f"rank-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_resume(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_worker, (port, tmp_path), nprocs=2)
    one, two = (torch.load(tmp_path / f"rank-{rank}.pt") for rank in (0, 1))
    assert all(same_bits(a, b) for a, b in zip(one, two, strict=True))
    files = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert files >= ADAPTER_FILES | {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt"}


# Restoring in place


def test_restoring_takes_over_everything(stepper: Any, tmp_path: Path) -> None:
    for options in ({}, {"owns": True}):
        model, adapter = adapted(options=options, dtype=torch.bfloat16)
        trained(model, tmp_path / "run")
        adapter.save(tmp_path / "saved")
        again, other = adapted(options=options, dtype=torch.bfloat16, seed=9)
        held = {key: id(parameter) for key, parameter in other.named_parameters()}
        other.restore(tmp_path / "saved")
        assert_same(other, adapter)
        assert {key: id(parameter) for key, parameter in other.named_parameters()} == held
        assert other.bank.seed == 0
        with other.disabled():
            plain = LLAMA.build(dtype=torch.bfloat16).state_dict()
            assert all(same_bits(again.state_dict()[key], value) for key, value in plain.items())


def test_restoring_while_inactive(stepper: Any, tmp_path: Path) -> None:
    model, adapter = adapted(options={"owns": True})
    trained(model, tmp_path / "run")
    adapter.save(tmp_path / "saved")
    again, other = adapted(options={"owns": True})
    with other.disabled():
        before = Snapshot.of(LLAMA.build())
        other.restore(tmp_path / "saved")
        before.assert_same_values(again)
    assert_same(other, adapter)


def test_exchanging_adapters_in_place_compiles_nothing_anew(tmp_path: Path) -> None:
    saved, outputs = [], []
    ids = LLAMA.inputs()["input_ids"]
    for seed in (1, 2):
        model, adapter = adapted("sound", seed=seed)
        randomise(adapter, seed=seed)
        adapter.save(tmp_path / str(seed))
        saved.append(tmp_path / str(seed))
        outputs.append(model(ids).logits.detach())
    compiled: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(1)
        return graph.forward

    torch._dynamo.reset()
    model = LLAMA.build()
    adapter = pc.load(model, saved[0])
    quick = torch.compile(model, backend=backend)
    for number in (0, 1, 0, 1):
        adapter.restore(saved[number])
        torch.testing.assert_close(quick(ids).logits, outputs[number], rtol=1e-4, atol=1e-5)
    assert len(compiled) == 1
    torch._dynamo.reset()


def test_what_cannot_be_restored(stepper: Any, tmp_path: Path, refused: Any) -> None:
    _, adapter = adapted("sound")
    randomise(adapter)
    before = everything(copy.deepcopy(adapter))

    def saved(name: str, method: str = "sound", **fields: Any) -> Path:
        adapted(method, **fields)[1].save(tmp_path / name)
        return tmp_path / name

    cases: list[tuple[Path, type[pc.PeftCoreError], tuple[str, ...]]] = [
        (saved("method", "stepper"), pc.CheckpointError, ("'stepper'", "'sound'")),
        (saved("option", options={"alpha": 2.0}), pc.CheckpointError, ("alpha 2.0 there and 8.0 here",)),
        (saved("layers", targets=["q_proj"]), pc.CheckpointError, ("another layout", "absent there")),
        (
            saved("dtype", **{"dtype": torch.bfloat16}),
            pc.CheckpointError,
            ("dtype bfloat16 there and float32 here",),
        ),
        (saved("head", train_modules=["lm_head"]), pc.CheckpointError, ("lm_head", "absent here")),
        (tmp_path / "nowhere", pc.CheckpointError, ("does not exist",)),
    ]
    other = pc.attach(FAMILIES["bert"].build(), pc.AdapterSpec(method="sound"))
    other.save(tmp_path / "base")
    cases.append((tmp_path / "base", pc.CheckpointError, ("another base model",)))
    broken = saved("broken")
    (broken / "adapter.safetensors").write_bytes((broken / "adapter.safetensors").read_bytes()[:-8])
    cases.append((broken, pc.CheckpointError, ("SHA-256",)))
    for directory, error, words in cases:
        with refused(error, str(directory), *words):
            adapter.restore(directory)
        assert all(same_bits(value, before[key]) for key, value in everything(adapter).items()), directory
    adapter.merge()
    with refused(pc.AdapterError, "merged"):
        adapter.restore(saved("fine"))


# Importing


def test_core_does_not_import_the_trainer() -> None:
    code = "import sys, peft_core; assert 'transformers.trainer' not in sys.modules; assert 'accelerate' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'AdapterTrainr'"):
        pc.AdapterTrainr  # type: ignore[attr-defined]  # noqa: B018


def test_reentrant_checkpointing_of_shared_tensors_under_ddp_is_refused(
    stepper: Any, tmp_path: Path, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LLAMA.build()
    pc.attach(model, pc.AdapterSpec(method="sound", options={"r": 4}))
    args = settings(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    trainer = pc.AdapterTrainer(model=model, args=args, train_dataset=rows())
    monkeypatch.setattr(type(args), "world_size", 2)
    with refused(pc.AdapterError, "'default' shares tensors", "use_reentrant to False"):
        trainer.train()


def test_a_trainer_that_would_load_the_base_again_is_refused(stepper: Any, tmp_path: Path, refused: Any) -> None:
    class GRPOTrainer(pc.AdapterTrainer):
        pass

    model, _ = adapted()
    args = settings(tmp_path)
    args.beta = 0.1
    with refused(pc.AdapterError, "GRPOTrainer", "beta=0.1", "set beta=0"):
        GRPOTrainer(model=model, args=args, train_dataset=rows())
    args.beta = 0.0
    GRPOTrainer(model=model, args=args, train_dataset=rows())
