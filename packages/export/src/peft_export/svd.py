"""Truncated singular value decompositions, with their errors."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Up to this size every singular value is computed; above, only those that are wanted, by random projection.
_WHOLE = 1024
_OVERSAMPLING, _ITERATIONS = 16, 4


class Truncated(NamedTuple):
    """ΔW ≈ B·A.

    Attributes:
        A: [rank, in]. B: [out, rank]. error: ‖ΔW − BA‖ / ‖ΔW‖ (Frobenius).
    """

    A: Tensor
    B: Tensor
    error: float


def truncate(delta: Tensor, rank: int | None, energy: float | None) -> Truncated:
    """The best approximation of a matrix [out, in] of this rank, or of the smallest rank that keeps this share of ‖ΔW‖²."""
    total = float(delta.square().sum(dtype=torch.float64))
    most = min(rank or min(delta.shape), *delta.shape)
    if total == 0.0:
        return Truncated(delta.new_zeros(1, delta.shape[1]), delta.new_zeros(delta.shape[0], 1), 0.0)
    wanted = min(rank or 8, most)
    while True:
        U, S, V = _decompose(delta, wanted)
        enough = _enough(S, total, energy) if energy is not None else min(wanted, len(S))
        if enough is not None or len(S) >= most:
            break
        wanted = min(2 * wanted, most)
    kept = min(enough or most, most)
    A, B = _factors(U[:, :kept], S[:kept], V[:kept])
    lost = float((delta - B @ A).square().sum(dtype=torch.float64))
    return Truncated(A, B, math.sqrt(lost / total))


def reduce(A: Tensor, B: Tensor, rank: int | None, energy: float | None) -> Truncated:
    """Factors of at most this rank, or that keep this share of ‖BA‖², without forming BA; as they are if that is all."""
    if (rank is None or rank >= len(A)) and (energy is None or energy >= 1.0):
        return Truncated(A, B, 0.0)
    left, upper = torch.linalg.qr(B)
    right, lower = torch.linalg.qr(A.T)
    U, S, V = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    total = float(S.square().sum(dtype=torch.float64))
    enough = _enough(S, total, energy) if total else 1
    kept = min(enough or len(S), rank or len(S))
    if kept == len(A):
        return Truncated(A, B, 0.0)
    lost = float(S[kept:].square().sum(dtype=torch.float64))
    A, B = _factors(left @ U[:, :kept], S[:kept], V[:kept] @ right.T)
    return Truncated(A, B, math.sqrt(lost / total) if total else 0.0)


def rounded(found: Truncated, dtype: torch.dtype) -> Truncated:
    """The same factors with the error that they have once they are stored in this dtype.

    The product of the rounded factors differs from BA by (B − B')A + B'(A − A'). What a truncated SVD lost is orthogonal to
    that (up to a product of both errors), so that the squares add up.
    """
    A, B = found.A, found.B
    if torch.promote_types(A.dtype, dtype) == dtype:
        return found
    A_, B_ = A.to(dtype).to(A.dtype), B.to(dtype).to(B.dtype)
    square = _square(B, A)
    lost = _square(torch.cat([B - B_, B_], dim=1), torch.cat([A, A - A_]))
    if square == 0.0 or lost <= 0.0:  # NaN where a factor is beyond the dtype
        return found
    return found._replace(error=math.sqrt(found.error**2 + (1 - found.error**2) * lost / square))


def _square(B: Tensor, A: Tensor) -> float:
    """‖BA‖² (Frobenius), without forming the product."""
    return float(((B.T @ B) * (A @ A.T)).sum(dtype=torch.float64))


def _decompose(delta: Tensor, wanted: int) -> tuple[Tensor, Tensor, Tensor]:
    if min(delta.shape) <= _WHOLE or 2 * (wanted + _OVERSAMPLING) >= min(delta.shape):
        U, S, V = torch.linalg.svd(delta, full_matrices=False)
        return U, S, V
    # The same random projection for the same matrix size, whatever ran before.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        U, S, V = torch.svd_lowrank(delta, q=wanted + _OVERSAMPLING, niter=_ITERATIONS)
    return U[:, :wanted], S[:wanted], V[:, :wanted].T


def _enough(S: Tensor, total: float, energy: float | None) -> int | None:
    """How many singular values hold this share of the energy; None if those at hand do not, or no share is asked for."""
    if energy is None:
        return None
    reached = (S.double().square().cumsum(0) >= energy * total * (1 - 1e-9)).nonzero()
    return int(reached[0]) + 1 if len(reached) else None


def _factors(U: Tensor, S: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    root = S.sqrt()
    return root[:, None] * V, U * root
