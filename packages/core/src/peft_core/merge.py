"""Merging: putting what an adapter computes into the base weights, and taking it out again bit for bit.

`merged_weight` is the one place where a merged weight is computed; merging in memory and merging checkpoint files both
call it, so that they give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import bases, plugins
from .bank import Bank
from .bases import ROOT_PREFIX
from .errors import MergeError
from .method import Tensors
from .originals import Kept, check, check_choice, drop, look_up, put_aside
from .registry import MergedSite, Packed, Registry
from .sharded import whole
from .sites import Site
from .slots import SLOT


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


def merge(root: nn.Module, registry: Registry, bank: Bank, scale: float, keep: str | Path) -> None:
    """Merge one adapter into the base's weights and keep the originals as `keep` says.

    Raises:
        MergeError: a weight is tied to a layer outside the adapter or offloaded, or `keep` is no choice.
    Whatever is raised, by the method too: nothing has changed then.
    """
    check_choice(keep)
    sites = [(site.path, root.get_submodule(site.path)) for site in bank.plan.sites]
    for path, module in sites:
        if module.weight.device.type == "meta":
            raise MergeError(
                f"'{path}': the weight is offloaded or on the meta device; load the model without offloading, "
                "or merge the checkpoint files with peft-export"
            )
    refuse_unwritable(root, [path for path, module in sites if not bases.is_quantized(module)])  # those are not written
    trained = [(f"{path}.{name}", key) for path, named in bank.plan.trained.items() for name, key in named.items()]
    _refuse_ties(root, [name for name, _ in trained], bank.plan.trained, "name both in train_modules")
    scales = {**registry.active, bank.name: scale}
    if keep == "none":  # there will be no way back: see first that every site can be merged
        for path, _ in sites:
            _combined(root, registry, path, [*_merged_there(registry, path), bank.name], scales)
    hidden = not all(owned.shown for owned in bank.owned.values())
    # A method that owns the weight is merged into what it moved, not into what the base held before.
    bank.show_owned(True)
    values = dict(bank.named_parameters())
    try:
        for path, module in sites:
            if path not in registry.merged:
                registry.merged[path] = MergedSite(_keep(module, path, keep))
            kept = registry.merged[path]
            kept.adapters.append(bank.name)
            _write(root, registry, path, scales)
            if path in bank.owned:
                assert not isinstance(kept.original, Packed)
                bank.owned[path].cover(kept.original)
        for name, key in trained:
            parameter = root.get_parameter(name)
            if name not in registry.merged:
                registry.merged[name] = MergedSite(put_aside(parameter, name, keep))
            registry.merged[name].adapters.append(bank.name)
            with torch.no_grad():
                parameter.copy_(values[key])
    except BaseException:
        if keep != "none":
            unmerge(root, registry, bank)
            bank.show_owned(not hidden)
        raise


def unmerge(root: nn.Module, registry: Registry, bank: Bank) -> None:
    """Restore the original weights, and merge the other merged adapters again.

    Raises:
        MergeError: the originals were not kept, or cannot be read. Nothing has changed then.
    """
    mine = {path: kept for path, kept in registry.merged.items() if bank.name in kept.adapters}
    if lost := [path for path, kept in mine.items() if kept.original is None]:
        raise MergeError(
            f"'{lost[0]}': the original weight was not kept (merge with keep='host' to be able to unmerge)"
        )
    for kept in mine.values():
        check(kept.original)
    for path, kept in mine.items():
        kept.adapters.remove(bank.name)
        if path in bank.plan.base.shapes and bases.describe(_module(root, path)) is not None:
            _restore(root, path, kept.original)
            if path in bank.owned:
                bank.owned[path].uncover()
            if kept.adapters:
                _write(root, registry, path, registry.active)
        else:
            source = _trained_value(registry, kept.adapters, path)
            with torch.no_grad():
                root.get_parameter(path).copy_(look_up(kept.original) if source is None else source)  # type: ignore[arg-type]
        if not kept.adapters:
            drop(kept.original)
            del registry.merged[path]


def settle(root: nn.Module, bank: Bank, registry: Registry) -> None:
    """After the last merge: forget the originals, and replace quantized layers by dense ones that hold the merged weight."""
    for path in [path for path, kept in registry.merged.items() if bank.name in kept.adapters]:
        kept = registry.merged[path]
        kept.adapters.remove(bank.name)
        drop(kept.original)
        kept.original = None
        if not kept.adapters:
            del registry.merged[path]
    for site in bank.plan.sites:
        module = root.get_submodule(site.path)
        slot = module.__dict__.get(SLOT)
        if slot is not None and slot.dense is not None:
            parent, _, child = site.path.rpartition(".")
            plain = nn.Linear(site.in_features, site.out_features, bias=module.bias is not None, device="meta")
            plain.weight = nn.Parameter(slot.dense, requires_grad=False)
            plain.bias = module.bias  # type: ignore[assignment]
            setattr(root.get_submodule(parent), child, plain.train(module.training))


def contribution(bank: Bank, site: Site, scale: float) -> Contribution:
    """What an attached adapter adds at a site."""
    owned = bank.owned_weight(site) if bank.plan.spec.capabilities.owns_base_weight else None
    tensors = {name: whole(tensor) for name, tensor in bank.tensors(site.path).items()}
    return Contribution(bank.plan.spec.method, site, tensors, bank.binding(site.path), scale, owned)


def _write(root: nn.Module, registry: Registry, path: str, scales: Mapping[str, float]) -> None:
    """Put a site's merged weight in place."""
    module = root.get_submodule(path)
    slot = module.__dict__[SLOT]
    merged = _combined(root, registry, path, registry.merged[path].adapters, scales)
    if bases.is_quantized(module):
        slot.dense = merged.to(_model_dtype(root))
    else:
        bases.write_weight(module, merged, slot.transposed)


