"""The update of W that keeps the function while vectors are exchanged: one pass for all of a step's exchanges."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from peft_core.kernels import chosen, use_triton

from . import naive


def switch_update_(weight: Tensor, columns: Tensor, rows: Tensor, scale: float) -> None:
    """W += s·columns·rows in place; W [out, in], columns [out, k], rows [k, in] in W's dtype or a wider one.

    If W is narrower than the product, the sum is rounded once.
    """
    if chosen() == "naive":
        naive.switch_update_(weight, columns, rows, scale)
        return
    if use_triton(weight):
        from . import triton_kernels

        triton_kernels.switch_update_(weight, columns, rows, scale)
        return
    with _full_float32():
        if weight.dtype == columns.dtype:
            weight.addmm_(columns, rows, alpha=scale)
        else:
            weight.add_(columns @ rows, alpha=scale)


@contextmanager
def _full_float32() -> Iterator[None]:
    """float32 products in full float32, whatever the user allows for the model: in TF32, W would drift."""
    if not hasattr(torch.backends, "fp32_precision"):  # torch < 2.9
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    lowered = [(b, b.fp32_precision) for b in backends if b.fp32_precision in ("tf32", "bf16")]
    try:
        for backend, _ in lowered:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in lowered:
            backend.fp32_precision = precision
