"""MoS's mathematics, readable and in any dtype (arXiv 2410.00938, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

import peft_core as pc


def factors(tensors: pc.Tensors, binding: pc.Tensors, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r], put together from the pools, in `dtype`; random scaling is folded into A.

    Row i of A is the concatenation of pool_A[I_A[i, 0]], …, pool_A[I_A[i, l-1]]; column i of B likewise.
    Without an index the pools are the factors (pure sharing).
    """
    A, Bt = tensors["pool_A"], tensors["pool_B"]
    if "index" in binding:
        index = binding["index"]  # [2 or 1, r, l]: I_A and I_B, or one for both
        A, Bt = A[index[0]].flatten(1), Bt[index[-1]].flatten(1)  # [r, l, in/l] → [r, in]
    A, Bt = A.to(dtype), Bt.to(dtype)
    if "scaling" in binding:
        A = A * binding["scaling"].to(dtype)[:, None]
    return A, Bt.T


def delta(x: Tensor, tensors: pc.Tensors, binding: pc.Tensors, alpha: float) -> Tensor:
    """Δ(x) = (alpha/r)·B·A·x, x [..., in] → [..., out]."""
    A, B = factors(tensors, binding, x.dtype)
    return pc.lowrank.naive(x, A, B, alpha / len(A))
