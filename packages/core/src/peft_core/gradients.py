"""Gradients of tensors that many sites borrow, summed in place in one buffer per tensor.

Left to autograd, every borrower returns a gradient of the tensor's full size, zero outside the rows that it uses, and the
engine adds them up: work per site that grows with the number of sites. Here a borrower adds its contribution to the
tensor's buffer and gives autograd nothing. A gate, one node between all borrowers and the parameter, hands the buffer over
when the engine reaches it, which is after the last borrower. Everything after it (hooks, DDP, accumulation over
backward passes) sees one ordinary gradient.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from . import _torch
from .method import Gradient, Rows


class _Gate(torch.autograd.Function):
    """An edge to the parameter without data: its output has no elements, its gradient is the summed buffer."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, shared: SharedGradient) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.shared = shared
        return parameter.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor | None) -> tuple[Tensor | None, None]:
        return ctx.shared._take(), None


def _distributed() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


class SharedGradient:
    """The gate and the buffer of one shared tensor. Belongs to a model; copies and pickles start empty."""

    def __init__(self) -> None:
        self._parameter: Tensor | None = None
        self._edge: Tensor | None = None
        # By graph task: backwards may nest (reentrant checkpointing), and what a failed one left must not reach the next.
        self._buffers: dict[int, Tensor] = {}

    def edge(self, parameter: Tensor) -> Tensor:
        """What a borrower takes as an input in the parameter's stead. The parameter may be another at every call."""
        if self._buffers and _torch.backward_number() == -1:
            self._buffers.clear()  # no backward runs: a failed one left this
        if self._parameter is not parameter or self._edge is None:
            with torch.enable_grad():
                self._edge = _Gate.apply(parameter, self)
            self._parameter = parameter
        assert self._edge is not None
        return self._edge

    def add_(self, gradient: Gradient) -> None:
        """Add one borrower's contribution, in the order in which the engine reaches the borrowers."""
        assert self._parameter is not None
        task = _torch.backward_number()
        buffer = self._buffers.get(task)
        if buffer is None:
            buffer = self._buffers[task] = torch.zeros_like(self._parameter, requires_grad=False)
            # A backward that wants no gradient of this tensor never reaches the gate.
            _torch.after_backward(functools.partial(self._drop, task))
        if isinstance(gradient, Rows):
            buffer.index_add_(0, gradient.index, gradient.values.to(buffer.dtype))
        else:
            buffer.add_(gradient)

    def _drop(self, task: int) -> None:
        self._buffers.pop(task, None)

    def _take(self) -> Tensor | None:
        if _distributed() and not hasattr(self._parameter, "device_mesh") and _torch.in_reentrant_checkpoint():
            warnings.warn(
                "reentrant checkpointing hands over the gradient of a shared tensor in parts, of which "
                "DistributedDataParallel would reduce only the first: use use_reentrant=False, or static_graph=True",
                stacklevel=2,
            )
        return self._buffers.pop(_torch.backward_number(), None)

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedGradient:
        return SharedGradient()

    def __reduce__(self) -> tuple[type[SharedGradient], tuple[()]]:
        return SharedGradient, ()
