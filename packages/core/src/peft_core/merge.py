"""Merging: putting what an adapter computes into the base weights, and taking it out again bit for bit.

`merged_weight` is the one place where a merged weight is computed; merging in memory and merging checkpoint files both
call it, so that they give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import bases, plugins, quantized
from .bank import Bank
from .bases import ROOT_PREFIX
from .dtypes import name_of
from .errors import MergeError
from .layer import adapt
from .method import Tensors
from .originals import check, check_choice, drop, look_up, put_aside
from .registry import Merged, Registry, registry_of
from .sharded import whole
from .sites import Site
from .slots import SLOT
from .writable import refuse_divided, refuse_ties, refuse_unwritable


class Contribution(NamedTuple):
    """What one adapter adds at one site. `owned` is the weight of a method that owns it (out × in), else None."""

    method: str
    site: Site
    tensors: Tensors
    binding: Tensors
    scale: float = 1.0
    owned: Tensor | None = None


def merged_weight(weight: Tensor, contributions: Iterable[Contribution]) -> Tensor:
    """The weight (out × in) with these adapters merged, in float32 (float64 for a float64 base), rounded once by the caller.

    Raises:
        MergeError: a scale other than 1 for a method that owns the weight, or the method returned another shape.
    """
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    merged = weight.to(dtype)
    for part in contributions:
        start = merged if part.owned is None else part.owned.to(dtype)
        result: Tensor = plugins.call(
            part.method,
            "peft_merge",
            site=part.site,
            weight=start,
            tensors=part.tensors,
            binding=part.binding,
        )
        if result.shape != start.shape:
            raise MergeError(
                f"method '{part.method}': peft_merge returned {list(result.shape)} for '{part.site.path}', "
                f"expected {list(start.shape)} (out × in)"
            )
        if part.scale != 1.0:
            if part.owned is not None:
                raise MergeError(
                    f"'{part.site.path}': method '{part.method}' has moved weight into the base, and cannot be merged with "
                    f"weight {part.scale:g}; give it weight 1"
                )
            result = start + part.scale * (result - start)
        merged = result.to(dtype)
    return merged


def merge(bank: Bank, scale: float, keep: str | Path) -> None:
    """Merge one adapter into the base's weights and keep the originals as `keep` says.

    Whatever is raised, by the method too: nothing has changed then.

    Raises:
        MergeError: a weight is tied to a layer outside the adapter, offloaded, or divided between processes, a layer gives
            something else than x Wᵀ + b, a weight would become infinite, or `keep` is not a choice. AdapterError: a layer was
            replaced since.
    """
    check_choice(keep)
    bank.check_in_place()
    root, registry = bank.root, registry_of(bank.root)
    refuse_divided(root)
    sites = {path: root.get_submodule(path) for path in bank.sites}
    for path, module in sites.items():
        if module.weight.device.type == "meta":
            raise MergeError(
                f"'{path}': the weight is offloaded or on the meta device; load the model without offloading, "
                "or merge the checkpoint files with peft-export"
            )
    # A quantized weight is not written: a dense one is kept beside it.
    refuse_unwritable(root, [path for path, module in sites.items() if not bases.is_quantized(module)])
    refuse_ties(root, list(bank.stand_ins), bank.plan.trained, "name both in train_modules")
    bank.merged_scale = scale
    if keep == "none":  # there will be no way back: see first that every site can be merged
        for path in sites:
            merged = registry.merged.get(f"{path}.weight", Merged(path))
            _combined(root, registry, merged, [*merged.adapters, bank.name])
    shown = all(owned.shown for owned in bank.owned.values())
    # A method that owns the weight is merged into what it moved, not into what the base held before.
    bank.show_owned(True)
    # A tied parameter has several names; under the same one for every adapter, what stood there first is kept once.
    trained = {key: name for name, key in sorted(bank.stand_ins.items(), reverse=True)}.values()
    places = {**{f"{path}.weight": path for path in sites}, **dict.fromkeys(trained, "")}
    try:
        for name, site in places.items():
            merged = _put_on(bank, name, site, keep)
            _write(root, registry, name)
            if site in bank.owned:
                bank.owned[site].cover(merged.original)
    except BaseException:
        _take_out(bank)
        bank.show_owned(shown)
        raise


def unmerge(bank: Bank) -> None:
    """Restore the original weights; other merged adapters stay merged.

    Raises:
        MergeError: the originals were not kept, or cannot be read. Nothing has changed then.
    """
    _check_restorable(bank)
    _take_out(bank)


@contextmanager
def left_out(bank: Bank) -> Iterator[None]:
    """The weights without this merged adapter; with it again afterwards, in its place among the others, bit for bit.

    Raises:
        MergeError: the originals were not kept, or cannot be read. Nothing has changed then.
    """
    registry = registry_of(bank.root)
    if bank.name in registry.left_out:
        yield
        return
    _check_restorable(bank)
    if lost := [path for path, owned in bank.owned.items() if owned.original is None]:
        raise MergeError(
            f"'{lost[0]}': the original weight was not kept (attach with keep='host' to disable the adapter)"
        )
    registry.left_out.add(bank.name)
    try:
        _rewrite(bank)
        yield
    finally:
        registry.left_out.discard(bank.name)
        _rewrite(bank)


def settle(bank: Bank) -> None:
    """After the last merge: forget the originals, and replace quantized layers by dense ones that hold the merged weight, and
    carry what adapters they had.
    """
    root, registry = bank.root, registry_of(bank.root)
    for name, merged in list(registry.merged.items()):
        if bank.name in (*merged.adapters, *merged.beneath):
            drop(merged.original)
            left = [other for other in (*merged.beneath, *merged.adapters) if other != bank.name]
            merged.original, merged.packed, merged.adapters, merged.beneath = None, False, left, []
            if not left:
                del registry.merged[name]
    slots = {path: root.get_submodule(path).__dict__.get(SLOT) for path in bank.sites}
    merged_into = {path: slot for path, slot in slots.items() if slot is not None and slot.dense is not None}
    if not merged_into:
        return
    quantized.make_dense(root, {path: slot.dense for path, slot in merged_into.items()})
    registry.packing.clear()  # bitsandbytes would save the layers that are left with wrong scales once they are packed
    for path, slot in merged_into.items():
        adapt(root.get_submodule(path), root).members = slot.members


def _put_on(bank: Bank, name: str, site: str, keep: str | Path) -> Merged:
    """Note that an adapter is about to be merged into a parameter (of a `site`, if it is one), and put aside what stands there,
    if that is to be kept.
    """
    root, registry = bank.root, registry_of(bank.root)
    packed = bool(site) and bases.is_quantized(root.get_submodule(site))
    merged = registry.merged.get(name, Merged(site, packed=packed))
    if not merged.restorable and keep != "none":
        # What stands there may hold adapters whose original was not kept; it can be brought back, they cannot be taken out.
        merged.original = put_aside(root.get_parameter(name), site or name, keep)
        merged.beneath, merged.adapters = [*merged.beneath, *merged.adapters], []
    merged.adapters.append(bank.name)
    registry.merged[name] = merged
    return merged


def _take_out(bank: Bank) -> None:
    """Restore every parameter that this adapter was merged into and whose original was kept."""
    registry = registry_of(bank.root)
    for name, merged in list(registry.merged.items()):
        if bank.name not in merged.adapters or not merged.restorable:
            continue
        merged.adapters.remove(bank.name)
        _write(bank.root, registry, name)
        if merged.site in bank.owned:
            bank.owned[merged.site].uncover()
        if not merged.adapters:
            drop(merged.original)
            merged.original, merged.adapters, merged.beneath = None, merged.beneath, []
            if not merged.adapters:
                del registry.merged[name]


def _check_restorable(bank: Bank) -> None:
    """See that the weights beneath this merged adapter were kept, are still there, and can be written.

    Raises:
        MergeError: names the layer.
    """
    for name, merged in registry_of(bank.root).merged.items():
        if bank.name in merged.beneath or (bank.name in merged.adapters and not merged.restorable):
            raise MergeError(
                f"'{merged.site or name}': the original weight was not kept (merge with keep='host' to be able to unmerge)"
            )
        if bank.name in merged.adapters:
            check(merged.original)
    bank.check_in_place()
    refuse_divided(bank.root)


def _rewrite(bank: Bank) -> None:
    """Write every parameter that this adapter is merged into anew."""
    registry = registry_of(bank.root)
    for name, merged in registry.merged.items():
        if bank.name in merged.adapters:
            _write(bank.root, registry, name)


def _write(root: nn.Module, registry: Registry, name: str) -> None:
    """Put a parameter in place, with the adapters that are merged there and not left out."""
    merged = registry.merged[name]
    adapters = [adapter for adapter in merged.adapters if adapter not in registry.left_out]
    if merged.site:
        _write_weight(root, registry, merged, adapters)
        return
    value = merged.original
    if adapters:  # of several, the last one's copy counts
        bank = registry.banks[adapters[-1]]
        value = bank.parameter(bank.stand_ins[name])
    assert value is not None
    with torch.no_grad():
        root.get_parameter(name).copy_(look_up(value))


def _write_weight(root: nn.Module, registry: Registry, merged: Merged, adapters: Sequence[str]) -> None:
    """Put a site's weight in place, with these adapters."""
    module = root.get_submodule(merged.site)
    slot = module.__dict__[SLOT]
    if adapters:
        weight = _combined(root, registry, merged, adapters)
        if merged.packed:
            slot.dense = weight
        else:
            bases.write_weight(module, weight, slot.transposed)
    elif merged.packed:
        slot.dense = None
    else:
        # Of a method that owns the weight, `original` is what it moved; without the adapter, the base is what it was.
        owners = (registry.banks[name].owned.get(merged.site) for name in merged.adapters)
        original = next((owned.original for owned in owners if owned is not None), merged.original)
        assert original is not None
        bases.write_weight(module, look_up(original), transposed=False)


