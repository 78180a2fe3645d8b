"""MoS, mixture of shards (arXiv 2410.00938): low-rank factors made of pieces from pools that layers share."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

import peft_core as pc

from .kernels import forward
from .layout import lay_out
from .naive import factors
from .options import Options, RandomScaling

__all__ = ["Options", "RandomScaling"]


@pc.hookimpl
def peft_method() -> pc.MethodInfo:
    return pc.MethodInfo(
        name="mos",
        options=Options,
        capabilities=pc.Capabilities(lowrank=True),
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


@pc.hookimpl
def peft_init(sites: Sequence[pc.Site]) -> pc.Layout:
    return lay_out(sites)


@pc.hookimpl
def peft_forward(site: pc.Site) -> pc.Forward:
    return forward(site.options.alpha)


@pc.hookimpl
def peft_merge(site: pc.Site, weight: Tensor, tensors: pc.Tensors, binding: pc.Tensors) -> Tensor:
    A, B = factors(tensors, binding, weight.dtype)
    return pc.lowrank.merged(weight, A, B, site.options.alpha / len(A))


@pc.hookimpl
def peft_lowrank(site: pc.Site, tensors: pc.Tensors, binding: pc.Tensors) -> pc.LowRank:
    A, B = factors(tensors, binding, tensors["pool_B"].dtype)
    return pc.LowRank(A, B * (site.options.alpha / len(A)))
