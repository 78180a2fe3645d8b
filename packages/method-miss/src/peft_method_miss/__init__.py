"""MiSS: Matrix Shard Sharing (arXiv 2409.15371), a method plugin of peft-core."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

import peft_core as pc

from . import kernels, naive
from .exchange import from_hf_peft, to_hf_peft
from .layout import lay_out
from .options import Options

__all__ = ["Options", "from_hf_peft", "to_hf_peft"]


@pc.hookimpl
def peft_method() -> pc.MethodInfo:
    return pc.MethodInfo(
        name="miss",
        options=Options,
        capabilities=_capabilities,
        summary="Matrix Shard Sharing: one matrix per layer, repeated over shards of the weight",
        paper="arXiv 2409.15371",
        trials=(
            {"r": 4},
            {"r": 7, "alpha": 3.0},
            {"r": 5, "layout": "contiguous", "alpha": 2.0},
            {"variant": "expand", "r": 6, "alpha": 4.0},
            {"variant": "mini", "r": 5, "mini_r": 3, "alpha": 2.0},
            {"variant": "bat", "r": 3, "alpha": 2.0},
        ),
    )


def _capabilities(options: Options) -> pc.Capabilities:
    added = options.variant != "bat"
    return pc.Capabilities(additive=added, lowrank=added, dropout=added)


@pc.hookimpl
def peft_init(sites: Sequence[pc.Site]) -> pc.Layout:
    """One zero tensor D per site."""
    return lay_out(sites)


@pc.hookimpl
def peft_forward(site: pc.Site) -> pc.Forward:
    """Δ(x) of the site's variant."""
    options: Options = site.options
    if options.variant == "bat":
        return kernels.bat(options.scale)
    if options.variant == "expand":
        return kernels.expand(site.out_features, options.r, options.sizes, options.scale)
    return kernels.efficient(site.in_features, site.out_features, options.r, options.interleaved, options.scale)


@pc.hookimpl
def peft_merge(site: pc.Site, weight: Tensor, tensors: pc.Tensors, binding: pc.Tensors) -> Tensor:
    """W + B·A, with the exact factors; `bat`: W + s·(W·D + D) block by block."""
    D = tensors["D"].to(weight)
    if site.options.variant == "bat":
        return weight + naive.bat_delta(weight, D, site.options.scale)
    A, B = peft_lowrank(site, {"D": D}, binding)
    return pc.lowrank.merged(weight, A, B, 1.0)


@pc.hookimpl
def peft_lowrank(site: pc.Site, tensors: pc.Tensors, binding: pc.Tensors) -> pc.LowRank:
    """A = E, B = s·Dᵀ (tiled for `mini`); for `expand` A = D, B = s·Eᵀ."""
    options: Options = site.options
    D = tensors["D"]
    if options.variant == "bat":
        raise pc.MergeError(
            f"'{site.path}': MiSS variant 'bat' has no low-rank factors, since its ΔW has full rank; merge the adapter instead"
        )
    if options.variant == "expand":
        E = kernels.indicator(site.out_features, options.r, False, options.sizes, D.dtype, D.device)
        return pc.LowRank(A=D, B=options.scale * E.T)
    E = kernels.indicator(site.in_features, options.r, options.interleaved, None, D.dtype, D.device)
    return pc.LowRank(A=E, B=options.scale * D.repeat(1, site.out_features // D.shape[1]).T)
