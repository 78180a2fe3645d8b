"""The accumulating pair: core's low-rank product on the borrowed factors."""

from __future__ import annotations

from functools import cache

from torch import Tensor

from peft_core import Forward, lowrank
from peft_core.method import Tensors

from . import naive


@cache
def forward(scale: float) -> Forward:
    """Δ(x) for a scale: the same functions for every site and shape, so that compiled code is reused."""

    def reference(x: Tensor, tensors: Tensors, binding: Tensors) -> Tensor:
        return naive.delta(x, tensors, scale)

    def add_(x: Tensor, y: Tensor, tensors: Tensors, binding: Tensors) -> tuple[Tensor, ...]:
        return x, lowrank.add_(x, y, tensors["A"], tensors["B"], scale)  # [tokens, in], [tokens, r]

    def grad_(
        dy: Tensor, dx: Tensor | None, saved: tuple[Tensor, ...], tensors: Tensors, binding: Tensors
    ) -> dict[str, Tensor]:
        x, h = saved
        dA, dB = lowrank.grad_(dy, dx, x, h, tensors["A"], tensors["B"], scale)
        return {"A": dA, "B": dB}

    return Forward(reference, add_, grad_)
