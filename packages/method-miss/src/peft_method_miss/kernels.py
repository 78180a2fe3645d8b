"""The accumulating pair of MiSS as torch products.

Summing over shards and repeating over shards are products with the shard indicator E (0/1, [r, columns]): on
a matrix unit they cost less than the strided additions that they replace. What is saved is S [tokens, r], and
x only by `expand`, whose gradient needs it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from peft_core import Forward, Tensors

from . import naive


def indicator(
    count: int, r: int, interleaved: bool, sizes: tuple[int, ...] | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """E [r, count]: E[i, j] = 1 where column j belongs to shard i."""
    shards = naive.shard_of(count, r, interleaved, sizes)
    return torch.nn.functional.one_hot(shards, r).T.contiguous().to(device=device, dtype=dtype)


def members_of(
    count: int, r: int, interleaved: bool, sizes: tuple[int, ...] | None = None
) -> Callable[[Tensor], Tensor]:
    """E for the dtype and device of a tensor, made once; for a fake tensor (tracing), made each time."""
    known = functools.cache(functools.partial(indicator, count, r, interleaved, sizes))

    def members(like: Tensor) -> Tensor:
        make = known if type(like) is Tensor else known.__wrapped__
        return make(like.dtype, like.device)

    return members


@functools.cache
def efficient(k: int, d: int, r: int, interleaved: bool, scale: float) -> Forward:
    """ΔW = s·Dᵀ·E with D [r, d] and the indicator of the input's shards; `mini`: D [r, m] tiled d/m times."""
    shards = naive.shard_of(k, r, interleaved)
    members = members_of(k, r, interleaved)

    def reference(x: Tensor, tensors: Tensors, binding: Tensors) -> Tensor:
        return naive.mini(x, tensors["D"], shards.to(x.device), scale, d)

    def tiled(D: Tensor, dtype: torch.dtype) -> Tensor:
        D = D.to(dtype)
        return D if D.shape[1] == d else D.repeat(1, d // D.shape[1])

    def add_(x: Tensor, y: Tensor, tensors: Tensors, binding: Tensors) -> tuple[Tensor, ...]:
        S = torch.mm(x, members(x).t())  # [tokens, r]
        y.addmm_(S, tiled(tensors["D"], x.dtype), alpha=scale)
        return (S,)

    def grad_(
        dy: Tensor, dx: Tensor | None, saved: tuple[Tensor, ...], tensors: Tensors, binding: Tensors
    ) -> dict[str, Tensor]:
        D = tensors["D"]
        if dx is not None:
            dS = torch.mm(dy, tiled(D, dy.dtype).t())  # [tokens, r]
            dx.addmm_(dS, members(dy), alpha=scale)
        dD = torch.mm(saved[0].t(), dy)  # [r, d]
        if D.shape[1] != d:
            dD = dD.view(r, -1, D.shape[1]).sum(1, dtype=D.dtype)
        return {"D": dD if scale == 1.0 else dD * scale}

    return Forward(reference, add_, grad_)


@functools.cache
def expand(d: int, r: int, sizes: tuple[int, ...] | None, scale: float) -> Forward:
    """ΔW = s·Eᵀ·D with D [r, in] and the indicator of the output's shards."""
    shards = naive.shard_of(d, r, False, sizes)
    members = members_of(d, r, False, sizes)

    def reference(x: Tensor, tensors: Tensors, binding: Tensors) -> Tensor:
        return naive.expand(x, tensors["D"], shards.to(x.device), scale)

    def add_(x: Tensor, y: Tensor, tensors: Tensors, binding: Tensors) -> tuple[Tensor, ...]:
        z = torch.mm(x, tensors["D"].to(x.dtype).t())  # [tokens, r]
        y.addmm_(z, members(x), alpha=scale)
        return (x,)

    def grad_(
        dy: Tensor, dx: Tensor | None, saved: tuple[Tensor, ...], tensors: Tensors, binding: Tensors
    ) -> dict[str, Tensor]:
        dz = torch.mm(dy, members(dy).t())  # [tokens, r]
        if dx is not None:
            dx.addmm_(dz, tensors["D"].to(dy.dtype), alpha=scale)
        dD = torch.mm(dz.t(), saved[0])  # [r, in]
        return {"D": dD if scale == 1.0 else dD * scale}

    return Forward(reference, add_, grad_)


@functools.cache
def bat(scale: float) -> Forward:
    """Wᵢⱼ + s·(Wᵢⱼ·Dᵢ + Dᵢ), with the base weight at hand: the reference only, since it is no added Δ."""

    def reference(x: Tensor, tensors: Tensors, binding: Tensors) -> Tensor:
        return naive.bat(x, tensors["D"], tensors["base_weight"], scale)

    return Forward(reference)
