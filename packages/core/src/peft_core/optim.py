"""The optimizer-step seam: nobody calls a method's step hook by hand.

torch calls our two hooks around the step of every optimizer in the process. Ours look whether the optimizer holds
parameters of an adapter whose method asked for it; everything else passes at the cost of a glance.
"""

from __future__ import annotations

import functools
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from copy import deepcopy
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.weak import WeakIdKeyDictionary

from . import plugins
from .bank import Bank
from .errors import OptimizerStepError
from .method import OptimizerStep, StepMember
from .registry import registry_of

WARN_AFTER = 256
_WRAPPERS = register_optimizer_step_pre_hook.__code__.co_filename  # torch's wrapper around `step` is in there
_watches: weakref.WeakKeyDictionary[Bank, _Watch] = weakref.WeakKeyDictionary()


def watch(bank: Bank) -> None:
    """See to it that every real optimizer step on this adapter's parameters reaches its method."""
    if not bank.plan.spec.capabilities.optimizer_step:
        return
    watched = registry_of(bank.root).watches[bank.name] = _Watch(bank)
    watched.hook_gradients()


def forget(bank: Bank) -> None:
    """Stop watching."""
    _watches.pop(bank, None)
    registry_of(bank.root).watches.pop(bank.name, None)


def check_stepped(bank: Bank) -> None:
    """Refuse to go on as if training had happened.

    Raises:
        OptimizerStepError: gradients came, but no optimizer ever stepped the adapter's parameters.
    """
    watched = _watches.get(bank)
    if watched is None:
        return
    watched.hook_gradients()
    if bank.progress.stepped_by:
        return
    if bank.progress.backwards or any(parameter.grad is not None for _, parameter in bank.named_parameters()):
        raise OptimizerStepError(
            f"adapter '{bank.name}' received gradients, but no optimizer stepped its parameters, which method "
            f"'{bank.plan.spec.method}' needs; give adapter.parameters() to the optimizer after attaching"
        )


