"""What torch does without a public name for it: the file to read when torch moves."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

transforms_functions = torch._C._are_functorch_transforms_active
"""Whether vmap, grad or another transform of functions is active."""

is_tracing = torch._C._is_tracing
"""Whether torch.jit.trace is recording."""

is_batched = torch._C._functorch.is_batchedtensor
"""Whether a tensor is a batch under vmap."""

is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor
"""Whether it is one under the older vmap, behind `is_grads_batched` and `vectorize`."""

backward_number = torch._C._current_graph_task_id
"""The number of the backward pass that runs in this thread; -1: none."""


def in_reentrant_checkpoint() -> bool:
    """Whether a backward pass runs within that of a reentrant checkpoint, which has one of its own for each segment."""
    from torch.utils.checkpoint import CheckpointFunction

    frame, inner = sys._getframe(1), CheckpointFunction.backward.__code__
    while frame is not None and frame.f_code is not inner:
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None


def fsdp_looks() -> bool:
    """Whether FSDP2 asks the caller, a module's `__getattr__`, for a parameter: in the first forward, to see what it divided."""
    return sys._getframe(2).f_code.co_name == "reset_sharded_param"


def forward_mode() -> bool:
    """Whether forward-mode differentiation is active."""
    return torch.autograd.forward_ad._current_level >= 0  # type: ignore[no-any-return]


def compiles_functional_call() -> bool:
    """Whether torch.compile is within a `functional_call`, which gives a module other tensors. Called while it compiles."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    effects = InstructionTranslator.current_tx().output.side_effects
    ignored = getattr(effects, "ignore_mutation_on_these_variables", None)
    if ignored is None:  # torch 2.7 and older: whether something older than the call, such as `_parameters`, is changed
        return any(getattr(kept.mutation_type, "is_modified", False) for kept in effects.id_to_variable.values())
    return bool(ignored)


compiles_functional_call._dynamo_marked_constant = True  # type: ignore[attr-defined]


def stream_number(tensor: Tensor) -> int:
    """The number of the CUDA stream that work on this tensor goes to now; 0 on other devices."""
    if not tensor.is_cuda or not torch.cuda.is_initialized():
        return 0
    return torch._C._cuda_getCurrentRawStream(tensor.get_device())  # type: ignore[no-any-return]


def after_backward(callback: Callable[[], None]) -> None:
    """Call this when the backward pass that runs has ended."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def apply(function: type[torch.autograd.Function]) -> Any:
    """What `function.apply` does where no transform of functions is active, without looking for one."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; inference tensors do not count that."""
    return 0 if tensor.is_inference() else tensor._version
