"""SwitchLoRA (arXiv 2406.06564): full-rank learning in which vectors of low-rank factors are exchanged for others."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

import peft_core as pc

from . import naive, switching
from .layout import lay_out
from .optimizer import RowAdamW
from .options import Options

__all__ = ["Options", "RowAdamW"]


@pc.hookimpl
def peft_method() -> pc.MethodInfo:
    return pc.MethodInfo(
        name="switchlora",
        options=Options,
        capabilities=pc.Capabilities(
            owns_base_weight=True, starts_at_zero=False, lowrank=False, dropout=False, optimizer_step=True
        ),
        summary="full-rank learning with low-rank gradients: vectors of B and A are exchanged in training",
        paper="arXiv 2406.06564",
        trials=(
            {"r": 4, "interval": 4, "freeze_steps": 2, "total_steps": 100},
            {"r": 4, "alpha": 3, "interval": 2, "freeze_steps": 1, "total_steps": 100, "order": "random"},
        ),
        optimizer=RowAdamW,
    )


@pc.hookimpl
def peft_init(sites: Sequence[pc.Site]) -> pc.Layout:
    return lay_out(sites)


@pc.hookimpl
def peft_attach(site: pc.Site, weight: Tensor, tensors: pc.Tensors, binding: pc.Tensors) -> Tensor:
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    moved = naive.split_off(wide, tensors["A"], tensors["B"], site.options.scale)
    return moved if site.options.keeps_master(weight.dtype) else moved.to(weight.dtype)


@pc.hookimpl
def peft_forward(site: pc.Site) -> pc.Forward:
    return pc.lowrank.forward(site.options.scale)


@pc.hookimpl
def peft_optimizer_step(step: pc.OptimizerStep) -> AbstractContextManager[Any]:
    return switching.switching(step)


@pc.hookimpl
def peft_merge(site: pc.Site, weight: Tensor, tensors: pc.Tensors, binding: pc.Tensors) -> Tensor:
    return pc.lowrank.merged(weight, tensors["A"], tensors["B"], site.options.scale)


@pc.hookimpl
def peft_lowrank(site: pc.Site, tensors: pc.Tensors, binding: pc.Tensors) -> pc.LowRank:
    raise pc.MergeError(
        f"'{site.path}': SwitchLoRA has moved weight into the base, so its change has full rank and no exact low-rank "
        "factors; merge the adapter, or ask for a truncated SVD, whose error is reported"
    )
