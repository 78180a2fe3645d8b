"""MoS, mixture of shards (arXiv 2410.00938): low-rank factors made of pieces from pools that layers share."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from peft_core import Capabilities, Forward, Layout, LowRank, MethodInfo, Site, Tensors, hookimpl, lowrank

from .kernels import forward
from .layout import lay_out
from .naive import factors
from .options import MoSOptions, RandomScaling

__all__ = ["MoSOptions", "RandomScaling"]


@hookimpl
def peft_method() -> MethodInfo:
    return MethodInfo(
        name="mos",
        options=MoSOptions,
        capabilities=Capabilities(lowrank=True),
        summary="low-rank factors made of shards from pools that all layers share",
        paper="arXiv 2410.00938",
        trials=(
            {"r": 3, "equivalent_rank": 2, "shards": 3, "private_rank": 1},
            {"r": 4, "equivalent_rank": 2, "shards": 1, "private_rank": 0, "alpha": 6.0},
            {"r": 3, "equivalent_rank": 2, "shards": 3, "private_rank": 0, "pair_dissociation": False},
            {"r": 2, "equivalent_rank": 2, "shards": 3, "private_rank": 2, "random_scaling": {"mean": 2.0}},
            {"equivalent_rank": 1, "subset_selection": False, "alpha": 3.0},
        ),
    )


@hookimpl
def peft_init(sites: Sequence[Site]) -> Layout:
    return lay_out(sites)


@hookimpl
def peft_forward(site: Site) -> Forward:
    return forward(site.options.alpha)


@hookimpl
def peft_merge(site: Site, weight: Tensor, tensors: Tensors, binding: Tensors) -> Tensor:
    A, B = factors(tensors, binding, weight.dtype)
    return lowrank.merged(weight, A, B, site.options.alpha / len(A))


@hookimpl
def peft_lowrank(site: Site, tensors: Tensors, binding: Tensors) -> LowRank:
    A, B = factors(tensors, binding, tensors["pool_B"].dtype)
    return LowRank(A, B * (site.options.alpha / len(A)))
