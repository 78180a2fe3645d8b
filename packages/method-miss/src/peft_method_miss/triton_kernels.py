"""MiSS in Triton: the two passes over activations, each of which moves every element once.

Columns are addressed as (shard i, place j within the shard). Every program takes some rows and some shards and walks along
the places, in four quarters at a time, because one call of the random generator gives four numbers. Both kernels number
elements alike, so that what one drops the other drops.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_core.launching import blocks, launch, operator, power_of_two

ROWS = 4
TILE = 256  # elements of one row that a program has in flight, per quarter
ROUNDS = tl.constexpr(7)  # of Philox 4×32; fewer than the usual 10, still without a known defect


@triton.jit
def _columns(shard, place, starts, COUNT: tl.constexpr, R: tl.constexpr, LAYOUT: tl.constexpr):
    """Column of each (shard, place), and whether there is one; `shard` and `place` broadcast against each other."""
    if LAYOUT == "interleaved":
        column = place * R + shard
        inside = column < COUNT
    elif LAYOUT == "contiguous" and COUNT % R == 0:  # apart from the next, so that the compiler sees aligned runs
        column = shard * (COUNT // R) + place
        inside = place < COUNT // R
    elif LAYOUT == "contiguous":
        column = shard * (COUNT // R) + tl.minimum(shard, COUNT % R) + place
        inside = place < COUNT // R + (shard < COUNT % R).to(tl.int32)
    else:
        start = tl.load(starts + shard, mask=shard < R, other=0)
        column = start + place
        inside = column < tl.load(starts + shard + 1, mask=shard < R, other=0)
    return column, inside & (shard < R)


@triton.jit
def _keeps(quarter: tl.constexpr, first, second, third, fourth, drop):
    """Where this quarter keeps its elements, of the four numbers that the generator gave for each."""
    drawn = first if quarter == 0 else second if quarter == 1 else third if quarter == 2 else fourth
    return tl.uint_to_uniform_float(drawn) >= drop


@triton.jit(do_not_specialize=["seed", "rows"])
def _shard_sum(
    x, S, starts, rows, x_row, x_column, drop, seed,
    COUNT: tl.constexpr, R: tl.constexpr, LAYOUT: tl.constexpr, LONGEST: tl.constexpr, DROPS: tl.constexpr,
    ROWS: tl.constexpr, SHARDS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """S[n, i] = Σ x[n, j] over the columns j of shard i, each dropped with probability `drop`, else divided by 1 - drop."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    shard = tl.program_id(1) * SHARDS + tl.arange(0, SHARDS)
    # The last axis is the one whose neighbours lie side by side in memory. Threads add up what they read themselves, and
    # only at the end what others have.
    axis: tl.constexpr = 1 if LAYOUT == "interleaved" else 2
    total = tl.zeros([ROWS, PLACES, SHARDS] if LAYOUT == "interleaved" else [ROWS, SHARDS, PLACES], tl.float32)
    for start in range(0, LONGEST, 4 * PLACES):
        place = tl.expand_dims(tl.expand_dims(tl.arange(0, PLACES), 0), 3 - axis)
        lane = tl.expand_dims(tl.expand_dims(shard, 0), axis)
        if DROPS:
            number = (row[:, None, None] * R + lane) * LONGEST + start + place
            first, second, third, fourth = tl.randint4x(seed, number, ROUNDS)
        for quarter in tl.static_range(4):
            column, inside = _columns(lane, start + quarter * PLACES + place, starts, COUNT, R, LAYOUT)
            where = row[:, None, None] * x_row + column.to(tl.int64) * x_column
            value = tl.load(x + where, mask=inside & (row < rows)[:, None, None], other=0.0).to(tl.float32)
            if DROPS:
                value = tl.where(_keeps(quarter, first, second, third, fourth, drop), value, 0.0)
            total += value
    S_tile = tl.sum(total, axis)
    if DROPS:
        S_tile /= 1 - drop
    to = row[:, None] * R + shard[None, :]
    tl.store(S + to, S_tile.to(S.dtype.element_ty), mask=(row < rows)[:, None] & (shard < R)[None, :])


