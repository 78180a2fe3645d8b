"""Which matrix each layer trains, and which options fit which layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from peft_core import Layout, PlanError, SharingGroup, Site, TensorSpec
from peft_core.errors import listed

from .options import MissOptions


def lay_out(sites: Sequence[Site]) -> Layout:
    """One zero tensor D per site: the sharing is within the layer.

    Raises:
        PlanError: an option does not fit a layer; the message lists values that fit.
    """
    for site in sites:
        _check(site, sites)
    groups = (SharingGroup(site.path, (site.path,), {"D": TensorSpec(shape(site))}) for site in sites)
    return Layout(tuple(groups))


def shape(site: Site) -> tuple[int, ...]:
    """Shape of D: [r, out], `expand` [r, in], `mini` [r, m], `bat` [out/r, r, r]."""
    options: MissOptions = site.options
    if options.variant == "bat":
        return site.out_features // options.r, options.r, options.r
    if options.variant == "mini":
        assert options.mini_r is not None
        return options.r, options.mini_r
    return options.r, site.in_features if options.variant == "expand" else site.out_features


def _check(site: Site, sites: Sequence[Site]) -> None:
    options: MissOptions = site.options
    r, inputs, outputs = options.r, site.in_features, site.out_features
    if options.variant == "bat" and (inputs % r or outputs % r):
        fitting = _divisors(size for one in _like(site, sites) for size in _sizes(one))
        raise PlanError(
            f"'{site.path}': variant 'bat' needs an r that divides its {inputs} inputs and {outputs} "
            f"outputs, r={r} does not; all its layers take {fitting}"
        )
    side, split = ("outputs", outputs) if options.variant == "expand" else ("inputs", inputs)
    if r > split:
        most = min(_sizes(one)[options.variant == "expand"] for one in _like(site, sites))
        raise PlanError(f"'{site.path}': r={r} is more than its {split} {side}; all its layers take r ≤ {most}")
    if options.sizes is not None and sum(options.sizes) != split:
        raise PlanError(f"'{site.path}': sizes sum to {sum(options.sizes)}, the layer has {split} outputs")
    if options.mini_r is not None and outputs % options.mini_r:
        raise PlanError(
            f"'{site.path}': mini_r={options.mini_r} does not divide its {outputs} outputs; "
            f"all its layers take {_divisors(one.out_features for one in _like(site, sites))}"
        )


def _sizes(site: Site) -> tuple[int, int]:
    return site.in_features, site.out_features


def _like(site: Site, sites: Sequence[Site]) -> list[Site]:
    """The sites with the same options."""
    return [other for other in sites if other.options == site.options]


def _divisors(sizes: Iterable[int]) -> str:
    """The common divisors, largest first."""
    common = math.gcd(*sizes)
    return listed([str(n) for n in range(common, 0, -1) if common % n == 0], 16)
