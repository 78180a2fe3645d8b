"""LoRA (arXiv 2106.09685) as a peft-core plugin: ΔW = (alpha/r)·B·A, A Kaiming, B zero, one pair per layer.

Everything that a method is: its options, its layout, its forward, its merge. Core does the rest. Copy this file to write your
own.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

import peft_core as pc


class Options(BaseModel):
    """What a spec's `options` may hold for this method. Core reports misspelt and impossible ones."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    r: int = Field(default=16, ge=1, description="Rank of the update.")
    alpha: float = Field(default=16.0, gt=0, le=1e6, description="The update is scaled by alpha / r.")

    @property
    def scale(self) -> float:
        """What B·A is multiplied by."""
        return self.alpha / self.r


@pc.hookimpl
def peft_method() -> pc.MethodInfo:
    """The method's name, its options, what it can do, and small options for the conformance suite to try."""
    return pc.MethodInfo(
        name="lora",
        options=Options,
        # An added Δ(x) that starts at zero and allows dropout, as most are; and its ΔW has exact factors.
        capabilities=pc.Capabilities(lowrank=True),
        summary="two low-rank factors per layer",
        paper="arXiv 2106.09685",
        trials=({"r": 4, "alpha": 8}, {"r": 5, "alpha": 2}),  # alpha ≠ r shows a forgotten scale
    )


@pc.hookimpl
def peft_init(sites: Sequence[pc.Site]) -> pc.Layout:
    """Which tensors there are and who borrows them: here every layer has a pair of its own."""
    return pc.Layout(groups=tuple(_group(site) for site in sites))


def _group(site: pc.Site) -> pc.SharingGroup:
    rank = site.options.r
    if rank > min(site.in_features, site.out_features):
        raise pc.PlanError(f"r: {rank} is larger than '{site.path}' ({site.out_features}×{site.in_features}); lower r")
    tensors = {
        "A": pc.TensorSpec((rank, site.in_features), pc.kaiming_uniform(site.in_features)),
        "B": pc.TensorSpec((site.out_features, rank), pc.Zeros()),
    }
    return pc.SharingGroup.private(site, tensors)


@pc.hookimpl
def peft_forward(site: pc.Site) -> pc.Forward:
    """Δ(x) = s·B·A·x and its gradients: core has the low-rank product ready, for all methods that end in one."""
    return pc.lowrank.forward(site.options.scale)


@pc.hookimpl
def peft_merge(site: pc.Site, weight: Tensor, tensors: pc.Tensors, binding: pc.Tensors) -> Tensor:
    """The weight (out × in) that does in one product what base and adapter do together."""
    return pc.lowrank.merged(weight, tensors["A"], tensors["B"], site.options.scale)


@pc.hookimpl
def peft_lowrank(site: pc.Site, tensors: pc.Tensors, binding: pc.Tensors) -> pc.LowRank:
    """The factors of ΔW with the scale in one of them, for export to whatever reads LoRA."""
    return pc.LowRank(A=tensors["A"], B=tensors["B"] * site.options.scale)
