"""MiSS: Matrix Shard Sharing (arXiv 2409.15371), a method plugin of peft-core."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from peft_core import (
    Capabilities,
    Forward,
    Layout,
    LowRank,
    MethodInfo,
    PlanError,
    SharingGroup,
    Site,
    TensorSpec,
    hookimpl,
)
from torch import Tensor

from . import kernels
from .options import MissOptions


@hookimpl
def peft_method() -> MethodInfo:
    """Describe the method."""
    return MethodInfo(
        name="miss",
        options=MissOptions,
        capabilities=Capabilities(lowrank=True),
        summary="Matrix Shard Sharing: one matrix per layer, repeated over shards of the weight",
        paper="arXiv 2409.15371",
        trials=(
            {"r": 4},
            {"r": 7, "alpha": 3.0},
            {"r": 5, "layout": "contiguous", "alpha": 2.0},
            {"variant": "expand", "r": 6, "alpha": 4.0},
        ),
    )


@hookimpl
def peft_init(sites: Sequence[Site]) -> Layout:
    """One zero matrix per site: D [r, out], or [r, in] for `expand`."""
    return Layout(
        tuple(SharingGroup(site.path, (site.path,), {"D": TensorSpec(_shape(site))}) for site in sites)
    )


@hookimpl
def peft_forward(site: Site) -> Forward:
    """The variant's pair."""
    options: MissOptions = site.options
    if options.variant == "expand":
        return kernels.expand(site.out_features, options.r, options.sizes, options.scale)
    return kernels.efficient(site.in_features, options.r, options.layout == "interleaved", options.scale)


@hookimpl
def peft_merge(site: Site, weight: Tensor, tensors: Mapping[str, Tensor], binding: Mapping[str, Tensor]) -> Tensor:
    """W + B·A, with the exact factors."""
    A, B = peft_lowrank(site, {"D": tensors["D"].to(weight)}, binding)
    return weight + B @ A


@hookimpl
def peft_lowrank(site: Site, tensors: Mapping[str, Tensor], binding: Mapping[str, Tensor]) -> LowRank:
    """A = E, B = s·Dᵀ; for `expand` A = D, B = s·Eᵀ."""
    options: MissOptions = site.options
    D = tensors["D"]
    if options.variant == "expand":
        E = kernels.indicator(site.out_features, options.r, False, options.sizes, D.dtype, str(D.device))
        return LowRank(A=D, B=options.scale * E.T)
    interleaved = options.layout == "interleaved"
    E = kernels.indicator(site.in_features, options.r, interleaved, None, D.dtype, str(D.device))
    return LowRank(A=E, B=options.scale * D.T)


def _shape(site: Site) -> tuple[int, int]:
    """Shape of D. Raises PlanError if the rank or the shard sizes do not fit the layer."""
    options: MissOptions = site.options
    expand = options.variant == "expand"
    split, other = (site.out_features, site.in_features) if expand else (site.in_features, site.out_features)
    if options.r > split:
        side = "outputs" if expand else "inputs"
        raise PlanError(f"'{site.path}': r={options.r} is more than its {split} {side}; choose r ≤ {split}")
    if options.sizes is not None and sum(options.sizes) != split:
        raise PlanError(f"'{site.path}': sizes sum to {sum(options.sizes)}, the layer has {split} outputs")
    return options.r, other
