"""MoS in Triton: the factors of any number of sites from their pools in one launch, and their gradients back into the pools.

Pieces are numbered through sites, rows and places in a row. A piece is where its factor's memory is, so a factor is written
in the order of its pieces; a shard's gradient is the sum over the pieces that it filled, taken in their order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_core.launching import blocks, launch, operator, power_of_two


@triton.jit
def _gather(
    pool_A, pool_B, index, scaling, A, Bt, width_A, width_B, a_row, a_column, b_row, b_column,
    PER_SITE: tl.constexpr, PER_ROW: tl.constexpr, SIDES: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program copies a part of one piece, of A or, in the programs after those, of B."""
    piece = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    at = (piece // PER_SITE) * (SIDES * PER_SITE) + piece % PER_SITE
    parts_of_A = tl.cdiv(width_A, BLOCK)
    if part < parts_of_A:
        column = part * BLOCK + tl.arange(0, BLOCK)
        shard = tl.load(index + at).to(tl.int64)
        value = tl.load(pool_A + shard * a_row + column.to(tl.int64) * a_column, mask=column < width_A).to(tl.float32)
        if SCALED:
            value *= tl.load(scaling + piece // PER_ROW)
        tl.store(A + piece * width_A + column, value.to(A.dtype.element_ty), mask=column < width_A)
    else:
        column = (part - parts_of_A) * BLOCK + tl.arange(0, BLOCK)
        shard = tl.load(index + at + (SIDES - 1) * PER_SITE).to(tl.int64)
        value = tl.load(pool_B + shard * b_row + column.to(tl.int64) * b_column, mask=column < width_B).to(tl.float32)
        tl.store(Bt + piece * width_B + column, value.to(Bt.dtype.element_ty), mask=column < width_B)


@triton.jit
def _sum(
    dA, dBt, order_A, order_B, begin_A, begin_B, scaling, pool_A, pool_B, shards_A, shards_B, width_A, width_B,
    PER_ROW: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program owns a part of one shard of a pool, and adds up what the pieces that it filled got."""
    shard = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    parts_of_A = tl.cdiv(width_A, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    if part < parts_of_A:
        column = part * BLOCK + tl.arange(0, BLOCK)
        if shard < shards_A:
            for i in range(tl.load(begin_A + shard), tl.load(begin_A + shard + 1)):
                piece = tl.load(order_A + i)
                value = tl.load(dA + piece * width_A + column, mask=column < width_A, other=0.0).to(tl.float32)
                if SCALED:
                    value *= tl.load(scaling + piece // PER_ROW)
                total += value
            tl.store(pool_A + shard * width_A + column, total.to(pool_A.dtype.element_ty), mask=column < width_A)
    else:
        column = (part - parts_of_A) * BLOCK + tl.arange(0, BLOCK)
        if shard < shards_B:
            for i in range(tl.load(begin_B + shard), tl.load(begin_B + shard + 1)):
                piece = tl.load(order_B + i)
                total += tl.load(dBt + piece * width_B + column, mask=column < width_B, other=0.0).to(tl.float32)
            tl.store(pool_B + shard * width_B + column, total.to(pool_B.dtype.element_ty), mask=column < width_B)


def _fake_gather(
    pool_A: Tensor, pool_B: Tensor, index: Tensor, scaling: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    sites, _, r, pieces = index.shape
    return (
        pool_A.new_empty(sites, r, pieces * pool_A.shape[1], dtype=dtype),
        pool_B.new_empty(sites, r, pieces * pool_B.shape[1], dtype=dtype),
    )


@operator("peft_method_mos::gather_factors", _fake_gather)
def gather_factors(
    pool_A: Tensor, pool_B: Tensor, index: Tensor, scaling: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A [sites, r, in] and Bᵀ [sites, r, out] in `dtype`, of all these sites in one launch.

    Args:
        pool_A, pool_B: [shards, in/l] and [shards, out/l].
        index: I_A and I_B of every site, or one for both: int32 [sites, 2 or 1, r, l].
        scaling: factors of A's rows, float32 [sites, r].
    """
    sites, sides, r, pieces = index.shape
    A, Bt = _fake_gather(pool_A, pool_B, index, scaling, dtype)
    widths = pool_A.shape[1], pool_B.shape[1]
    block = min(power_of_two(max(widths)), 1024)
    launch(
        _gather, (sites * r * pieces, sum(blocks(width, block) for width in widths)),
        pool_A, pool_B, index.contiguous(), None if scaling is None else scaling.contiguous(), A, Bt,
        *widths, *pool_A.stride(), *pool_B.stride(),
        PER_SITE=r * pieces, PER_ROW=pieces, SIDES=sides, SCALED=scaling is not None, BLOCK=block,
    )  # fmt: skip
    return A, Bt


def _fake_sum(
    dA: Tensor, dBt: Tensor, index: Tensor, scaling: Tensor | None, shards_A: int, shards_B: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    pieces = index.shape[-1]
    return (
        dA.new_empty(shards_A, dA.shape[-1] // pieces, dtype=dtype),
        dBt.new_empty(shards_B, dBt.shape[-1] // pieces, dtype=dtype),
    )


@operator("peft_method_mos::sum_factors", _fake_sum)
def sum_factors(
    dA: Tensor, dBt: Tensor, index: Tensor, scaling: Tensor | None, shards_A: int, shards_B: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradients of the pools in `dtype`, from those of `gather_factors`' outputs: no atomics, the same bits in every run."""
    pool_A, pool_B = _fake_sum(dA, dBt, index, scaling, shards_A, shards_B, dtype)
    widths = pool_A.shape[1], pool_B.shape[1]
    block = min(power_of_two(max(widths)), 1024)
    (order_A, begin_A), (order_B, begin_B) = inverted(index[:, 0], shards_A), inverted(index[:, -1], shards_B)
    launch(
        _sum, (max(shards_A, shards_B), sum(blocks(width, block) for width in widths)),
        dA.contiguous(), dBt.contiguous(), order_A, order_B, begin_A, begin_B,
        None if scaling is None else scaling.contiguous(), pool_A, pool_B, shards_A, shards_B, *widths,
        PER_ROW=index.shape[-1], SCALED=scaling is not None, BLOCK=block,
    )  # fmt: skip
    return pool_A, pool_B


def inverted(index: Tensor, shards: int) -> tuple[Tensor, Tensor]:
    """The pieces that each shard fills: their numbers int64 [pieces], shard by shard, and where each begins [shards + 1]."""
    filled, order = index.reshape(-1).sort(stable=True)
    return order, torch.searchsorted(filled, torch.arange(shards + 1, dtype=filled.dtype, device=filled.device))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    pool_A, pool_B, index, scaling, _ = inputs
    ctx.save_for_backward(index, scaling)
    ctx.rest = pool_A.shape[0], pool_B.shape[0], pool_A.dtype


def _gradient(ctx: Any, dA: Tensor, dBt: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
    return (*sum_factors(dA, dBt, *ctx.saved_tensors, *ctx.rest), None, None, None)


gather_factors.operator.register_autograd(_gradient, setup_context=_save)  # type: ignore[attr-defined]


def examples() -> None:
    """Launches to compile ahead of time: one site, and all down-projections of Llama-3.1-8B; plain and with scaling."""
    pool_A = torch.empty(256, 3584, device="meta")
    pool_B = torch.empty(256, 1024, device="meta")
    for sites, scaled in [(1, False), (32, False), (32, True)]:
        index = torch.empty(sites, 2, 16, 4, dtype=torch.int32, device="meta")
        scaling = torch.empty(sites, 16, device="meta") if scaled else None
        A, Bt = gather_factors(pool_A, pool_B, index, scaling, torch.bfloat16)
        sum_factors(A, Bt, index, scaling, 256, 256, torch.float32)
