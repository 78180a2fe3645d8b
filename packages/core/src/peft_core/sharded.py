"""Tensors that FSDP2 has divided between processes."""

from __future__ import annotations

from torch import Tensor, nn


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