@torch.no_grad()
def _combined(
    root: nn.Module, registry: Registry, path: str, names: Sequence[str], scales: Mapping[str, float]
) -> Tensor:
    """A site's weight (out × in) with these adapters merged: all into the original, or, where that was not kept, the last
    into what stands there.
    """
    module = root.get_submodule(path)
    start = bases.dense_weight(module)
    if path in registry.merged:
        kept = registry.merged[path].original
        if kept is None:
            names = names[-1:]
        elif not isinstance(kept, Packed):
            original = look_up(kept).to(start.device)
            start = original.T if module.__dict__[SLOT].transposed else original
    parts = []
    for name in names:
        bank = registry.banks[name]
        parts.append(contribution(bank, bank.sites[path], scales.get(name, bank.merged_scale)))
    return merged_weight(start, parts)


def _merged_there(registry: Registry, path: str) -> list[str]:
    kept = registry.merged.get(path)
    return kept.adapters if kept is not None else []


def _model_dtype(root: nn.Module) -> torch.dtype:
    """The dtype in which a quantized model computes: that of what it did not quantize."""
    return next(
        (p.dtype for name, p in root.named_parameters() if p.is_floating_point() and not name.startswith(ROOT_PREFIX)),
        torch.float32,
    )


def _keep(module: nn.Module, path: str, keep: str | Path) -> Kept | Packed:
    return Packed() if bases.is_quantized(module) else put_aside(module.weight, path, keep)  # type: ignore[arg-type]


def _restore(root: nn.Module, path: str, original: Any) -> None:
    module = root.get_submodule(path)
    if isinstance(original, Packed):
        module.__dict__[SLOT].dense = None
    else:
        bases.write_weight(module, look_up(original), transposed=False)


def _module(root: nn.Module, path: str) -> nn.Module:
    try:
        return root.get_submodule(path)
    except AttributeError:
        return root


def _trained_value(registry: Registry, names: list[str], path: str) -> Tensor | None:
    """The value of a parameter trained in full by the last of these merged adapters."""
    for name in reversed(names):
        bank = registry.banks[name]
        for module, named in bank.plan.trained.items():
            for local, key in named.items():
                if f"{module}.{local}" == path:
                    return dict(bank.named_parameters())[key].detach()
    return None


def refuse_unwritable(root: nn.Module, paths: Sequence[str]) -> None:
    """Refuse layers whose weight cannot be given another value without more being changed.

    Raises:
        MergeError: names the layer, and the other holder of its weight.
    """
    for path in paths:
        module = root.get_submodule(path)
        if module._parameters.get("weight") is None:
            raise MergeError(
                f"'{path}': its weight is computed at every forward (weight_norm, pruning or another parametrization), so that "
                "nothing can be merged into it; make it a plain parameter first, or exclude the layer"
            )
    _refuse_ties(root, [f"{path}.weight" for path in paths], (), "exclude the tied layer")


def _refuse_ties(root: nn.Module, names: Sequence[str], within: Iterable[str], remedy: str) -> None:
    """Refuse to change a parameter that another module holds, too, beside those that lie `within` one of these.

    Raises:
        MergeError: names both holders and the remedy.
    """
    inside = {id(module) for path in within for module in root.get_submodule(path).modules()}
    holders: dict[int, dict[int, str]] = {}  # parameter → module → name; a module may have several names itself
    for path, module in root.named_modules():
        for local, parameter in bases.own_parameters(module):
            holders.setdefault(id(parameter), {})[id(module)] = f"{path}.{local}"
    for name in names:
        path, _, local = name.rpartition(".")
        mine = root.get_submodule(path)
        there = holders[id(mine.get_parameter(local))]
        if others := [other for module, other in there.items() if module != id(mine) and module not in inside]:
            raise MergeError(f"'{name}' is the same tensor as '{others[0]}': merging would change both; {remedy}")
