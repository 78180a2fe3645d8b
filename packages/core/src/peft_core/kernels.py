"""Which implementation of a method's arithmetic runs. Chosen at run time, never part of a spec."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from .errors import PeftCoreError, suggestion

CHOICES = ("auto", "triton", "torch", "naive")


class _Choice:
    name: str = ""


def chosen() -> str:
    """The choice in force: the innermost `kernels(...)`, else `PEFT_CORE_KERNELS`, else `auto`."""
    return _Choice.name or _checked(os.environ.get("PEFT_CORE_KERNELS", "auto"), "PEFT_CORE_KERNELS")


@contextmanager
def kernels(name: str) -> Iterator[None]:
    """Run with these kernels: `auto` (Triton on a GPU, else torch), `triton`, `torch`, or `naive` (the readable reference).

    Raises:
        PeftCoreError: there is no such choice.
    """
    previous, _Choice.name = _Choice.name, _checked(name, "kernels")
    try:
        yield
    finally:
        _Choice.name = previous


def use_triton(x: Tensor) -> bool:
    """Whether a method should take its Triton kernel for this input."""
    name = chosen()
    return name == "triton" or (name == "auto" and x.is_cuda)


def _checked(name: str, what: str) -> str:
    if name not in CHOICES:
        raise PeftCoreError(f"{what}: '{name}' is none of {', '.join(CHOICES)}{suggestion(name, CHOICES)}")
    return name
