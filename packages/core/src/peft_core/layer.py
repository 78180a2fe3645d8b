"""The wrapper of a layer: a subclass of its own class, which the layer is given.

An adapted layer stays the module that it was, in its place, with its parameters and state-dict keys; only its class becomes
a subclass of its own. Where the base is a frozen dense layer, one autograd.Function computes the base product, lets every
active adapter add to the output in place, and in backward does the same for the input gradient (`fused`). Everywhere else the
base's own forward runs and the adapters' naive Δ(x) is added to it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import _torch, bases, fused, kernels
from .dropout import dropped
from .errors import AdapterError, PluginError
from .fused import Use
from .method import BASE_WEIGHT
from .registry import registry_of
from .slots import SLOT, Slot
from .subclassing import Mixin, plain_class, specialize

_PLAIN = (nn.Parameter, Tensor)


class AdaptedLinear(Mixin):
    """In front of an adapted layer's own class."""

    def forward(self, input: Tensor | None = None, *args: Any, x: Tensor | None = None, **kwargs: Any) -> Tensor:
        if args or kwargs:
            return _as_called(self, super().forward, input, args, x, kwargs)  # type: ignore[misc]
        x = _named(x) if input is None else input
        slot: Slot = self.__dict__[SLOT]
        if slot.dense is not None:
            return _dense(self, slot, x)
        if not slot.active:
            return super().forward(x)  # type: ignore[misc,no-any-return]
        uses = slot.uses()
        if slot.fused and _paired(slot):
            y = _fused(self, slot, uses, x)
            if y is not None:
                return y
        return add_to(self, slot, uses, x, super().forward(x))  # type: ignore[misc]

    def _load_from_state_dict(self: Any, *args: Any, **kwargs: Any) -> None:
        """As the layer's own; its adapters hear of it."""
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[misc]
        slot: Slot = self.__dict__[SLOT]
        banks = registry_of(slot.root).banks
        for member in slot.members.values():
            banks[member.adapter].loaded_into(self, member.site)


class HookedLinear(AdaptedLinear):
    """For a layer whose instance has a `forward` of its own (Accelerate's hooks): that one runs, adapters are added to it."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        slot: Slot = self.__dict__[SLOT]
        hooked = "forward" in self.__dict__
        if hooked and slot.dense is not None:  # where the hook has put the layer
            return _dense(self, slot, _input(self, args, kwargs).to(self.weight.device))
        y: Tensor = nn.Module.__call__(self, *args, **kwargs)
        return add_to(self, slot, slot.uses(), _input(self, args, kwargs), y) if hooked and slot.active else y


def _as_called(
    module: Any, base: Callable[..., Tensor], input: Tensor | None, args: Any, x: Tensor | None, kwargs: dict[str, Any]
) -> Tensor:
    """A layer whose own forward takes more than its input, or gives it another name: it is called as the caller did."""
    args = args if input is None else (input, *args)
    kwargs = kwargs if x is None else {"x": x, **kwargs}
    y = base(*args, **kwargs)
    slot: Slot = module.__dict__[SLOT]
    return add_to(module, slot, slot.uses(), _input(module, args, kwargs), y) if slot.active else y


def _input(module: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    """A layer's input among what it is called with: the first argument, whatever its own forward calls that."""
    if args:
        return args[0]  # type: ignore[no-any-return]
    bound = inspect.signature(plain_class(type(module)).forward).bind(module, **kwargs)
    return list(bound.arguments.values())[1]  # type: ignore[no-any-return]


def _named(x: Tensor | None) -> Tensor:
    """The input, given by the name that Conv1D has for it (Linear's is `input`)."""
    if x is None:
        raise TypeError("forward() is missing its argument 'input'")
    return x


def adapt(module: nn.Module, root: nn.Module) -> Slot:
    """Make this layer of a model an adapted one. Returns its slot, which has no adapters yet."""
    base = bases.describe(module)
    assert base is not None
    specialize(module, HookedLinear if "forward" in module.__dict__ else AdaptedLinear)
    slot = module.__dict__[SLOT] = Slot(root, base.transposed, base.fused)
    return slot


