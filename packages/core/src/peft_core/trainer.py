"""transformers' Trainer, and TRL's, for models with adapters: checkpoints hold adapters, and training resumes from them.

Everything else is the trainer's own: its arguments, its loop, and what else a checkpoint holds.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from .adapter import Adapter, adapters
from .bases import ROOT_PREFIX
from .errors import AdapterError, listed
from .optim import check_stepped
from .slots import SLOT

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

_ARGUMENTS_FILE = "training_args.bin"
# TRL's trainers that take no reference model, and load one by the base's name.
_LOAD_REFERENCES = {"GRPOTrainer", "RLOOTrainer"}


class AdapterTrainerMixin(_Base):  # type: ignore[misc]
    """Put this before a trainer that derives from transformers': `class T(AdapterTrainerMixin, SFTTrainer)`.

    The adapters in training are those that are trainable and active. A checkpoint holds them (one: in the checkpoint's
    directory itself, several: in a directory each below it) and what the trainer needs to continue: optimizer, scheduler,
    random states. `resume_from_checkpoint` and `load_best_model_at_end` load them back in place; a resumed run is bit for
    bit the run that was never stopped (as far as transformers repeats its batches), any other one begins anew. Each adapter
    is told how long its run is. A method's own optimizer, if it has one, is used unless the arguments name another than the
    default.

    A trainer that compares with a reference model (TRL's DPO) gets the model without the adapters in training as its
    reference, unless one is given: no second copy is loaded.

    Raises:
        AdapterError: no adapter is in training; something else is trainable (no checkpoint would hold it); an argument
            is not supported with adapters.
        OptimizerStepError: at the end of a run in which the method needed optimizer steps and none was seen.
        CheckpointError: a checkpoint's adapter is missing, damaged, or of another layout.
    """

    optimizer: Any
    restores_adapters = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        signature = inspect.signature(super().__init__)
        given = signature.bind_partial(*args, **kwargs)
        model = given.arguments.get("model")
        if model is not None and not isinstance(model, nn.Module):
            raise AdapterError(
                f"expected a model with an adapter attached, got {model!r}; load the model and attach one first"
            )
        if given.arguments.get("peft_config") is not None:
            raise AdapterError(
                "peft_config is for Hugging Face PEFT; remove it and attach an adapter with peft_core.attach"
            )
        if model is not None:
            settings: Any = given.arguments.get("args")
            _check_model(self, model, settings)
            if "ref_model" in signature.parameters and given.arguments.get("ref_model") is None:
                _check_reference(model, settings)
                given.arguments["ref_model"] = Reference(model)
            beta: Any = getattr(settings, "beta", 0)
            if beta and any(cls.__name__ in _LOAD_REFERENCES for cls in type(self).__mro__):
                raise AdapterError(
                    f"{type(self).__name__} with beta={beta:g} loads the base a second time as its reference, without "
                    "your other adapters; set beta=0"
                )
        values = [(p, p.data) for a in adapters(model).values() for p in a.parameters()] if model is not None else []
        super().__init__(*given.args, **given.kwargs)
        for parameter, value in values:
            if parameter.dtype != value.dtype:  # TRL rounds what is trained on a quantized base to bfloat16
                parameter.data = value.to(parameter.device)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise AdapterError("AdapterTrainer does not support DeepSpeed and FSDP; run it on one process or under DDP")
        if self.args.n_gpu > 1:
            raise AdapterError(
                "with several GPUs in one process, the trainer uses DataParallel, whose copies cannot look up an adapter's "
                "tensors; start with torchrun, or make one GPU visible with CUDA_VISIBLE_DEVICES"
            )
        self.add_callback(_AdapterCallback())

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's own."""
        if self.model_init is None:
            _check_model(self, self.model, self.args)
            _check_training(self.model, self.args)
        return super().train(*args, **kwargs)

    def call_model_init(self, trial: Any = None) -> Any:
        """As the trainer's own; the model must come with its adapter attached."""
        model = super().call_model_init(trial)
        _check_model(self, model, self.args)
        _check_training(model, self.args)
        return model

    def names_optimizer(self) -> bool:
        """Whether the arguments name an optimizer: another than their default."""
        return bool(self.args.optim != _default_optimizer(self.args))

    def create_optimizer(self, model: Any = None) -> Any:
        """As the trainer's own, but with the method's optimizer if it has one and the arguments name no other."""
        held = self.model if model is None else model
        chosen = self.optimizer is not None or self.optimizer_cls_and_kwargs is not None or self.names_optimizer()
        make = None if chosen else own_optimizer(in_training(held))
        if make is None:
            return super().create_optimizer(*([] if model is None else [model]))  # older trainers take none
        decaying = set(self.get_decay_parameter_names(held))
        trained = [(name, parameter) for name, parameter in held.named_parameters() if parameter.requires_grad]
        groups = [  # the trainer's own two, even where one is empty: a checkpoint can be resumed with either optimizer
            {
                "params": [parameter for name, parameter in trained if name in decaying],
                "weight_decay": self.args.weight_decay,
            },
            {"params": [parameter for name, parameter in trained if name not in decaying], "weight_decay": 0.0},
        ]
        self.optimizer = make(
            groups, lr=self.args.learning_rate, weight_decay=self.args.weight_decay, **self._adams(make)
        )
        return self.optimizer

    def _adams(self, make: Any) -> dict[str, Any]:
        """What the arguments say of AdamW, as far as the method's optimizer takes it."""
        args = self.args
        said: dict[str, Any] = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
        if "fused" in str(_default_optimizer(args)).lower():
            said["fused"] = True
        taken = inspect.signature(make).parameters
        return {name: value for name, value in said.items() if name in taken}

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """As the trainer's own; a trained copy of a norm or a bias counts as one."""
        decaying = set(super().get_decay_parameter_names(model))
        for adapter in adapters(model).values():
            stand_ins = adapter.bank.stand_ins.items()
            decaying -= {adapter.bank.root_name(key) for name, key in stand_ins if name not in decaying}
        return list(decaying)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapters in training, and the tokenizer, to `output_dir` (default: the arguments' own)."""
        self._save(output_dir)
        if _internal_call:  # other processes write into the directory, but not before it is in its place
            self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        directory = Path(output_dir or self.args.output_dir)
        _check_trainable(self.model)
        for adapter, place in _places(self.model, directory):
            adapter.save(place)
        if not self.args.should_save:
            return
        processor = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if processor is not None:
            processor.save_pretrained(directory)
        torch.save(self.args, os.path.join(directory, _ARGUMENTS_FILE))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        for adapter, place in _places(self.model, Path(resume_from_checkpoint)):
            adapter.restore(place)

    def _load_best_model(self) -> None:
        for adapter, place in _places(self.model, Path(self.state.best_model_checkpoint)):
            check_stepped(adapter.bank)
            adapter.restore(place)


class AdapterTrainer(AdapterTrainerMixin, Trainer):  # type: ignore[misc]
    """transformers' Trainer for a model with adapters. See `AdapterTrainerMixin`."""


class Reference(nn.Module):
    """A model without its adapters in training, as a model of its own to compare a policy with.

    It holds no weights. When it is called, it runs the model with those adapters off, and in evaluation mode if it is in
    that itself; other active adapters stay on.
    """

    policy: Any

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.__dict__["policy"] = model  # no child: its parameters are not the reference's

    @property
    def config(self) -> Any:
        """The model's."""
        return self.policy.config

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with without_training(self.policy), nullcontext() if self.training else _evaluating(self.policy):
            return self.policy(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The same as calling it."""
        return self(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's entries without those of the adapters in training."""
        mine = tuple(f"{ROOT_PREFIX}{adapter.name}/" for adapter in in_training(self.policy))
        return {key: value for key, value in self.policy.state_dict().items() if not key.startswith(mine)}


def in_training(model: nn.Module) -> list[Adapter]:
    """The model's adapters that are trainable and active."""
    return [
        adapter
        for adapter in adapters(model).values()
        if adapter.active and any(parameter.requires_grad for parameter in adapter.parameters())
    ]


@contextmanager
def without_training(model: nn.Module) -> Iterator[None]:
    """The model without its adapters in training."""
    with ExitStack() as stack:
        for adapter in in_training(model):
            stack.enter_context(adapter.disabled())
        yield


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode."""
    in_training_mode = [module for module in model.modules() if module.training]
    for module in in_training_mode:
        module.training = False
    try:
        yield
    finally:
        for module in in_training_mode:
            module.training = True


def own_optimizer(trained: Sequence[Adapter]) -> Any:
    """The optimizer that the adapters' methods bring, if any.

    Raises:
        AdapterError: two methods bring different ones.
    """
    found = {adapter.plan.spec.info.optimizer for adapter in trained} - {None}
    if len(found) > 1:
        methods = listed(sorted({a.plan.spec.method for a in trained if a.plan.spec.info.optimizer}))
        raise AdapterError(
            f"the methods {methods} bring different optimizers; choose one with optimizers=(yours, None)"
        )
    return next(iter(found), None)


class _AdapterCallback(TrainerCallback):  # type: ignore[misc]
    """Tells the adapters how long the run is, and checks at its end that the optimizer stepped them."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        length = state.max_steps or None
        for adapter in in_training(kwargs["model"]):
            if state.global_step:
                adapter.total_steps = length
            else:
                adapter.begin_run(length)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for adapter in in_training(kwargs["model"]):
            check_stepped(adapter.bank)


def _default_optimizer(args: Any) -> Any:
    return type(args).__dataclass_fields__["optim"].default


def _places(model: nn.Module, directory: Path) -> list[tuple[Adapter, Path]]:
    """Where a checkpoint directory holds the adapters in training."""
    found = in_training(model)
    return [(adapter, directory if len(found) == 1 else directory / adapter.name) for adapter in found]


def _check_trainable(model: nn.Module) -> None:
    if not in_training(model):
        raise AdapterError(
            f"none of the adapters ({listed(adapters(model))}) is both trainable and active: load with trainable=True, or "
            "activate the one to train"
        )


def _check_model(trainer: AdapterTrainerMixin, model: Any, args: Any) -> None:
    """What must hold of a model with adapters and a trainer's arguments, also where it is only evaluated."""
    found = in_training(model)
    if not adapters(model):
        raise AdapterError("the model has no adapter: attach one first, or use transformers' Trainer")
    ours = {id(parameter) for adapter in adapters(model).values() for parameter in adapter.parameters()}
    loose = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in ours]
    if loose:
        raise AdapterError(
            f"'{loose[0]}' is trainable but does not belong to an adapter, so no checkpoint would hold it; name its module "
            "in the spec's train_modules instead"
        )
    if getattr(args, "push_to_hub", False):
        raise AdapterError("push_to_hub is not supported for adapters; upload the saved directory")
    dropping = [adapter.name for adapter in found if adapter.plan.spec.dropout]
    if getattr(args, "disable_dropout", False) and dropping:
        raise AdapterError(
            f"adapter '{dropping[0]}' has dropout, which the argument disable_dropout does not disable; "
            "set dropout to 0 in its spec, or disable_dropout=False"
        )
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    bypassed = any(cls.__module__.split(".")[0] == "trl" for cls in type(trainer).__mro__)
    if (
        head is not None
        and bypassed
        and not {a.name for a in found}.isdisjoint(getattr(head.__dict__.get(SLOT), "members", ()))
    ):
        raise AdapterError(
            "the output head is adapted or trained in full, but TRL reads its weight without calling it, so nothing there "
            "would be trained; leave it out of targets and train_modules"
        )


def _check_reference(model: nn.Module, args: Any) -> None:
    if getattr(args, "sync_ref_model", False):
        raise AdapterError("sync_ref_model needs a separate reference model; pass ref_model=")
    owners = [a.name for a in in_training(model) if a.plan.spec.capabilities.owns_base_weight]
    if owners and not getattr(args, "precompute_ref_log_probs", False):
        raise AdapterError(
            f"adapter '{owners[0]}' has moved weight into the base, so the base cannot also serve as the reference; set "
            "precompute_ref_log_probs=True, or pass ref_model="
        )


def _check_training(model: Any, args: Any) -> None:
    """What must hold of them before training; makes reentrant checkpointing work."""
    _check_trainable(model)
    settings = getattr(args, "activation_checkpointing_kwargs", None) or getattr(
        args, "gradient_checkpointing_kwargs", None
    )
    if not (settings or {}).get("use_reentrant"):
        return
    shared = [a.name for a in in_training(model) if any(len(group.members) > 1 for group in a.plan.groups)]
    if shared and args.world_size > 1:
        raise AdapterError(
            f"adapter '{shared[0]}' shares tensors between layers, whose gradients reentrant checkpointing would hand to DDP in "
            "parts; set use_reentrant to False"
        )
    # It gives gradients only where an input has one, and the base's embeddings are frozen.
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
