"""MiSS: Matrix Shard Sharing (arXiv 2409.15371), a method plugin of peft-core."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from peft_core import Capabilities, Forward, Layout, LowRank, MergeError, MethodInfo, Site, hookimpl, lowrank

from . import kernels, layout, naive
from .exchange import from_hf_peft, to_hf_peft
from .options import MissOptions

__all__ = ["MissOptions", "from_hf_peft", "to_hf_peft"]


@hookimpl
def peft_method() -> MethodInfo:
    """Describe the method."""
    return MethodInfo(
        name="miss",
        options=MissOptions,
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


def _capabilities(options: MissOptions) -> Capabilities:
    added = options.variant != "bat"
    return Capabilities(additive=added, lowrank=added, dropout=added)


@hookimpl
def peft_init(sites: Sequence[Site]) -> Layout:
    """One zero tensor D per site."""
    return layout.lay_out(sites)


@hookimpl
def peft_forward(site: Site) -> Forward:
    """The variant's pair."""
    options: MissOptions = site.options
    if options.variant == "bat":
        return kernels.bat(options.scale)
    if options.variant == "expand":
        return kernels.expand(site.out_features, options.r, options.sizes, options.scale)
    return kernels.efficient(site.in_features, site.out_features, options.r, options.interleaved, options.scale)


@hookimpl
def peft_merge(site: Site, weight: Tensor, tensors: Mapping[str, Tensor], binding: Mapping[str, Tensor]) -> Tensor:
    """W + B·A, with the exact factors; `bat`: W + s·(W·D + D) block by block."""
    D = tensors["D"].to(weight)
    if site.options.variant == "bat":
        return weight + naive.bat_delta(weight, D, site.options.scale)
    A, B = peft_lowrank(site, {"D": D}, binding)
    return lowrank.merged(weight, A, B, 1.0)


@hookimpl
def peft_lowrank(site: Site, tensors: Mapping[str, Tensor], binding: Mapping[str, Tensor]) -> LowRank:
    """A = E, B = s·Dᵀ (tiled for `mini`); for `expand` A = D, B = s·Eᵀ."""
    options: MissOptions = site.options
    D = tensors["D"]
    if options.variant == "bat":
        raise MergeError(
            f"'{site.path}': MiSS variant 'bat' has no low-rank factors: its ΔW has full rank; "
            "merge it into the weights instead"
        )
    if options.variant == "expand":
        E = kernels.indicator(site.out_features, options.r, False, options.sizes, D.dtype, D.device)
        return LowRank(A=D, B=options.scale * E.T)
    E = kernels.indicator(site.in_features, options.r, options.interleaved, None, D.dtype, D.device)
    return LowRank(A=E, B=options.scale * D.repeat(1, site.out_features // D.shape[1]).T)