@triton.jit(do_not_specialize=["seed", "rows"])
def _shard_expand_add(
    y, S, starts, rows, y_row, y_column, S_row, S_column, scale, drop, seed,
    COUNT: tl.constexpr, R: tl.constexpr, LAYOUT: tl.constexpr, LONGEST: tl.constexpr, DROPS: tl.constexpr,
    ROWS: tl.constexpr, SHARDS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """y[n, j] += scale·S[n, i] for every column j of shard i, but for what `_shard_sum` drops."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    shard = tl.program_id(1) * SHARDS + tl.arange(0, SHARDS)
    axis: tl.constexpr = 1 if LAYOUT == "interleaved" else 2
    at = row[:, None] * S_row + shard[None, :].to(tl.int64) * S_column
    part = tl.load(S + at, mask=(row < rows)[:, None] & (shard < R)[None, :], other=0.0).to(tl.float32) * scale
    if DROPS:
        part /= 1 - drop
    part = tl.expand_dims(part, axis)
    for start in range(0, LONGEST, 4 * PLACES):
        place = tl.expand_dims(tl.expand_dims(tl.arange(0, PLACES), 0), 3 - axis)
        lane = tl.expand_dims(tl.expand_dims(shard, 0), axis)
        if DROPS:
            number = (row[:, None, None] * R + lane) * LONGEST + start + place
            first, second, third, fourth = tl.randint4x(seed, number, ROUNDS)
        for quarter in tl.static_range(4):
            column, inside = _columns(lane, start + quarter * PLACES + place, starts, COUNT, R, LAYOUT)
            mask = inside & (row < rows)[:, None, None]
            where = row[:, None, None] * y_row + column.to(tl.int64) * y_column
            before = tl.load(y + where, mask=mask, other=0.0).to(tl.float32)
            added = part
            if DROPS:
                added = tl.where(_keeps(quarter, first, second, third, fourth, drop), part, 0.0)
            tl.store(y + where, (before + added).to(y.dtype.element_ty), mask=mask)


@functools.cache
def _shape(count: int, r: int, layout: str, longest: int) -> dict[str, int]:
    """How many shards and places a tile has: long runs of neighbours first, since they are read together."""
    places = power_of_two(blocks(longest, 4))
    shards = min(power_of_two(r), 128 if layout == "interleaved" else TILE // min(places, 64))
    places = min(places, TILE // shards)
    return {"COUNT": count, "R": r, "LONGEST": longest, "ROWS": ROWS, "SHARDS": shards, "PLACES": places}


def _layout(r: int, interleaved: bool, starts: Tensor | None) -> str:
    if interleaved or r == 1:  # one shard is the same in every layout
        return "interleaved"
    return "contiguous" if starts is None else "sized"


def _fake_shard_sum(
    x: Tensor, r: int, interleaved: bool, starts: Tensor | None, longest: int, drop: float, seed: int
) -> Tensor:
    return x.new_empty(x.shape[0], r)


@operator("peft_method_miss::shard_sum", _fake_shard_sum)
def shard_sum(
    x: Tensor, r: int, interleaved: bool, starts: Tensor | None, longest: int, drop: float, seed: int
) -> Tensor:
    """S [tokens, r] in x's dtype, from x [tokens, columns] of any strides.

    Args:
        interleaved: column j belongs to shard j mod r; otherwise shards are runs, as equal as possible, longer first.
        starts: int32 [r + 1], where runs of other lengths begin and the last one ends.
        longest: the length of the longest shard. drop: probability of an element to be dropped. seed: decides which.
    """
    tokens, count = x.shape
    S = torch.empty(tokens, r, dtype=x.dtype, device=x.device)
    layout = _layout(r, interleaved, starts)
    shape = _shape(count, r, layout, longest)
    launch(
        _shard_sum, (blocks(tokens, ROWS), blocks(r, shape["SHARDS"])),
        x, S, starts, tokens, x.stride(0), x.stride(1), drop, seed,
        LAYOUT=layout, DROPS=drop > 0, **shape,
    )  # fmt: skip
    return S


@operator("peft_method_miss::shard_expand_add_", mutates=("y",))
def shard_expand_add_(
    y: Tensor, S: Tensor, interleaved: bool, starts: Tensor | None, longest: int, scale: float, drop: float, seed: int
) -> None:
    """y[n, j] += scale·S[n, i] in place for every column j of shard i: y [tokens, columns], S [tokens, r]."""
    tokens, count = y.shape
    r = S.shape[1]
    layout = _layout(r, interleaved, starts)
    shape = _shape(count, r, layout, longest)
    launch(
        _shard_expand_add, (blocks(tokens, ROWS), blocks(r, shape["SHARDS"])),
        y, S, starts, tokens, y.stride(0), y.stride(1), S.stride(0), S.stride(1), scale, drop, seed,
        LAYOUT=layout, DROPS=drop > 0, **shape,
    )  # fmt: skip


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, interleaved, starts, *rest = inputs
    ctx.save_for_backward(starts)
    ctx.columns, ctx.interleaved, ctx.rest = x.shape[1], interleaved, rest


def _gradient(ctx: Any, dS: Tensor) -> tuple[Tensor, None, None, None, None, None, None]:
    (starts,) = ctx.saved_tensors
    longest, drop, seed = ctx.rest
    dx = dS.new_zeros(dS.shape[0], ctx.columns)
    shard_expand_add_(dx, dS, ctx.interleaved, starts, longest, 1.0, drop, seed)
    return dx, None, None, None, None, None, None


shard_sum.operator.register_autograd(_gradient, setup_context=_save)  # type: ignore[attr-defined]


def examples() -> None:
    """Launches to compile ahead of time: a layer of Llama-3.1-8B in both layouts, ragged shards, with dropout and without."""
    x = torch.empty(8192, 4096, dtype=torch.bfloat16, device="meta")
    starts = torch.empty(65, dtype=torch.int32, device="meta")
    seed = 2**40
    for r, interleaved, begin, longest, drop in [
        (16, True, None, 256, 0.0),
        (64, True, None, 64, 0.0),
        (64, True, None, 64, 0.1),
        (64, False, None, 64, 0.0),
        (64, False, None, 64, 0.1),
        (60, False, None, 69, 0.0),
        (48, True, None, 86, 0.0),
        (3, False, None, 1366, 0.0),
        (4096, True, None, 1, 0.1),
        (64, False, starts, 100, 0.0),
    ]:
        S = shard_sum(x, r, interleaved, begin, longest, drop, seed)
        shard_expand_add_(x, S, interleaved, begin, longest, 1.0, drop, seed)