def add_to(module: Any, slot: Slot, uses: list[Use], x: Tensor, y: Tensor) -> Tensor:
    """The path for bases that cannot be fused: what the active adapters add to the base's output.

    Raises:
        AdapterError: the base's own forward returns something else than one tensor, or one that is divided between processes.
        PluginError: a Δ(x) of another shape.
    """
    if not isinstance(y, Tensor):
        kind, path = plain_class(type(module)).__name__, slot.active[0][0].site.path
        raise AdapterError(
            f"'{path}' is a {kind}, whose forward returns {type(y).__name__} instead of a tensor, so no Δ can be added; "
            "exclude it"
        )
    if hasattr(y, "device_mesh"):
        raise AdapterError(
            f"'{slot.active[0][0].site.path}' is divided by tensor parallelism, which adapters cannot follow; exclude it, or use "
            "FSDP2"
        )
    if _paired(slot):
        with torch.autocast(x.device.type, enabled=False):
            return fused.delta(x.to(y.dtype), y, uses, module.training)
    for use in uses:
        tensors = use.tensors if use.additive else {**use.tensors, BASE_WEIGHT: _base_weight(module, slot)}
        inner = dropped(x, use.dropout) if use.dropout and module.training else x
        delta = use.functions.naive(inner, tensors, use.binding)
        if not (torch.compiler.is_compiling() or _torch.is_tracing()):  # there, sizes may be symbols and tensors
            _check_delta(delta, y, use.where)
        y = y + (delta if use.scale == 1.0 else delta * use.scale).to(y.dtype)
    return y


def _check_delta(delta: Any, y: Tensor, where: str) -> None:
    if not isinstance(delta, Tensor) or delta.shape != y.shape:
        got = list(delta.shape) if isinstance(delta, Tensor) else f"{delta!r:.80}"
        raise PluginError(f"{where}: naive must return Δ(x) of shape {list(y.shape)}, got {got}")


def _paired(slot: Slot) -> bool:
    """Whether the methods' accumulating pairs are to be used, and all have one. Transforms of functions need autograd."""
    return (
        slot.paired
        and not torch.compiler.is_compiling()
        and kernels.chosen() != "naive"
        and not _torch.transforms_functions()
        and not _torch.forward_mode()
        and not _torch.is_tracing()
    )


def seen_weight(module: Any) -> Tensor:
    """The weight (out × in) that a layer computes with: its own, or the dense one that stands in for a quantized one into which
    an adapter is merged.
    """
    dense = getattr(module.__dict__.get(SLOT), "dense", None)
    return dense if dense is not None else bases.dense_weight(module)


def _base_weight(module: Any, slot: Slot) -> Tensor:
    held = module._parameters.get("weight")
    if held is not None and held.requires_grad and slot.dense is None:  # trained as well: part of its gradient is Δ's
        return held.T if slot.transposed else held  # type: ignore[no-any-return]
    weight = seen_weight(module)
    if weight.device.type == "meta":
        member = slot.active[0][0]
        raise AdapterError(
            f"'{member.site.path}': the weight is offloaded, and method '{member.method}' reads it at every forward; "
            "load the model without offloading this layer, or exclude it"
        )
    return weight


def _dense(module: Any, slot: Slot, x: Tensor) -> Tensor:
    """A quantized layer into which an adapter is merged: its dense weight stands in for the packed one."""
    weight = slot.dense
    assert weight is not None
    if weight.device != x.device:  # no parameter: moving the model leaves it behind
        weight = slot.dense = weight.to(x.device)
    y = nn.functional.linear(x.to(weight.dtype), weight, None if module.bias is None else module.bias.to(weight.dtype))
    return add_to(module, slot, slot.uses(), x, y.to(x.dtype)) if slot.active else y.to(x.dtype)


def _fused(module: Any, slot: Slot, uses: list[Use], x: Tensor) -> Tensor | None:
    """Base and adapters in one function, or None where the base must compute its part by itself.

    This runs at every layer of every step, between products that push Python's own data out of the caches: what is not
    asked for here costs nothing there.
    """
    held = module._parameters  # a weight or bias that is none of these is computed by somebody (a parametrization)
    weight, bias, device = held.get("weight"), held.get("bias"), x.device
    if (
        type(weight) not in _PLAIN
        or "bias" not in held
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
        or weight.device != device
        or weight.is_meta
    ):
        return None
    autocast = torch.is_autocast_enabled(device.type) and weight.dtype is not torch.float64  # which it leaves alone
    if x.dtype != weight.dtype and not autocast:
        return None
    if x.shape[-1] != (expected := weight.shape[0 if slot.transposed else 1]):
        raise AdapterError(f"the input has {x.shape[-1]} features, the adapted layer expects {expected}")
    dropout = slot.drops and module.training
    if not autocast:
        return fused.linear(x, weight, bias, slot.transposed, uses, dropout)
    dtype = torch.get_autocast_dtype(device.type)
    x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(device.type, enabled=False):
        return fused.linear(x, weight, bias, slot.transposed, uses, dropout)
