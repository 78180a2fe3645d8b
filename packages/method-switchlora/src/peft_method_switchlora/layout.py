"""A site's tensors: A and B, the candidates that wait for a place in them, and the record of which vector is where."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import peft_core as pc
from peft_core.errors import size

from .options import initial_stds


@dataclass(frozen=True)
class LastSlots(pc.Initializer):
    """[2, r]: the candidate slots of A's rows and of B's columns: the last r, B's rotated by r // 2."""

    candidates: int

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        last = torch.arange(self.candidates - shape[1], self.candidates)
        return torch.stack([last, last.roll(shape[1] // 2)])


@dataclass(frozen=True)
class FirstPlaces(pc.Initializer):
    """[2]: the place in A, and in B, where switching starts: 0 and r // 2."""

    r: int

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.tensor([0, self.r // 2])


def lay_out(sites: Sequence[pc.Site]) -> pc.Layout:
    """A private group per site; its state is what only switching needs."""
    return pc.Layout(tuple(_group(site) for site in sites), notes=tuple(_notes(sites)))


def switches(site: pc.Site) -> bool:
    """Whether there is anything to switch: spare candidates, and at least two places."""
    return 1 < site.options.r < min(site.out_features, site.in_features)


def _group(site: pc.Site) -> pc.SharingGroup:
    m, n, r = site.out_features, site.in_features, site.options.r
    uniform_A, uniform_B = (pc.Uniform(math.sqrt(3) * std) for std in initial_stds(m, n, r))
    c = min(m, n)
    state = {
        "candidates_A": pc.TensorSpec((c, n), uniform_A),
        "candidates_B": pc.TensorSpec((c, m), uniform_B),
        "slots": pc.TensorSpec((2, r), LastSlots(c), torch.int64),
        "frozen_until": pc.TensorSpec((2, r), dtype=torch.int64),
        "next": pc.TensorSpec((2,), FirstPlaces(r), torch.int64),
    }
    tensors = {"A": pc.TensorSpec((r, n), uniform_A), "B": pc.TensorSpec((m, r), uniform_B)}
    return pc.SharingGroup.private(site, tensors, state if switches(site) else {})


def _notes(sites: Sequence[pc.Site]) -> list[str]:
    notes = []
    masters = [site for site in sites if site.options.keeps_master(site.dtype)]
    if masters:
        nbytes = 4 * sum(site.out_features * site.in_features for site in masters)
        notes.append(f"training keeps float32 masters of {len(masters)} base weights: {size(nbytes)}")
    if any(not site.options.offload_candidates for site in sites):
        notes.append("candidates move to the accelerator at the first step (offload_candidates: false)")
    if idle := [site for site in sites if not switches(site)]:
        why = "r = 1" if idle[0].options.r == 1 else f"r = {idle[0].options.r} leaves no spare candidates"
        notes.append(f"sites that never switch: {len(idle)}, first '{idle[0].path}' ({why})")
    return notes
