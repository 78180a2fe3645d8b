"""Dropout of an adapter's input, where no kernel draws it as it reads.

On a CPU torch draws 64 bits for each element, one after the other, which takes several times as long as the layer's own product
(docs/performance.md). Sixteen bits decide as well: p is taken as the nearest multiple of 2⁻¹⁶.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import _torch

_STEPS = 1 << 16


def drop(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """x with each element dropped with probability p and the others times 1/(1 - p), and the mask of those (not 0: kept)."""
    p = _rounded(p)
    if x.device.type != "cpu":
        return torch.native_dropout(x, p, train=True)
    kept = _draw(x, p)
    return kept.to(x.dtype).mul_(x).mul_(1 / (1 - p)), kept


def add_kept_(dx: Tensor, inner: Tensor, kept: Tensor, p: float) -> None:
    """dx += inner / (1 - p) in place, where `drop` kept x: the gradient of what it gave."""
    dx.addcmul_(inner, kept.to(dx.dtype), value=1 / (1 - _rounded(p)))


def dropped(x: Tensor, p: float) -> Tensor:
    """What `drop` gives, differentiable. Compiled, traced and transformed code draws as torch does."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or _torch.is_tracing() or _torch.transforms_functions():
        return nn.functional.dropout(x, p)
    p = _rounded(p)
    return x * _draw(x, p).to(x.dtype) * (1 / (1 - p))


def _draw(x: Tensor, p: float) -> Tensor:
    """1 for what is kept and 0 for the rest, as int8, which torch converts several times as fast as bool."""
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device="cpu").random_(-(2**63), None)
    draws = words.view(torch.int16)[: x.numel()].view(x.shape)
    return torch.ge(draws, int(p * _STEPS) - _STEPS // 2, out=torch.empty_like(draws, dtype=torch.int8))


def _rounded(p: float) -> float:
    return min(round(p * _STEPS), _STEPS - 1) / _STEPS