class _Watch:
    """Notices the gradients of one adapter. The registry holds it, so that a copy of the model gets one of its own.

    The model of a `copied` bank may not be complete yet: its parameters are hooked later.
    """

    def __init__(self, bank: Bank, copied: bool = False) -> None:
        _register_hooks()
        self.bank = weakref.ref(bank)
        self.copied = copied
        self.hooked = WeakIdKeyDictionary()
        self.counted: weakref.ref[Tensor] | None = None
        _watches[bank] = self

    def hook_gradients(self) -> None:
        """Hook parameters that are not hooked yet: those of a copy, or set to train later."""
        bank = self.bank()
        assert bank is not None
        if self.copied:  # what came of the original's gradients says nothing of the copy's
            self.copied = False
            bank.progress.forget_gradients()
        for _, parameter in bank.named_parameters():
            if parameter.requires_grad and parameter.is_leaf and parameter not in self.hooked:
                self.hooked[parameter] = True
                parameter.register_post_accumulate_grad_hook(self.gradient_came)

    def gradient_came(self, parameter: Tensor) -> None:
        """One backward is counted once: at the parameter whose gradient was the first to come."""
        bank, counted = self.bank(), None if self.counted is None else self.counted()
        if bank is None:
            return
        if bank.progress.fresh_gradient and counted is not None and counted is not parameter:
            return  # nearly always: one of many
        if _watches.get(bank) is not self:
            return
        bank.progress.fresh_gradient = True
        if counted is None:
            self.counted = weakref.ref(parameter)
        elif counted is not parameter:
            return
        bank.progress.backwards += 1
        if bank.progress.backwards == WARN_AFTER and not bank.progress.stepped_by:
            warnings.warn(
                f"adapter '{bank.name}': {WARN_AFTER} backward passes without an optimizer step on its parameters, "
                f"which method '{bank.plan.spec.method}' needs",
                stacklevel=2,
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> _Watch:
        bank = self.bank()
        assert bank is not None
        return _Watch(deepcopy(bank, memo), copied=True)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Watch, (self.bank(), True)


class _Call(dict[str, Any]):
    """Keyword arguments of a step: torch's wrapper around it holds them until the step returns or fails, and nobody else."""


class _Running(NamedTuple):
    """An optimizer step under way.

    Attributes:
        frame: id of the frame of torch's wrapper around it, which calls both our hooks. call: what dies with that frame.
    """

    optimizer: Optimizer
    frame: int
    call: weakref.ref[_Call]
    served: list[tuple[Bank, OptimizerStep]]
    contexts: ExitStack


class _Local(threading.local):
    def __init__(self) -> None:
        self.running: list[_Running] = []


_local = _Local()


@functools.cache
def _register_hooks() -> None:
    # Here and not as decorators: the compiler takes seconds to import, and only who trains may need it.
    register_optimizer_step_pre_hook(torch.compiler.disable(_before))
    register_optimizer_step_post_hook(torch.compiler.disable(_after))


def _before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    if not _watches or _skipped(optimizer):
        return None
    _drop_failed()
    busy = {id(bank) for outer in _local.running for bank, _ in outer.served}
    served: list[tuple[Bank, OptimizerStep]] = []
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if (args[1] if len(args) > 1 else kwargs.get("closure")) is not None:
        _refuse_closure(held, busy)
    with ExitStack() as contexts:
        for bank, members in _served(held):
            if id(bank) in busy:  # a step within a step: a subclass that calls super().step(), a sharding wrapper
                continue
            _refuse_half_resumed(bank, optimizer)
            step = OptimizerStep(
                adapter=bank.name,
                index=_index(bank, optimizer),
                total_steps=bank.progress.total_steps,
                seed=bank.seed,
                optimizer=optimizer,
                loss_scale=_number(getattr(optimizer, "grad_scale", None), 1.0),
                members=members,
                run_start=bank.progress.run_start,
            )
            contexts.enter_context(plugins.call(bank.plan.spec.method, "peft_optimizer_step", step=step))
            _write_back(bank, step)
            served.append((bank, step))
        call = _Call(kwargs)
        ended = weakref.ref(call, _drop_failed)
        _local.running.append(_Running(optimizer, _frames()[0], ended, served, contexts.pop_all()))
    return args, call


def _after(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    mine = [step for step in _local.running if step.optimizer is optimizer]
    if not mine:
        return
    _local.running.remove(mine[-1])
    mine[-1].contexts.close()
    for bank, step in mine[-1].served:
        _write_back(bank, step)
        if step.index == bank.progress.steps:
            bank.progress.stepped_by.clear()
        bank.progress.stepped_by.add(id(optimizer))
        bank.progress.steps = step.index + 1
        bank.progress.fresh_gradient = False


def _drop_failed(_: object = None) -> None:
    """Forget steps that are no longer running, and with them what they held: the model, and the method's contexts."""
    frames = _frames()
    _local.running[:] = [outer for outer in _local.running if outer.frame in frames]


def _frames() -> list[int]:
    """Ids of the frames that are running, from torch's wrapper around the optimizer's step outwards."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != _WRAPPERS:
        frame = frame.f_back
    frames = []
    while frame is not None:
        frames.append(id(frame))
        frame = frame.f_back
    return frames


def _index(bank: Bank, optimizer: Optimizer) -> int:
    """The number of this logical step: a second optimizer that steps the same gradients belongs to the step of the first."""
    if bank.progress.fresh_gradient or not bank.progress.stepped_by or id(optimizer) in bank.progress.stepped_by:
        return bank.progress.steps
    return bank.progress.steps - 1


def _served(held: set[int]) -> Iterator[tuple[Bank, list[StepMember]]]:
    """Adapters, each with the sites whose parameters are about to be stepped.

    Args:
        held: ids of the parameters that the optimizer holds.

    Raises:
        OptimizerStepError: a site's parameters are divided between optimizers; an adapter that owns weights is merged, or one
            that needs training state has none.
    """
    for bank, parameters in _watched():
        if not any(id(p) in held and p.grad is not None for p in parameters):
            continue
        if bank.plan.state_bytes and not bank.state:
            raise OptimizerStepError(
                f"adapter '{bank.name}' was loaded without the training state of method '{bank.plan.spec.method}'; load it with "
                "trainable=True"
            )
        if bank.owned and registry_of(bank.root).is_merged(bank.name):
            raise OptimizerStepError(
                f"adapter '{bank.name}' is merged, and method '{bank.plan.spec.method}' changes the weight that it was merged "
                "into; unmerge it before the optimizer steps"
            )
        members = []
        for site in bank.plan.sites:
            tensors = bank.tensors(site.path)
            inside = [name for name, tensor in tensors.items() if id(tensor) in held]
            if not inside:
                continue
            if any(id(tensor) not in held and tensor.requires_grad for tensor in tensors.values()):
                raise OptimizerStepError(
                    f"adapter '{bank.name}': the tensors of '{site.path}' are split across optimizers "
                    f"({', '.join(inside)} here); give all of a site's tensors to one"
                )
            weight = bank.owned_weight(site) if site.path in bank.owned else None
            if weight is not None and hasattr(weight, "device_mesh"):
                raise OptimizerStepError(
                    f"adapter '{bank.name}': the weight of '{site.path}' is sharded, and method "
                    f"'{bank.plan.spec.method}' changes it as a whole; use DDP"
                )
            members.append(StepMember(site, tensors, bank.binding(site.path), bank.site_state(site.path), weight))
        if members:
            yield bank, members


def _watched() -> list[tuple[Bank, list[nn.Parameter]]]:
    """The adapters that are watched, by name, and their parameters. Meanwhile other threads attach and detach adapters."""
    found = []
    for bank in [bank for reference in _watches.keyrefs() if (bank := reference()) is not None]:
        try:
            if (watched := _watches.get(bank)) is not None:
                watched.hook_gradients()
                found.append((bank, [parameter for _, parameter in bank.named_parameters()]))
        except KeyError:  # its model no longer holds its parameters: detached this moment
            if bank in _watches:
                raise
    return sorted(found, key=lambda item: item[0].name)


def _refuse_closure(held: set[int], busy: set[int]) -> None:
    """Refuse a closure, which computes the gradients inside the step, for any adapter whose parameters the optimizer holds."""
    for bank, parameters in _watched():
        if id(bank) not in busy and any(id(p) in held and p.requires_grad for p in parameters):
            raise OptimizerStepError(
                f"adapter '{bank.name}': method '{bank.plan.spec.method}' needs the gradients before the optimizer "
                "steps; call backward first and step() without a closure"
            )


def _refuse_half_resumed(bank: Bank, optimizer: Optimizer) -> None:
    """An optimizer that has stepped these parameters before, and an adapter that has never been stepped: its own state
    (and its count of steps) was lost on the way.
    """
    if bank.progress.steps or bank.progress.stepped_by:
        return
    for _, parameter in bank.named_parameters():
        counted = optimizer.state.get(parameter, {}).get("step", 0)
        if torch.as_tensor(counted).max() > 0:
            raise OptimizerStepError(
                f"adapter '{bank.name}' was never stepped, but its optimizer was: the optimizer was resumed without the training "
                f"state of method '{bank.plan.spec.method}'; resume the adapter with load(..., trainable=True) or "
                "Adapter.restore, or make a new optimizer"
            )


def _write_back(bank: Bank, step: OptimizerStep) -> None:
    """Round master weights that the method changed into the base."""
    for member in step.members:
        if member.took_changes() and member.weight is not None and bank.owned[member.site.path].master is not None:
            bank.write_owned_weight(member.site, member.weight)


def _skipped(optimizer: Optimizer) -> bool:
    """Whether this optimizer skips the step inside, since a gradient scaler has told it of infinite gradients: fused ones are
    called all the same.
    """
    return _number(getattr(optimizer, "found_inf", None), 0.0) != 0.0


def _number(value: Any, default: float) -> float:
    if value is None:
        return default
    return float(value.item()) if isinstance(value, torch.Tensor) else float(value)
