"""The low-rank product Δ(x) = s·B·A·x that several methods share: A [r, in], B [out, r].

On a GPU as on a CPU these are the vendor's products. Each accumulates in its epilogue (`addmm_`), so that in 16 bits the down
projection moves 2·tokens·in bytes and the up projection 4·tokens·out, y once in and once out: what any kernel of their
own must move. One that joined the two would save a write and a read of h, for r = 16 and 4096 features less than 1 % of that.
One that joined them to the base product would save the pass over y, but would have to do the base product as fast as the
vendor does, and that is more than a hundred times the arithmetic.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import thin
from .method import AddInPlace, Forward, GradInPlace, Tensors


def forward(scale: float) -> Forward:
    """Δ(x) = s·B·A·x for sites that borrow an `A` [r, in] and a `B` [out, r].

    Between forward and backward it keeps x, h [tokens, r], and A and B in the compute dtype.
    """

    def reference(x: Tensor, tensors: Tensors, binding: Tensors) -> Tensor:
        return naive(x, tensors["A"], tensors["B"], scale)

    return Forward(reference, *_pair(scale))


@functools.cache
def _pair(scale: float) -> tuple[AddInPlace, GradInPlace]:
    """One for all sites, which then find it in the processor's caches. (torch.compile traces the reference, a site's own.)"""

    def add(x: Tensor, y: Tensor, tensors: Tensors, binding: Tensors) -> tuple[Tensor, ...]:
        wide = thin.widened(x)
        A, B = tensors["A"].to(wide.dtype), tensors["B"].to(wide.dtype)
        return x, _add_(wide, y, A, B, scale), A, B

    def grad(
        dy: Tensor, dx: Tensor | None, saved: tuple[Tensor, ...], tensors: Tensors, binding: Tensors
    ) -> dict[str, Tensor]:
        x, h, A, B = saved
        dA, dB = grad_(dy, dx, x, h, A, B, scale)
        return {"A": dA, "B": dB}

    return add, grad


def naive(x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Δ(x), x [..., in] → [..., out], differentiable: the reference."""
    return (x @ A.to(x.dtype).T) @ B.to(x.dtype).T * scale


def add_(x: Tensor, y: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """y += s·(x Aᵀ) Bᵀ in place, x [tokens, in], y [tokens, out]. Returns h = x Aᵀ [tokens, r], in the dtype of `thin`."""
    x = thin.widened(x)
    return _add_(x, y, A.to(x.dtype), B.to(x.dtype), scale)


def _add_(x: Tensor, y: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    h = x @ A.T
    thin.add_(y, h, B.T, scale)
    return h


def grad_(
    dy: Tensor, dx: Tensor | None, x: Tensor, h: Tensor, A: Tensor, B: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """dx += s·dy B A in place; returns (dA [r, in], dB [out, r]) in the dtype of `thin`, that of h."""
    dy, x = thin.widened(dy), thin.widened(x)
    dh = dy @ B.to(dy.dtype)  # [tokens, r]
    if scale != 1.0:
        dh *= scale
    dB = (h.T @ dy).T  # this order of operands: the other is a quarter slower in bf16 on a CPU
    if scale != 1.0:
        dB *= scale
    dA = dh.T @ x
    if dx is not None:
        thin.add_(dx, dh, A.to(dh.dtype), 1.0)
    return dA, dB


def merged(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """weight + s·B·A [out, in], computed in the weight's dtype without a ΔW between."""
    return torch.addmm(weight, B.to(weight.dtype), A.to(weight.dtype), alpha=scale)


def delta(A: Tensor, B: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """ΔW = s·B·A [out, in], computed in `dtype`."""
    return scale * (B.to(dtype) @ A.to(dtype))
