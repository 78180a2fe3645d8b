"""Tensors that FSDP2 or tensor parallelism has divided between processes."""

from __future__ import annotations

from torch import Tensor, nn

from .subclassing import class_names

_FSDP = frozenset({"FSDPModule", "FullyShardedDataParallel"})


def divided(model: nn.Module) -> str:
    """The first module whose weights are divided between processes, in words; nothing where all are whole.

    The class tells where FSDP2 has divided them, since a forward may have gathered them for the moment.
    """
    for path, module in model.named_modules():
        if not _FSDP.isdisjoint(class_names(module)) or any(
            hasattr(parameter, "device_mesh") for parameter in module._parameters.values()
        ):
            return f"'{path}'" if path else "the model"
    return ""


def whole(tensor: Tensor) -> Tensor:
    """A detached tensor, gathered from all processes where it is divided."""
    gather = getattr(tensor, "full_tensor", None)
    return (gather() if gather is not None else tensor).detach()  # type: ignore[no-any-return]


def sharded_like(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """A whole tensor as FSDP2 has divided the parameter."""
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(parameter.device), mesh, parameter.placements)  # type: ignore[attr-defined]
