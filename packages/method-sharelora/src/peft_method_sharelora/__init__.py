"""ShareLoRA (arXiv 2406.10785): LoRA with A, B or both shared by all layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from peft_core import Capabilities, Forward, Layout, LowRank, MethodInfo, Site, Tensors, hookimpl, lowrank

from .layout import lay_out
from .options import ShareLoRAOptions

__all__ = ["ShareLoRAOptions"]


@hookimpl
def peft_method() -> MethodInfo:
    return MethodInfo(
        name="sharelora",
        options=ShareLoRAOptions,
        capabilities=Capabilities(lowrank=True),
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


@hookimpl
def peft_init(sites: Sequence[Site]) -> Layout:
    return lay_out(sites)


@hookimpl
def peft_forward(site: Site) -> Forward:
    return lowrank.forward(_scale(site))


@hookimpl
def peft_merge(site: Site, weight: Tensor, tensors: Tensors, binding: Tensors) -> Tensor:
    return lowrank.merged(weight, tensors["A"], tensors["B"], _scale(site))


@hookimpl
def peft_lowrank(site: Site, tensors: Tensors, binding: Tensors) -> LowRank:
    return LowRank(tensors["A"], tensors["B"] * _scale(site))


def _scale(site: Site) -> float:
    options: ShareLoRAOptions = site.options
    return options.alpha / options.r
