"""Gradients of tensors that many sites borrow, summed in place in one buffer per tensor.

Left to autograd, every borrower returns a gradient of the tensor's full size, zero outside the rows that it uses, and the
engine adds them up: work per site that grows with the number of sites. Here a borrower adds its contribution to the
tensor's buffer and gives autograd nothing. A gate, one node between all borrowers and the parameter, hands the buffer over
when the engine reaches it, which is after the last borrower. Everything after it (hooks, DDP, accumulation over
backward passes) sees one ordinary gradient.

The engine runs every node on the CUDA stream of its forward, and makes streams wait for each other only where it carries a
gradient from one to the other. So each stream has a gate and a buffer of its own.
"""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from . import _torch
from .method import Gradient, Rows


class _Gate(torch.autograd.Function):
    """An edge to the parameter without data: its output has no elements, its gradient is the summed buffer."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, shared: SharedGradient) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.shared, ctx.stream = shared, _torch.stream_number(parameter)
        return parameter.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor | None) -> tuple[Tensor | None, None]:
        return ctx.shared._take(ctx.stream), None


def _distributed() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


class _Sum:
    """The buffer of one backward pass. The engine holds it, as a callback that does nothing, and lets go of it however the
    pass ends: one that fails, or that wants no gradient of this tensor, never reaches the gate.
    """

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer

    def __call__(self) -> None:
        pass


class SharedGradient:
    """The gate and the buffer of one shared tensor. Belongs to a model; copies and pickles start empty."""

    def __init__(self) -> None:
        self._parameter: Tensor | None = None
        self._edge: Tensor | None = None
        self._stream = 0
        # By graph task and stream: backwards may nest (reentrant checkpointing), and run in several threads at once.
        self._sums: WeakValueDictionary[tuple[int, int], _Sum] = WeakValueDictionary()

    def edge(self, parameter: Tensor) -> Tensor:
        """What a borrower takes as an input in the parameter's stead. The parameter may be another at every call, or the same
        one in another dtype or place, and the stream another: the gate knows those that it was made with.
        """
        edge, stream = self._edge, _torch.stream_number(parameter)
        if (
            edge is None
            or self._parameter is not parameter
            or self._stream != stream
            or edge.dtype is not parameter.dtype
            or edge.device != parameter.device
        ):
            with torch.enable_grad():
                edge = self._edge = _Gate.apply(parameter, self)
            self._parameter, self._stream = parameter, stream
        return edge  # type: ignore[no-any-return]

    def add_(self, gradient: Gradient) -> None:
        """Add one borrower's contribution, in the order in which the engine reaches the borrowers."""
        assert self._parameter is not None
        place = _torch.backward_number(), _torch.stream_number(self._parameter)
        found = self._sums.get(place)
        if found is None:
            found = self._sums[place] = _Sum(torch.zeros_like(self._parameter, requires_grad=False))
            _torch.after_backward(found)
        buffer = found.buffer
        if isinstance(gradient, Rows):
            buffer.index_add_(0, gradient.index, gradient.values.to(buffer.dtype))
        else:
            buffer.add_(gradient)

    def _take(self, stream: int) -> Tensor | None:
        """The gradient that this backward pass has summed on a stream, for autograd; None: no borrower gave any."""
        if _distributed() and not hasattr(self._parameter, "device_mesh") and _torch.in_reentrant_checkpoint():
            warnings.warn(
                "reentrant checkpointing hands over the gradient of a shared tensor in parts, of which "
                "DistributedDataParallel would reduce only the first: use use_reentrant=False, or static_graph=True",
                stacklevel=2,
            )
        found = self._sums.pop((_torch.backward_number(), stream), None)
        if found is None:
            return None
        buffer = found.buffer
        del found.buffer  # autograd takes over a gradient that nothing else holds, and copies others
        return buffer

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedGradient:
        return SharedGradient()

    def __reduce__(self) -> tuple[type[SharedGradient], tuple[()]]:
        return SharedGradient, ()
