"""SwitchLoRA in Triton: a step's exchanges on a site in one pass over W, which is read and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_core.launching import blocks, launch, operator

OUT, IN = 16, 256  # of W in one program's hands


@triton.jit(do_not_specialize=["count"])
def _switch_update(
    weight, columns, rows, outs, ins, count, w_out, w_in, c_out, c_k, r_k, r_in, scale,
    OUT: tl.constexpr, IN: tl.constexpr,
):  # fmt: skip
    """weight += scale·columns·rows, by outer products: `count` is a handful, and float32 must stay float32."""
    row = tl.program_id(0).to(tl.int64) * OUT + tl.arange(0, OUT)
    column = tl.program_id(1).to(tl.int64) * IN + tl.arange(0, IN)
    where = weight + row[:, None] * w_out + column[None, :] * w_in
    mask = (row < outs)[:, None] & (column < ins)[None, :]
    before = tl.load(where, mask=mask, other=0.0).to(tl.float32)  # on its way while the products are formed
    total = tl.zeros([OUT, IN], tl.float32)
    for k in range(count):
        left = tl.load(columns + row * c_out + k * c_k, mask=row < outs, other=0.0)
        right = tl.load(rows + k * r_k + column * r_in, mask=column < ins, other=0.0)
        total += left[:, None] * right[None, :]
    tl.store(where, (before + scale * total).to(weight.dtype.element_ty), mask=mask)


@operator("peft_method_switchlora::switch_update_", mutates=("weight",))
def switch_update_(weight: Tensor, columns: Tensor, rows: Tensor, scale: float) -> None:
    """W += s·columns·rows in place, rounded once; W [out, in] of any strides, columns [out, k] and rows [k, in] float32."""
    if weight.stride(0) < weight.stride(1):  # a transposed view: walk along its neighbours, too
        weight, columns, rows = weight.t(), rows.t(), columns.t()
    outs, ins = weight.shape
    launch(
        _switch_update, (blocks(outs, OUT), blocks(ins, IN)),
        weight, columns, rows, outs, ins, columns.shape[1],
        *weight.stride(), *columns.stride(), *rows.stride(), scale,
        OUT=OUT, IN=IN,
    )  # fmt: skip


def examples() -> None:
    """Launches to compile ahead of time: a float32 master, a 16-bit weight, a transposed one."""
    columns, rows = torch.empty(4096, 6, device="meta"), torch.empty(6, 14336, device="meta")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        switch_update_(torch.empty(4096, 14336, dtype=dtype, device="meta"), columns, rows, 0.1)
    switch_update_(torch.empty(14336, 4096, device="meta").t(), columns, rows, 0.1)
