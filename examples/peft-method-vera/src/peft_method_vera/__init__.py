"""VeRA (arXiv 2310.11454) as a peft-core plugin: ΔW = diag(b)·B·diag(d)·A, with one frozen random pair A, B for all layers
of a kind, and two trained vectors per layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

import peft_core as pc


class Options(BaseModel):
    """What a spec's `options` may hold."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    r: int = Field(default=256, ge=1, description="Rank of the frozen pair.")
    d_initial: float = Field(default=0.1, allow_inf_nan=False, description="Every element of d at the start.")


@pc.hookimpl
def peft_method() -> pc.MethodInfo:
    """Its ΔW has exact factors."""
    return pc.MethodInfo(
        name="vera",
        options=Options,
        capabilities=pc.Capabilities(lowrank=True),
        summary="two vectors per layer that scale a frozen random pair",
        paper="arXiv 2310.11454",
        trials=({"r": 16}, {"r": 70, "d_initial": 0.5}),
    )


@pc.hookimpl
def peft_init(sites: Sequence[pc.Site]) -> pc.Layout:
    """`fixed` tensors of a group are drawn, held and saved once for all members; each site has d and b of its own."""
    pairs = (_pair(f"pair.{name}", members) for name, members in pc.alike(sites))
    return pc.Layout((*pairs, *(_vectors(site) for site in sites)))


def _pair(name: str, sites: Sequence[pc.Site]) -> pc.SharingGroup:
    site = sites[0]
    fixed = {
        "A": pc.TensorSpec((site.options.r, site.in_features), _kaiming(site.in_features)),
        "B": pc.TensorSpec((site.out_features, site.options.r), _kaiming(site.options.r)),
    }
    return pc.SharingGroup(name, tuple(site.path for site in sites), tensors={}, fixed=fixed)


def _kaiming(fan_in: int) -> pc.Uniform:
    return pc.Uniform(math.sqrt(6 / fan_in))


def _vectors(site: pc.Site) -> pc.SharingGroup:
    tensors = {
        "d": pc.TensorSpec((site.options.r,), pc.Constant(site.options.d_initial)),
        "b": pc.TensorSpec((site.out_features,), pc.Zeros()),
    }
    return pc.SharingGroup.private(site, tensors)


def _factors(tensors: pc.Tensors, binding: pc.Tensors) -> pc.LowRank:
    """diag(d)·A and diag(b)·B: what LoRA would call A and B; not rounded to 16 bits, as they are not when they merge."""
    d, b = (tensors[name].to(torch.promote_types(tensors[name].dtype, torch.float32)) for name in "db")
    return pc.LowRank(A=d[:, None] * binding["A"].to(d.dtype), B=b[:, None] * binding["B"].to(b.dtype))


def _naive(x: Tensor, tensors: pc.Tensors, binding: pc.Tensors) -> Tensor:
    return pc.lowrank.naive(x, *_factors(tensors, binding), 1.0)


def _add(x: Tensor, y: Tensor, tensors: pc.Tensors, binding: pc.Tensors) -> tuple[Tensor, ...]:
    A, B = _factors(tensors, binding)
    return x, pc.lowrank.add_(x, y, A, B, 1.0)


def _grad(
    dy: Tensor, dx: Tensor | None, saved: tuple[Tensor, ...], tensors: pc.Tensors, binding: pc.Tensors
) -> dict[str, Tensor]:
    dA, dB = pc.lowrank.grad_(dy, dx, *saved, *_factors(tensors, binding), 1.0)
    return {"d": (dA * binding["A"]).sum(1), "b": (dB * binding["B"]).sum(1)}


_FORWARD = pc.Forward(_naive, _add, _grad)


@pc.hookimpl
def peft_forward(site: pc.Site) -> pc.Forward:
    """One object for all sites: it depends on no option."""
    return _FORWARD


@pc.hookimpl
def peft_merge(site: pc.Site, weight: Tensor, tensors: pc.Tensors, binding: pc.Tensors) -> Tensor:
    """W + diag(b)·B·diag(d)·A."""
    return pc.lowrank.merged(weight, *_factors(tensors, binding), 1.0)


@pc.hookimpl
def peft_lowrank(site: pc.Site, tensors: pc.Tensors, binding: pc.Tensors) -> pc.LowRank:
    """Exact factors, for export to whatever reads LoRA."""
    return _factors(tensors, binding)
