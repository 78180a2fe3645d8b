"""The mathematics of MiSS, for reading, and the reference of every kernel. Any floating dtype, any device."""

from __future__ import annotations

import torch
from torch import Tensor


def shard_of(
    count: int,
    r: int,
    interleaved: bool,
    sizes: tuple[int, ...] | None = None,
    device: torch.device | str = "cpu",  # whatever the default device is
) -> Tensor:
    """The shard that each of `count` columns belongs to, as int64 [count].

    Interleaved: j mod r. Otherwise runs of columns, of the given sizes or as equal as possible, longer first.
    """
    column = torch.arange(count, device=device)
    if interleaved:
        return column % r
    lengths = torch.tensor(sizes or [count // r + (i < count % r) for i in range(r)], device=device)
    return torch.bucketize(column, lengths.cumsum(0), right=True)


def shard_sum(x: Tensor, shards: Tensor, r: int) -> Tensor:
    """S_i = Σ x_j over the columns j of shard i: x [..., k] → S [..., r]."""
    return torch.zeros(*x.shape[:-1], r, dtype=x.dtype, device=x.device).index_add(-1, shards, x)


def efficient(x: Tensor, D: Tensor, shards: Tensor, scale: float) -> Tensor:
    """Δ(x) = s·S·D (the paper's MiSSᵉ): x [..., k], D [r, d] → [..., d]."""
    return shard_sum(x, shards, D.shape[0]) @ D.to(x.dtype) * scale


def mini(x: Tensor, D: Tensor, shards: Tensor, scale: float, d: int) -> Tensor:
    """`efficient` with D [r, m] tiled d/m times along the output: x [..., k] → [..., d]."""
    return efficient(x, D.repeat(1, d // D.shape[1]), shards, scale)


def expand(x: Tensor, D: Tensor, shards: Tensor, scale: float) -> Tensor:
    """Δ(x)_j = s·(D x)_i for each output j of shard i (the paper's basic MiSS): x [..., k], D [r, k]."""
    return (x @ D.to(x.dtype).T)[..., shards] * scale


def bat_delta(weight: Tensor, D: Tensor, scale: float) -> Tensor:
    """ΔW with the blocks s·(Wᵢⱼ·Dᵢ + Dᵢ), each r × r: W [d, k], D [d/r, r, r] → [d, k]."""
    rows, r, _ = D.shape
    D = D.to(weight.dtype)
    blocks = weight.reshape(rows, r, -1, r)  # [d/r, r, k/r, r]
    delta = torch.einsum("iajb,ibc->iajc", blocks, D) + D.unsqueeze(2)
    return delta.reshape(weight.shape) * scale


def bat(x: Tensor, D: Tensor, weight: Tensor, scale: float) -> Tensor:
    """Δ(x) = x·ΔWᵀ: x [..., k], D [d/r, r, r], base weight [d, k] → [..., d]."""
    return x @ bat_delta(weight.to(x.dtype), D, scale).T
