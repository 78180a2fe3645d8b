"""Thin products, those with r rows or columns, in the dtype in which the processor computes them fast.

A CPU without instructions for 16 bits multiplies in float32 many times as fast, and any CPU does where there are few tokens
(docs/performance.md). Only the products of adapters are computed so: the base's are torch's own.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

FEW = 16
"""Up to so many tokens every CPU is faster in float32: its kernels for 16 bits arrange the operands anew at every call."""

_TESTS = {
    torch.bfloat16: ("_is_amx_tile_supported", "_is_avx512_bf16_supported"),
    torch.float16: ("_is_amx_fp16_supported",),
}
"""torch's names for the instructions, any of which will do."""


def widened(x: Tensor) -> Tensor:
    """x [tokens, features] in the dtype to multiply it by a thin matrix in: itself, or float32 for 16 bits on a CPU that is slow
    in them. Compiled code, which is for any number of tokens, keeps x.
    """
    dtype = x.dtype
    if dtype not in _TESTS or x.device.type != "cpu" or torch.compiler.is_compiling():
        return x
    return x if len(x) > FEW and cpu_multiplies(dtype) else x.float()


def add_(y: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """y += s·a·b in place, y [tokens, features]; rounded once where a [tokens, r] and b [r, features] are wider than y."""
    if a.dtype == y.dtype:
        y.addmm_(a, b, alpha=scale)
    else:
        y.add_(torch.mm(a, b), alpha=scale)


@functools.cache
def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this processor has instructions for matrix products of these 16 bits; torch computes them without, slowly."""
    return any(getattr(torch.cpu, test, bool)() for test in _TESTS[dtype])
