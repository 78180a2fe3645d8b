"""The accumulating pair of MiSS, as torch products and in Triton.

Both consist of two passes, the sum over shards S = x·Eᵀ and the repetition y += S·E with the shard indicator E (0/1). As
torch products on a matrix unit they cost less than the strided additions that they replace; in Triton they read x once, and
read and write y once. What is saved is S [tokens, r], once for the layers that read one input, and x only by `expand`,
whose gradient needs it.
"""

from __future__ import annotations

import functools
import threading
import weakref
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

import peft_core as pc
from peft_core import thin
from peft_core.kernels import use_triton
from peft_core.method import AddInPlace, GradInPlace

from . import naive

Drop: TypeAlias = tuple[float, int]
"""Probability of an element of x to be dropped, and the seed that decides which."""
KEEP_ALL: Drop = (0.0, 0)
FEW = 16
"""Up to so many tokens it is faster to sum again than to find out whether the sum is there."""


def indicator(
    count: int, r: int, interleaved: bool, sizes: tuple[int, ...] | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """E [r, count]: E[i, j] = 1 where column j belongs to shard i."""
    with torch.inference_mode(False):  # it is kept, and training may be next
        shards = naive.shard_of(count, r, interleaved, sizes, device)
        return (shards == torch.arange(r, device=device)[:, None]).to(dtype)


def starts(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Where runs of these lengths begin, and where the last one ends: int32 [r + 1]."""
    return torch.tensor([0, *sizes]).cumsum(0, dtype=torch.int32).to(device)


@dataclass(frozen=True)
class Shards:
    """`count` columns in r shards: which belong together, summing over them, repeating over them."""

    count: int
    r: int
    interleaved: bool
    sizes: tuple[int, ...] | None = None

    def sum(self, x: Tensor, drop: Drop = KEEP_ALL) -> Tensor:
        """S_i = Σ x_j over shard i: x [tokens, count] → S [tokens, r], in the dtype of `thin`. Only Triton drops."""
        if use_triton(x):
            from . import triton_kernels

            return triton_kernels.shard_sum(x, self.r, self.interleaved, *self._runs(x), *drop)
        x = thin.widened(x)
        return torch.mm(x, self._members(x).t())

    def expand_add_(self, S: Tensor, y: Tensor, scale: float, drop: Drop = KEEP_ALL) -> None:
        """y_j += scale·S_i for every column j of shard i, but for what `sum` dropped: S [tokens, r], y [tokens, count]."""
        if use_triton(y):
            from . import triton_kernels

            triton_kernels.shard_expand_add_(y, S, self.interleaved, *self._runs(y), scale, *drop)
        else:
            S = thin.widened(S)
            thin.add_(y, S, self._members(S), scale)

    def repeat(self, S: Tensor) -> Tensor:
        """y_j = S_i for every column j of shard i, differentiable: S [..., r] → y [..., count]."""
        return S @ self._members(S)

    def _members(self, like: Tensor) -> Tensor:
        # What is made while tracing must not be kept; compiled code makes it anew, r numbers a column.
        make = _indicator if type(like) is Tensor and not torch.compiler.is_compiling() else indicator
        return make(self.count, self.r, self.interleaved, self.sizes, like.dtype, like.device)

    def _runs(self, like: Tensor) -> tuple[Tensor | None, int]:
        """Where shards begin, unless a formula gives it, and the length of the longest."""
        if self.sizes is None:
            return None, -(-self.count // self.r)
        make = _starts if type(like) is Tensor else starts
        return make(self.sizes, like.device), max(self.sizes)


_indicator, _starts, _shard_of = functools.cache(indicator), functools.cache(starts), functools.cache(naive.shard_of)


class _LastSum(threading.local):
    """This thread's last sum over shards, which layers that read one input share: q, k and v; gate and up.

    Input and sum are held weakly: the sum lives as long as a backward pass needs it. It is used again only for an input that
    autograd has recorded (with a `grad_fn`), since whatever changes that raises its version. Other tensors, leaves above all, may
    change unseen: from NumPy, another process, or a fused optimizer.
    """

    key: tuple[Any, ...] = ()
    source: weakref.ref[Tensor] | None = None
    found: weakref.ref[Tensor] | None = None

    def of(self, x: Tensor, shards: Shards) -> Tensor:
        """`shards.sum(x)`, x [tokens, count] → [tokens, r], not to be changed in place."""
        source = x if x._base is None else x._base  # every layer makes a view of its own of the input
        if type(x) is not Tensor or source.grad_fn is None or len(x) <= FEW:
            return shards.sum(x)
        stream = torch.cuda.current_stream(x.device) if x.is_cuda else None
        key = shards, stream, x.dtype, x.data_ptr(), x.shape, x.stride(), x._version
        S = self.found() if self.found and self.source and self.source() is source and self.key == key else None
        if S is None:
            S = shards.sum(x).to(x.dtype)  # no wider than x: it is kept
            self.key, self.source, self.found = key, weakref.ref(source), weakref.ref(S)
        return S


_last = _LastSum()


def efficient(k: int, d: int, r: int, interleaved: bool, scale: float) -> pc.Forward:
    """ΔW = s·Dᵀ·E with D [r, d] and the indicator of the input's shards; `mini`: D [r, m] tiled d/m times."""
    shard_of = _shard_of(k, r, interleaved)
    shards = Shards(k, r, interleaved)

    def reference(x: Tensor, tensors: pc.Tensors, binding: pc.Tensors) -> Tensor:
        if torch.compiler.is_compiling():  # a product or an operator, in place of scattered additions
            S = shards.sum(x.reshape(-1, k))
            return (S @ _tiled(tensors["D"], d, x.dtype) * scale).view(*x.shape[:-1], d)
        return naive.mini(x, tensors["D"], shard_of.to(x.device), scale, d)

    return pc.Forward(
        reference, *_pair(shards, d, scale), dropped=lambda p, seed: efficient_pair(shards, d, scale, (p, seed))
    )


def efficient_pair(shards: Shards, d: int, scale: float, drop: Drop = KEEP_ALL) -> tuple[AddInPlace, GradInPlace]:
    """What `efficient` adds in place, and its gradients."""

    def add_(x: Tensor, y: Tensor, tensors: pc.Tensors, binding: pc.Tensors) -> tuple[Tensor, ...]:
        S = _last.of(x, shards) if drop is KEEP_ALL else shards.sum(x, drop)  # [tokens, r]
        wide = thin.widened(S)
        thin.add_(y, wide, _tiled(tensors["D"], d, wide.dtype), scale)
        return (S,)

    def grad_(
        dy: Tensor, dx: Tensor | None, saved: tuple[Tensor, ...], tensors: pc.Tensors, binding: pc.Tensors
    ) -> dict[str, Tensor]:
        D, dy = tensors["D"], thin.widened(dy)
        if dx is not None:
            dS = torch.mm(dy, _tiled(D, d, dy.dtype).t())  # [tokens, r]
            shards.expand_add_(dS, dx, scale, drop)
        dD = torch.mm(thin.widened(saved[0]).t(), dy)  # [r, d]
        if D.shape[1] != d:
            dD = dD.view(shards.r, -1, D.shape[1]).sum(1, dtype=D.dtype)
        return {"D": dD if scale == 1.0 else dD * scale}

    return add_, grad_


_pair = functools.cache(efficient_pair)
"""One for all sites of a kind, which then find it in the processor's caches."""


def _tiled(D: Tensor, d: int, dtype: torch.dtype) -> Tensor:
    """D [r, m] as [r, d]."""
    D = D.to(dtype)
    return D if D.shape[1] == d else D.repeat(1, d // D.shape[1])


def expand(d: int, r: int, sizes: tuple[int, ...] | None, scale: float) -> pc.Forward:
    """ΔW = s·Eᵀ·D with D [r, in] and the indicator of the output's shards."""
    shard_of = _shard_of(d, r, False, sizes)
    shards = Shards(d, r, False, sizes)

    def reference(x: Tensor, tensors: pc.Tensors, binding: pc.Tensors) -> Tensor:
        if torch.compiler.is_compiling():
            return shards.repeat(x @ tensors["D"].to(x.dtype).T) * scale
        return naive.expand(x, tensors["D"], shard_of.to(x.device), scale)

    def add_(x: Tensor, y: Tensor, tensors: pc.Tensors, binding: pc.Tensors) -> tuple[Tensor, ...]:
        wide = thin.widened(x)
        z = torch.mm(wide, tensors["D"].to(wide.dtype).t())  # [tokens, r]
        shards.expand_add_(z, y, scale)
        return (x,)

    def grad_(
        dy: Tensor, dx: Tensor | None, saved: tuple[Tensor, ...], tensors: pc.Tensors, binding: pc.Tensors
    ) -> dict[str, Tensor]:
        dz = thin.widened(shards.sum(dy))  # [tokens, r]
        if dx is not None:
            thin.add_(dx, dz, tensors["D"].to(dz.dtype), scale)
        dD = torch.mm(dz.t(), thin.widened(saved[0]))  # [r, in]
        return {"D": dD if scale == 1.0 else dD * scale}

    return pc.Forward(reference, add_, grad_)


def bat(scale: float) -> pc.Forward:
    """Wᵢⱼ + s·(Wᵢⱼ·Dᵢ + Dᵢ), from the base weight: the reference alone, since it is not an added Δ."""

    def reference(x: Tensor, tensors: pc.Tensors, binding: pc.Tensors) -> Tensor:
        return naive.bat(x, tensors["D"], tensors["base_weight"], scale)

    return pc.Forward(reference)
