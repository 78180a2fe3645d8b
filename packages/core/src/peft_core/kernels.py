"""Which implementation of a method's arithmetic runs. Chosen at run time, never part of a spec."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .dtypes import name_of
from .errors import PeftCoreError, listed, suggestion

CHOICES = ("auto", "triton", "torch", "naive")
OLDEST = (8, 0)
"""Compute capability of the oldest GPU that `auto` takes Triton on: what the kernels are compiled for in the tests."""

SUPPORTED = (torch.float32, torch.bfloat16, torch.float16)


class _Choice:
    """`name`: of the innermost `kernels(...)`. `environment`: of `PEFT_CORE_KERNELS`; every layer asks, so it is kept."""

    name: str = ""
    environment: str = ""


def chosen() -> str:
    """The choice in force: the innermost `kernels(...)`, else `PEFT_CORE_KERNELS` as it was when an adapter was last put on a
    model, else `auto`.
    """
    return _Choice.name or _Choice.environment or read_environment()


def read_environment() -> str:
    """Look up `PEFT_CORE_KERNELS` again.

    Raises:
        PeftCoreError: there is no such choice.
    """
    _Choice.environment = _checked(os.environ.get("PEFT_CORE_KERNELS") or "auto", "PEFT_CORE_KERNELS")
    return _Choice.environment


@contextmanager
def kernels(name: str) -> Iterator[None]:
    """Run with these kernels: `auto` (Triton on a GPU, else torch), `triton`, `torch`, or `naive` (the readable reference).
    The choice holds for the whole process, in all its threads.

    Raises:
        PeftCoreError: there is no such choice.
    """
    previous, _Choice.name = _Choice.name, _checked(name, "kernels")
    try:
        yield
    finally:
        _Choice.name = previous


def use_triton(x: Tensor) -> bool:
    """Whether a method should take its Triton kernel for this input.

    Raises:
        PeftCoreError: the choice is `triton`, and it cannot run where the input is.
    """
    name = chosen()
    if name == "auto":
        return x.is_cuda and not obstacle(str(x.device), x.dtype)
    if name != "triton":
        return False
    if found := obstacle(str(x.device), x.dtype):
        raise PeftCoreError(f"kernels 'triton': {found}; 'auto' and 'torch' run everywhere")
    return True


def obstacle(device: str, dtype: torch.dtype) -> str:
    """Why Triton kernels cannot compute in this dtype on a device, in words; nothing where they can."""
    return _obstacle(device, dtype)


# All that torch.compiler.assume_constant_result does, but for importing the compiler, which takes two seconds.
obstacle._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _obstacle(device: str, dtype: torch.dtype) -> str:
    if dtype not in SUPPORTED:
        return f"they take {listed(map(name_of, SUPPORTED))}, not {name_of(dtype)}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if not device.startswith("cuda"):
        return _obstacle_to_interpreting(device)
    if torch.version.cuda is None:
        return "they need CUDA, and this build of torch has none"
    found = torch.cuda.get_device_capability(device)
    if found < OLDEST:
        return f"they need compute capability {OLDEST[0]}.{OLDEST[1]}, {device} has {found[0]}.{found[1]}"
    return ""


def _obstacle_to_interpreting(device: str) -> str:
    if os.environ.get("TRITON_INTERPRET") != "1":
        return f"they need a CUDA GPU, the input is on '{device}' (TRITON_INTERPRET=1 interprets them there, slowly)"
    import triton.language as tl

    # Triton decides this for its own functions when it is imported.
    if type(tl.zeros).__name__ == "JITFunction":
        return "Triton was imported before TRITON_INTERPRET=1 was set: set it before Python starts"
    return ""


def _checked(name: str, what: str) -> str:
    if name not in CHOICES:
        raise PeftCoreError(
            f"{what}: unknown kernels '{name}'; there are {', '.join(CHOICES)}{suggestion(str(name), CHOICES)}"
        )
    return name
