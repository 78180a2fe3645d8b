"""DoRA (arXiv 2402.09353) as a peft-core plugin: W' = m ⊙ (W₀ + s·B·A) / ‖W₀ + s·B·A‖, norms over each output's row.

The change depends on the base weight, so the method is not additive: it has a layer for itself, core hands it the weight, and
`naive` is all that runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

import peft_core as pc


class Options(BaseModel):
    """What a spec's `options` may hold."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    r: int = Field(default=16, ge=1, description="Rank of the direction's update.")
    alpha: float = Field(default=16.0, gt=0, le=1e6, description="The direction's update is scaled by alpha / r.")
    detach_norm: bool = Field(default=True, description="No gradient through the norm (the paper's section 4.3).")

    @property
    def scale(self) -> float:
        """What B·A is multiplied by."""
        return self.alpha / self.r


@pc.hookimpl
def peft_method() -> pc.MethodInfo:
    """Not additive: see the top of this file."""
    return pc.MethodInfo(
        name="dora",
        options=Options,
        capabilities=pc.Capabilities(additive=False),
        summary="a magnitude per output, and a low-rank update of the direction",
        paper="arXiv 2402.09353",
        trials=({"r": 4, "alpha": 8}, {"r": 5, "alpha": 2, "detach_norm": False}),
    )


@pc.hookimpl
def peft_init(sites: Sequence[pc.Site]) -> pc.Layout:
    """m starts as the norms of W₀, which core computes at attach; the plan itself reads no weights."""
    return pc.Layout(tuple(_group(site) for site in sites))


def _group(site: pc.Site) -> pc.SharingGroup:
    r, ins, outs = site.options.r, site.in_features, site.out_features
    wide = torch.promote_types(site.dtype, torch.float32)  # as `norms` computes; rounded, m would change the output
    tensors = {
        "A": pc.TensorSpec((r, ins), pc.kaiming_uniform(ins)),
        "B": pc.TensorSpec((outs, r), pc.Zeros()),
        "m": pc.TensorSpec((outs,), pc.FromWeight(site.path, norms), wide),
    }
    return pc.SharingGroup.private(site, tensors)


def norms(weight: Tensor) -> Tensor:
    """Length of each row [out]. Contiguous first: one order of summing, so that m / ‖W₀‖ is exactly 1 at the start."""
    return torch.linalg.vector_norm(weight.contiguous(), dim=1)


@pc.hookimpl
def peft_forward(site: pc.Site) -> pc.Forward:
    """Δ(x) = (W' − W₀)·x = (g − 1) ⊙ W₀x + g ⊙ s·B·A·x, with g = m / ‖W₀ + s·B·A‖."""
    return _forward(site.options.scale, site.options.detach_norm)


def _forward(scale: float, detach: bool) -> pc.Forward:
    def naive(x: Tensor, tensors: pc.Tensors, binding: pc.Tensors) -> Tensor:
        A, B, weight = tensors["A"], tensors["B"], tensors["base_weight"]
        wide = torch.promote_types(x.dtype, torch.float32)  # g − 1 is small: 16 bits would leave nothing of it
        normed = [part.detach() if detach else part for part in (weight.to(wide), A, B)]
        gain = _gain(*normed, tensors["m"], scale)
        return ((gain - 1) * (x @ weight.to(x.dtype).T) + gain * pc.lowrank.naive(x, A, B, scale)).to(x.dtype)

    return pc.Forward(naive)


def _gain(weight: Tensor, A: Tensor, B: Tensor, m: Tensor, scale: float) -> Tensor:
    return m.to(weight.dtype) / norms(pc.lowrank.merged(weight, A, B, scale))


@pc.hookimpl
def peft_merge(site: pc.Site, weight: Tensor, tensors: pc.Tensors, binding: pc.Tensors) -> Tensor:
    """W' itself."""
    A, B, scale = tensors["A"], tensors["B"], site.options.scale
    return _gain(weight, A, B, tensors["m"], scale)[:, None] * pc.lowrank.merged(weight, A, B, scale)