@torch.no_grad()
def _combined(root: nn.Module, registry: Registry, merged: Merged, adapters: Sequence[str]) -> Tensor:
    """A site's weight (out × in) with these adapters merged: all into the original, or, where that was not kept, the last
    into what stands there. Rounded to the dtype in which the model will hold it.

    Raises:
        MergeError: finite numbers would become infinite, or NaN.
    """
    module = root.get_submodule(merged.site)
    start = bases.dense_weight(module)
    if merged.original is not None:
        original = look_up(merged.original).to(start.device)
        start = original.T if module.__dict__[SLOT].transposed else original
    elif not merged.packed:
        adapters = adapters[-1:]
    exact = merged_weight(start, [_contribution(registry.banks[name], merged.site) for name in adapters])
    weight = exact.to(_model_dtype(root) if merged.packed else module.weight.dtype)  # type: ignore[arg-type, union-attr]
    if not weight.isfinite().all() and start.isfinite().all():
        why = f"values too large for {name_of(weight.dtype)}" if exact.isfinite().all() else "infinite values or NaN"
        raise MergeError(
            f"'{merged.site}': merging would give its weight {why}; leave the adapter unmerged, or see why it has them"
        )
    return weight


def _contribution(bank: Bank, path: str) -> Contribution:
    """What an attached adapter adds at a site."""
    site = bank.sites[path]
    owned = bank.owned_weight(site) if path in bank.owned else None
    tensors = {name: whole(tensor) for name, tensor in bank.tensors(path).items()}
    return Contribution(bank.plan.spec.method, site, tensors, bank.binding(path), bank.merged_scale, owned)


def _model_dtype(root: nn.Module) -> torch.dtype:
    """The dtype in which a quantized model computes: that of what it did not quantize."""
    return next(
        (p.dtype for name, p in root.named_parameters() if p.is_floating_point() and not name.startswith(ROOT_PREFIX)),
        torch.float32,
    )
