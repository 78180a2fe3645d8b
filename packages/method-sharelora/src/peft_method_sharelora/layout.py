"""Which factor belongs to whom: a group for what a module type shares, and one per site for the rest."""

from __future__ import annotations

from collections.abc import Sequence

import peft_core as pc
from peft_core.targets import matches

from .options import Options, Share


def lay_out(sites: Sequence[pc.Site]) -> pc.Layout:
    """Groups `shared.{module type}` for the common factors and one named by its path for each site's own."""
    _refuse_idle_patterns(sites)
    groups: list[pc.SharingGroup] = []
    sharing = [site for site in sites if share(site) != "none"]
    for name, members in pc.alike(sharing, key=lambda site: (share(site), block(site))):
        common = {factor: spec for factor, spec in _factors(members[0]).items() if factor in share(members[0])}
        # The prefix avoids the paths that name the private groups (both are "0" in a Sequential).
        groups.append(pc.SharingGroup(f"shared.{name}", tuple(site.path for site in members), common))
    for site in sites:
        # "none" contains neither letter.
        if own := {factor: spec for factor, spec in _factors(site).items() if factor not in share(site)}:
            groups.append(pc.SharingGroup.private(site, own))
    types = {site.path: site.type for site in sites}
    order = list(dict.fromkeys(types.values()))
    return pc.Layout(tuple(sorted(groups, key=lambda group: order.index(types[group.members[0]]))))


def _factors(site: pc.Site) -> dict[str, pc.TensorSpec]:
    """A Kaiming, B zero."""
    r: int = site.options.r
    return {
        "A": pc.TensorSpec((r, site.in_features), pc.kaiming_uniform(site.in_features)),
        "B": pc.TensorSpec((site.out_features, r)),
    }


def share(site: pc.Site) -> Share:
    """What this site shares. In a map the last matching pattern decides; without a match it is "none"."""
    options: Options = site.options
    if isinstance(options.share, str):
        return options.share
    found = [value for pattern, value in options.share.items() if matches(pattern, site.path)]
    return found[-1] if found else "none"


def block(site: pc.Site) -> int | None:
    """The block of consecutive layers this site is in; sites outside of numbered layers form one of their own."""
    scope: str | int = site.options.scope
    return None if isinstance(scope, str) or site.layer is None else site.layer // scope


def _refuse_idle_patterns(sites: Sequence[pc.Site]) -> None:
    maps = [dict(site.options.share) for site in sites if not isinstance(site.options.share, str)]
    for pattern in {pattern: None for map_ in maps for pattern in map_}:
        if not any(matches(pattern, site.path) for site in sites):
            types = ", ".join(dict.fromkeys(site.type for site in sites))
            raise pc.PlanError(
                f"sharelora: share['{pattern}'] matches none of the chosen layers; use one of their names "
                f"({types}), a suffix of a path, or a regex for the whole path"
            )
