"""The optimizer-step seam: nobody calls a method's step hook by hand.

torch calls our two hooks around the step of every optimizer in the process. Ours look whether the optimizer holds
parameters of an adapter whose method asked for it; everything else passes at the cost of a glance.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from . import bases, plugins
from .bank import Bank
from .errors import OptimizerStepError
from .merge import owned_weight
from .method import OptimizerStep, StepMember

WARN_AFTER = 256
_banks: weakref.WeakSet[Bank] = weakref.WeakSet()
_open: dict[int, list[tuple[Bank, OptimizerStep, Any]]] = {}


def watch(bank: Bank) -> None:
    """See to it that every real optimizer step on this adapter's parameters reaches its method."""
    if not bank.plan.spec.capabilities.optimizer_step:
        return
    _install()
    _banks.add(bank)
    _, first = next(bank.named_parameters())
    first.register_post_accumulate_grad_hook(functools.partial(_gradient_came, weakref.ref(bank)))


def forget(bank: Bank) -> None:
    """Stop watching."""
    _banks.discard(bank)


def check_stepped(bank: Bank) -> None:
    """Refuse to go on as if training had happened.

    Raises:
        OptimizerStepError: gradients came, but no optimizer ever stepped the adapter's parameters.
    """
    if bank in _banks and bank.backwards and not bank.stepped_by:
        raise OptimizerStepError(
            f"adapter '{bank.name}': {bank.backwards} gradients came, but no optimizer stepped its parameters, "
            f"which method '{bank.plan.spec.method}' needs; give adapter.parameters() to the optimizer after attaching"
        )


@functools.cache
def _install() -> None:
    register_optimizer_step_pre_hook(_before)
    register_optimizer_step_post_hook(_after)


def _gradient_came(reference: weakref.ref[Bank], _: Tensor) -> None:
    bank = reference()
    if bank is None:
        return
    bank.backwards += 1
    bank.fresh_gradient = True
    if bank.backwards == WARN_AFTER and not bank.stepped_by:
        warnings.warn(
            f"adapter '{bank.name}': {WARN_AFTER} gradients came without one optimizer step on its parameters, "
            f"which method '{bank.plan.spec.method}' needs",
            stacklevel=2,
        )


def _before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _open.pop(id(optimizer), None)  # of a step that failed
    if not _banks or _skipped(optimizer):
        return
    opened = _open.setdefault(id(optimizer), [])
    for bank, members in _served(optimizer):
        if args[1:] or kwargs.get("closure") is not None:
            raise OptimizerStepError(
                f"adapter '{bank.name}': method '{bank.plan.spec.method}' needs the gradients before the optimizer steps; "
                "call backward first and step() without a closure"
            )
        step = OptimizerStep(
            adapter=bank.name,
            index=_index(bank, optimizer),
            total_steps=bank.total_steps,
            seed=bank.seed,
            optimizer=optimizer,
            loss_scale=_number(getattr(optimizer, "grad_scale", None), 1.0),
            members=members,
        )
        context = plugins.call(bank.plan.spec.method, "peft_optimizer_step", step=step)
        context.__enter__()
        _write_back(bank, step)
        opened.append((bank, step, context))


def _after(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for bank, step, context in reversed(_open.pop(id(optimizer), [])):
        context.__exit__(None, None, None)
        _write_back(bank, step)
        bank.steps = step.index + 1
        bank.stepped_by.add(id(optimizer))
        bank.fresh_gradient = False


def _index(bank: Bank, optimizer: Optimizer) -> int:
    """The number of this logical step: a second optimizer that steps the same gradients belongs to the same one."""
    if bank.fresh_gradient or not bank.stepped_by:
        bank.stepped_by.clear()
        return bank.steps
    return bank.steps if id(optimizer) in bank.stepped_by else bank.steps - 1


def _served(optimizer: Optimizer) -> Iterator[tuple[Bank, list[StepMember]]]:
    """Adapters, and their sites, whose parameters this optimizer is about to step.

    Raises:
        OptimizerStepError: a site's parameters are divided between optimizers.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for bank in sorted(_banks, key=lambda bank: bank.name):
        if not any(id(p) in held and p.grad is not None for _, p in bank.named_parameters()):
            continue
        members = []
        for site in bank.plan.sites:
            tensors = bank.tensors(site.path)
            inside = [name for name, tensor in tensors.items() if id(tensor) in held]
            if not inside:
                continue
            if len(inside) < len(tensors):
                raise OptimizerStepError(
                    f"adapter '{bank.name}': the tensors of '{site.path}' are divided between optimizers "
                    f"({', '.join(inside)} here); give all of a site's tensors to one"
                )
            weight = owned_weight(bank, site) if site.path in bank.owned else None
            members.append(StepMember(site, tensors, bank.binding(site.path), bank.site_state(site.path), weight))
        yield bank, members


def _write_back(bank: Bank, step: OptimizerStep) -> None:
    """Round changed master weights into the base."""
    for member in step.members:
        if not member.weight_changed:
            continue
        member.weight_changed = False
        if bank.owned[member.site.path].master is not None and member.weight is not None:
            bases.write_weight(bank.root.get_submodule(member.site.path), member.weight, member.site.transposed)


def _skipped(optimizer: Optimizer) -> bool:
    """Whether a gradient scaler lets this optimizer skip inside (fused ones are called all the same)."""
    return _number(getattr(optimizer, "found_inf", None), 0.0) != 0.0


def _number(value: Any, default: float) -> float:
    if value is None:
        return default
    return float(value.item()) if isinstance(value, torch.Tensor) else float(value)
