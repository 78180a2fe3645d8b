"""SwitchLoRA, readable: one vector after the other. The fast path is tested against it."""

from __future__ import annotations

import torch
from torch import Tensor

import peft_core as pc


def split_off(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """W₀' = W₀ − s·B·A: what is left in the base, so that W₀'x + s·B·A·x is W₀x."""
    return pc.lowrank.merged(weight, A, B, -scale)


def switch_column(weight: Tensor, A: Tensor, B: Tensor, i: int, candidate: Tensor, scale: float) -> None:
    """Column b_i of B makes way for `candidate`, and W absorbs the difference: W += s·(b_i − b'_j)·a_i."""
    weight += scale * torch.outer(B[:, i] - candidate, A[i])
    B[:, i] = candidate


def switch_row(weight: Tensor, A: Tensor, B: Tensor, i: int, candidate: Tensor, scale: float) -> None:
    """Row a_i of A makes way for `candidate`: W += s·b_i·(a_i − a'_j)."""
    weight += scale * torch.outer(B[:, i], A[i] - candidate)
    A[i] = candidate


def switch_update_(weight: Tensor, columns: Tensor, rows: Tensor, scale: float) -> None:
    """W += s·Σ_k columns[:, k]·rows[k], with a pass over W for each k."""
    for column, row in zip(columns.T, rows, strict=True):
        weight += scale * torch.outer(column, row)
