"""ShareLoRA (arXiv 2406.10785): LoRA with A, B or both shared by all layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

import peft_core as pc

from .layout import lay_out
from .options import Options

__all__ = ["Options"]


@pc.hookimpl
def peft_method() -> pc.MethodInfo:
    return pc.MethodInfo(
        name="sharelora",
        options=Options,
        capabilities=pc.Capabilities(lowrank=True),
        summary="LoRA whose A, B or both are shared by all layers",
        paper="arXiv 2406.10785",
        trials=(
            {"r": 4},
            {"r": 4, "alpha": 6.0, "share": "B"},
            {"r": 3, "share": "AB"},
            {"r": 4, "alpha": 8.0, "share": "none"},
            {"r": 4, "share": {".*": "AB"}},
            {"r": 4, "share": "A", "scope": 1},
        ),
    )


@pc.hookimpl
def peft_init(sites: Sequence[pc.Site]) -> pc.Layout:
    return lay_out(sites)


@pc.hookimpl
def peft_forward(site: pc.Site) -> pc.Forward:
    return pc.lowrank.forward(site.options.scale)


@pc.hookimpl
def peft_merge(site: pc.Site, weight: Tensor, tensors: pc.Tensors, binding: pc.Tensors) -> Tensor:
    return pc.lowrank.merged(weight, tensors["A"], tensors["B"], site.options.scale)


@pc.hookimpl
def peft_lowrank(site: pc.Site, tensors: pc.Tensors, binding: pc.Tensors) -> pc.LowRank:
    return pc.LowRank(tensors["A"], tensors["B"] * site.options.scale)
