"""The accumulating pair: gather the site's factors, then core's low-rank product.

The gathered factors are saved for backward: they are small beside x (the README has the measurement). In Triton a gather is
one launch, for one site or for a whole group.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

import peft_core as pc
from peft_core import thin
from peft_core.kernels import use_triton
from peft_core.method import AddInPlace, Gradient, GradInPlace

from . import naive


def gather_factors(tensors: pc.Tensors, binding: pc.Tensors, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] of a site in `dtype`. Casts what is gathered, never a pool."""
    if "index" in binding and use_triton(tensors["pool_A"]):
        A, B = gather_group(tensors, [binding], dtype)
        return A[0], B[0]
    A, Bt = _gather(tensors["pool_A"], binding, 0, dtype), _gather(tensors["pool_B"], binding, -1, dtype)
    return _scaled(A, binding), Bt.T


def gather_group(tensors: pc.Tensors, bindings: Sequence[pc.Tensors], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A [sites, r, in] and B [sites, out, r] of sites that share pools and options, differentiable.

    In Triton one launch, whatever the number of sites, and one for the gradients: sums over the pieces that a shard fills,
    in a fixed order and without atomics.
    """
    if "index" not in bindings[0] or not use_triton(tensors["pool_A"]):
        every_A, every_B = zip(*(gather_factors(tensors, binding, dtype) for binding in bindings), strict=True)
        return torch.stack(every_A), torch.stack(every_B)
    from . import triton_kernels

    index = _stacked([binding["index"] for binding in bindings])  # [sites, 2 or 1, r, l]
    scaling = _stacked([binding["scaling"] for binding in bindings]) if "scaling" in bindings[0] else None
    A, Bt = triton_kernels.gather_factors(tensors["pool_A"], tensors["pool_B"], index, scaling, dtype)
    return A, Bt.transpose(1, 2)


def forward(alpha: float) -> pc.Forward:
    """Δ(x) with scale alpha/r. r and l are read from the index, so that all sites run the same code."""

    def reference(x: Tensor, tensors: pc.Tensors, binding: pc.Tensors) -> Tensor:
        if torch.compiler.is_compiling() and "index" in binding and use_triton(x):  # an operator, without atomics
            A, B = gather_factors(tensors, binding, x.dtype)
            return pc.lowrank.naive(x, A, B, alpha / len(A))
        return naive.delta(x, tensors, binding, alpha)

    return pc.Forward(reference, *_pair(alpha))


@functools.cache
def _pair(alpha: float) -> tuple[AddInPlace, GradInPlace]:
    """One for all sites, which then find it in the processor's caches."""

    def add_(x: Tensor, y: Tensor, tensors: pc.Tensors, binding: pc.Tensors) -> tuple[Tensor, ...]:
        wide = thin.widened(x)
        A, B = gather_factors(tensors, binding, wide.dtype)
        h = pc.lowrank.add_(wide, y, A, B, alpha / A.shape[0])
        return x, h, A, B  # [tokens, in], [tokens, r], [r, in], [out, r]

    def grad_(
        dy: Tensor, dx: Tensor | None, saved: tuple[Tensor, ...], tensors: pc.Tensors, binding: pc.Tensors
    ) -> dict[str, Gradient]:
        x, h, A, B = saved
        dA, dB = pc.lowrank.grad_(dy, dx, x, h, A, B, alpha / A.shape[0])
        dA = _scaled(dA, binding)
        return {"pool_A": _scattered(dA, binding, 0), "pool_B": _scattered(dB.T, binding, -1)}

    return add_, grad_


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0].unsqueeze(0)  # a view: no launch


def _gather(pool: Tensor, binding: pc.Tensors, which: int, dtype: torch.dtype) -> Tensor:
    """A factor's rows [r, width] from a pool [shards, width/l]; the whole pool where there is no index."""
    if "index" not in binding:
        return pool.to(dtype)
    index = binding["index"][which]  # [r, l]
    return pool.index_select(0, index.flatten()).to(dtype).view(index.shape[0], -1)


def _scattered(rows: Tensor, binding: pc.Tensors, which: int) -> Gradient:
    """Gradient of a factor's rows [r, width] as a gradient of the pool: its shards, each at most once."""
    if "index" not in binding:
        return rows
    index = binding["index"][which].flatten()  # [r·l]
    return pc.Rows(index, rows.reshape(index.shape[0], -1))


def _scaled(rows: Tensor, binding: pc.Tensors) -> Tensor:
    """Rows times their random factors, if any: for A and, since scaling is linear, for its gradient."""
    return rows * binding["scaling"].to(rows.dtype)[:, None] if "scaling" in binding else rows
