"""Base layers: what is known of each kind, how its weight is read and written as out × in, which parameters are its own."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .subclassing import Mixin, class_names

# Prefix of everything that an adapter registers on the root model; no module path can contain it.
ROOT_PREFIX = "peft_core/"

# Kinds of Linear, beside routers, whose forward gives more than x Wᵀ + b.
_NO_PRODUCT = ("DeepseekV4GroupedLinear", "IdeficsDecoupledLinear")


@dataclass(frozen=True)
class Base:
    """A layer that can be adapted.

    Attributes:
        in_features, out_features: logical sizes. transposed: the weight is stored in × out (transformers' Conv1D).
        fused: core may compute the layer's product itself. dtype: of the weight, once dequantized.
    """

    in_features: int
    out_features: int
    transposed: bool
    fused: bool
    dtype: torch.dtype


def own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) that the module itself holds, without those of adapters: its cost hardly grows with their number."""
    held = module._parameters
    for name in [name for name in held if ROOT_PREFIX not in name]:
        if (parameter := held[name]) is not None:
            yield name, parameter


def uninitialized(module: nn.Module) -> bool:
    """Whether this is a lazy layer that has seen no input."""
    return any(nn.parameter.is_lazy(parameter) for _, parameter in own_parameters(module))


def describe(module: nn.Module) -> Base | None:
    """What is known of this layer, or None if it is none that can be adapted."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    if _is_conv1d(module) and weight.dim() == 2 and hasattr(module, "nf"):
        return Base(weight.shape[0], weight.shape[1], True, True, weight.dtype)
    inside, outside = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if not (isinstance(inside, int) and isinstance(outside, int) and inside > 0 and outside > 0):
        return None
    if tuple(weight.shape) == (outside, inside) and weight.dtype.is_floating_point:
        plain = type(module).forward is nn.Linear.forward or _has_linear_forward(module)
        return Base(inside, outside, False, plain, weight.dtype)
    if is_quantized(module):
        return Base(inside, outside, False, False, _dequantized_dtype(module))
    return None


def gives_more(module: nn.Module) -> bool:
    """Whether this kind of Linear has a forward that gives something else than x Wᵀ + b: a router's, say."""
    known = any(name.endswith("Router") or name in _NO_PRODUCT for name in class_names(module))
    return known and not _has_linear_forward(module)


def _has_linear_forward(module: nn.Module) -> bool:
    """Whether this is a layer with nn.Linear's forward, whatever class of ours it has in front."""
    below = [cls for cls in type(module).__mro__ if not issubclass(cls, Mixin)]
    return next(cls for cls in below if "forward" in cls.__dict__) is nn.Linear


def is_quantized(module: nn.Module) -> bool:
    """Whether this is a bitsandbytes 4- or 8-bit layer."""
    return any(name in ("Linear4bit", "Linear8bitLt") for name in class_names(module))


def _is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D, which stores its weight in × out."""
    return "Conv1D" in class_names(module)


def packing(module: Any) -> str:
    """How a quantized layer is packed, in words."""
    kind = getattr(module.weight, "quant_type", None)
    return f"4-bit ({kind})" if kind else "8-bit"


def _dequantized_dtype(module: Any) -> torch.dtype:
    state = getattr(module.weight, "quant_state", None)
    if state is not None:
        return state.dtype  # type: ignore[no-any-return]
    return getattr(module, "compute_dtype", None) or torch.float16


def inside(model: nn.Module, paths: Iterable[str]) -> set[int]:
    """The ids of these modules and of all within them: a module may have several paths."""
    return {id(module) for path in paths for module in model.get_submodule(path).modules()}


def tied(model: nn.Module, names: Iterable[str], within: Iterable[str] = ()) -> dict[str, str]:
    """Name of a parameter → that of the same tensor in another module, beside those that lie `within` one of these."""
    names = list(names)
    if not names:
        return {}
    trained = inside(model, within)
    holders: dict[int, dict[int, str]] = {}  # parameter → module → name; a module may have several names itself
    for path, module in model.named_modules():
        for local, parameter in own_parameters(module):
            holders.setdefault(id(parameter), {})[id(module)] = f"{path}.{local}"
    found = {}
    for name in names:
        path, _, local = name.rpartition(".")
        mine = model.get_submodule(path)
        there = holders[id(mine.get_parameter(local))]
        if others := [other for module, other in there.items() if module != id(mine) and module not in trained]:
            found[name] = others[0]
    return found


def dense_weight(module: Any) -> Tensor:
    """The weight as out × in, dequantized if need be; a view of the parameter where possible."""
    if is_quantized(module):
        import bitsandbytes.functional as functional

        if getattr(module.weight, "quant_state", None) is not None:
            return functional.dequantize_4bit(*_unpacked(module))  # type: ignore[no-any-return]
        scales = module.state.SCB if module.state.SCB is not None else module.weight.SCB
        codes = module.state.CB if module.state.CB is not None else module.weight.data
        dense = codes.to(torch.float32) * (scales.to(torch.float32).unsqueeze(1) / 127)
        return dense.to(_dequantized_dtype(module))
    weight: Tensor = module.weight.detach()
    return weight.T if _is_conv1d(module) else weight


def unpack(module: Any) -> None:
    """Bring a 4-bit weight that a forward has packed for its CPU kernel back to the form that has a backward."""
    if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
        module.weight.data, state = _unpacked(module)
        module.weight.quant_state = module.quant_state = state


def _unpacked(module: Any) -> tuple[Tensor, Any]:
    """A 4-bit layer's codes and quant_state, not packed for the CPU."""
    codes, state = module.weight.data, module.weight.quant_state
    if not getattr(state, "packing_format_for_cpu", False):
        return codes, state
    import bitsandbytes.functional as functional

    scales = state.absmax.T.reshape(-1).float()  # bitsandbytes would leave them transposed, or quantize them once more
    codes, state = functional._convert_weight_packed_for_cpu_inverse(codes, copy.copy(state))
    state.absmax, state.nested = scales, False
    return codes, state


def write_weight(module: Any, weight: Tensor, transposed: bool) -> None:
    """Put this weight (out × in) into the layer's own parameter, in place, rounded to its dtype."""
    with torch.no_grad():
        module.weight.copy_(weight.T if transposed else weight)
