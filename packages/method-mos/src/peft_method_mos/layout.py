"""Pools for each module type, and the indices by which a site draws from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import peft_core as pc
from peft_core.errors import divisors

from .options import Options


@dataclass(frozen=True)
class Shards(pc.Initializer):
    """Index matrices of one site, [1 or 2, r, l]: public shards without replacement, then the site's own.

    Attributes:
        public: number of public shards, which come first. own: the site's private ones, [start, stop).
    """

    public: int
    own: tuple[int, int]

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        own = torch.arange(*self.own)
        count = math.prod(shape[1:]) - len(own)
        drawn = [torch.cat([torch.randperm(self.public, generator=generator)[:count], own]) for _ in range(shape[0])]
        return torch.stack(drawn).view(shape).to(torch.int32)


def lay_out(sites: Sequence[pc.Site]) -> pc.Layout:
    """A group per module type and shape, of `pool_A` and `pool_B`; bindings `index` and `scaling`."""
    groups: list[pc.SharingGroup] = []
    bindings: dict[str, dict[str, pc.TensorSpec]] = {}
    whole: dict[str, int] = {}
    for name, members in pc.alike(sites):
        options: Options = members[0].options
        fan_in, fan_out = members[0].in_features, members[0].out_features
        rank = len(members) * options.equivalent_rank  # of the pools
        pieces = options.shards if options.subset_selection else 1
        if options.subset_selection:
            _check(name, members, options)
        else:
            whole[name] = rank
        for number, site in enumerate(members):
            bindings[site.path] = _binding(number, len(members), options)
        pools = {
            "pool_A": pc.TensorSpec((rank * pieces, fan_in // pieces), pc.kaiming_uniform(fan_in)),
            "pool_B": pc.TensorSpec((rank * pieces, fan_out // pieces)),
        }
        groups.append(pc.SharingGroup(name, tuple(site.path for site in members), pools))
    ranks = ", ".join(f"{name} {r}" for name, r in whole.items())
    notes = (f"subset_selection is off: every site uses the whole pool, so that r is: {ranks}",) if whole else ()
    return pc.Layout(tuple(groups), bindings, notes)


def _binding(number: int, count: int, options: Options) -> dict[str, pc.TensorSpec]:
    """How site `number` of `count` uses its pools: I_A and I_B (or one for both), random factors."""
    binding = {}
    r = count * options.equivalent_rank
    if options.subset_selection:
        r, pieces = options.r, options.shards
        own = options.private_rank * pieces
        public = count * options.equivalent_rank * pieces - count * own
        shards = Shards(public, (public + number * own, public + (number + 1) * own))
        binding["index"] = pc.TensorSpec((1 + options.pair_dissociation, r, pieces), shards, torch.int32)
    if options.random_scaling:
        spread = options.random_scaling.std / abs(options.random_scaling.mean)
        binding["scaling"] = pc.TensorSpec((r,), pc.Normal(std=spread, mean=1.0), torch.float32)
    return binding


def _check(name: str, members: Sequence[pc.Site], options: Options) -> None:
    """Refuse options that do not fit these layers."""
    L, e, p, r = len(members), options.equivalent_rank, options.private_rank, options.r
    fan_in, fan_out = members[0].in_features, members[0].out_features
    if fan_in % options.shards or fan_out % options.shards:
        raise pc.PlanError(
            f"mos: shards {options.shards} does not divide '{name}' ({fan_in} in, {fan_out} out); "
            f"values that do: {divisors([fan_in, fan_out])} (for '{members[0].type}' alone with overrides); or exclude it"
        )
    public = L * (e - p)
    if r - p > public:
        raise pc.PlanError(
            f"mos: '{name}' has {L} {'layer' if L == 1 else 'layers'}, so its pools hold "
            f"{L}·(equivalent_rank {e} - private_rank {p}) = {public} public ranks, "
            f"fewer than the r - private_rank = {r - p} that each layer draws; "
            f"set r ≤ {public + p} or equivalent_rank ≥ {math.ceil((r - p) / L) + p} "
            f"(for '{members[0].type}' alone with overrides)"
        )
