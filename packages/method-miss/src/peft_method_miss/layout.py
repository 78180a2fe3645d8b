"""Which matrix each layer trains, and whether the options fit it."""

from __future__ import annotations

from collections.abc import Sequence

import peft_core as pc
from peft_core.errors import divisors

from .options import Options


def lay_out(sites: Sequence[pc.Site]) -> pc.Layout:
    """One zero tensor D per site: the sharing is within the layer.

    Raises:
        PlanError: an option does not fit a layer; the message lists values that fit.
    """
    for site in sites:
        _check(site, sites)
    return pc.Layout(tuple(pc.SharingGroup.private(site, {"D": pc.TensorSpec(shape(site))}) for site in sites))


def shape(site: pc.Site) -> tuple[int, ...]:
    """Shape of D: [r, out], `expand` [r, in], `mini` [r, m], `bat` [out/r, r, r]."""
    options: Options = site.options
    if options.variant == "bat":
        return site.out_features // options.r, options.r, options.r
    if options.variant == "mini":
        assert options.mini_r is not None
        return options.r, options.mini_r
    return options.r, site.in_features if options.variant == "expand" else site.out_features


def _check(site: pc.Site, sites: Sequence[pc.Site]) -> None:
    options: Options = site.options
    r, mini_r, inputs, outputs = options.r, options.mini_r, site.in_features, site.out_features
    if options.variant == "bat" and (inputs % r or outputs % r):
        sizes = [size for one in _like(site, sites) for size in (one.in_features, one.out_features)]
        raise pc.PlanError(
            f"'{site.path}': variant 'bat' needs an r that divides its {inputs} inputs and {outputs} outputs, and r={r} "
            f"does not; values that fit all layers with these options: {divisors(sizes)}"
        )
    side, split = ("outputs", outputs) if options.variant == "expand" else ("inputs", inputs)
    if r > split:
        most = min(one.out_features if side == "outputs" else one.in_features for one in _like(site, sites))
        raise pc.PlanError(
            f"'{site.path}': r={r} is more than its {split} {side}; exclude it, or set r ≤ {most}, which fits all layers with "
            "these options"
        )
    if options.sizes is not None and sum(options.sizes) != outputs:
        raise pc.PlanError(
            f"'{site.path}': sizes add up to {sum(options.sizes)}, but the layer has {outputs} outputs; change sizes, or "
            "leave them out"
        )
    if mini_r is not None and outputs % mini_r:
        raise pc.PlanError(
            f"'{site.path}': mini_r={mini_r} does not divide its {outputs} outputs; values that fit all layers with these "
            f"options: {divisors(one.out_features for one in _like(site, sites))}"
        )


def _like(site: pc.Site, sites: Sequence[pc.Site]) -> list[pc.Site]:
    """The sites with the same options."""
    return [other for other in sites if other.options == site.options]
