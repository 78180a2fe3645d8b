"""What an adapter's tensors start from: drawn by key, copied from the base, or computed from its weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .errors import AdapterError
from .layer import seen_weight
from .plan import Plan
from .sharing import FromBase, FromWeight, TensorSpec, as_declared, binding_key, draw


def tensor_devices(root: nn.Module, plan: Plan) -> dict[str, torch.device]:
    """Key of every tensor, trainable or fixed → where it belongs: the device of its first borrower."""
    out = {}
    for group in plan.groups:
        device = device_of(root, group.members[0])
        out.update({f"{group.name}.{name}": device for name in (*group.tensors, *group.fixed)})
    for path, named in plan.bindings.items():
        out.update({binding_key(path, name): device_of(root, path) for name in named})
    return out


def initial_values(root: nn.Module, plan: Plan, seed: int) -> dict[str, Tensor]:
    """First values of every tensor, trainable or fixed, by key, where it belongs (see `tensor_devices`).

    Raises:
        AdapterError: a tensor starts from a weight that is offloaded. PluginError: an initialiser made another shape.
    """
    devices = tensor_devices(root, plan)
    values = {}
    for group in plan.groups:
        for name, spec in (*group.tensors.items(), *group.fixed.items()):
            key = f"{group.name}.{name}"
            values[key] = _first(root, spec, plan, devices[key], seed, group.name, name)
    for path, named in plan.bindings.items():
        for name, spec in named.items():
            key = binding_key(path, name)
            values[key] = _first(root, spec, plan, devices[key], seed, "binding", path, name)
    return values


def initial_state(plan: Plan, seed: int) -> dict[str, Tensor]:
    """First values of the training-only tensors, on the CPU."""
    return {
        f"{group.name}.{name}": draw(spec, torch.float32, seed, "state", group.name, name)
        for group in plan.groups
        for name, spec in group.state.items()
    }


def _first(root: nn.Module, spec: TensorSpec, plan: Plan, device: torch.device, seed: int, *key: str) -> Tensor:
    dtype = spec.dtype or plan.spec.torch_dtype
    if device.type == "meta":
        return torch.empty(spec.shape, dtype=dtype, device=device)
    if isinstance(spec.init, FromBase):
        parameter = root.get_parameter(spec.init.path).detach()
        _refuse_offloaded(parameter, spec.init.path, "train_modules starts from it")
        return parameter.clone().to(dtype)
    if isinstance(spec.init, FromWeight):
        weight = seen_weight(root.get_submodule(spec.init.path))
        _refuse_offloaded(weight, f"{spec.init.path}.weight", f"method '{plan.spec.method}' starts from it")
        with torch.no_grad():  # a copy, which `compute` may write into
            computed = spec.init.compute(weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True))
        return as_declared(computed, spec, dtype).clone().to(device)
    return draw(spec, dtype, seed, *key).to(device)


def _refuse_offloaded(parameter: Tensor, name: str, why: str) -> None:
    if parameter.is_meta:
        raise AdapterError(f"'{name}' is offloaded, and {why}; load the model without offloading it, or leave it out")


def device_of(root: nn.Module, path: str) -> torch.device:
    """Where a module computes: its weights' device, or its hook's where the weights are offloaded."""
    module = root.get_submodule(path)
    hook = getattr(module, "_hf_hook", None)  # Accelerate's offloading leaves weights on the meta device
    executes = getattr(hook, "execution_device", None)
    device = next(module.parameters()).device
    return torch.device(executes) if device.type == "meta" and executes is not None else device
