"""Which adapters of a model its forward applies."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real

from torch import nn

from .errors import AdapterError, suggestion
from .registry import Registry, find_registry, registry_of
from .unwrapping import unwrap


def activate(model: nn.Module, names: str | Sequence[str] | Mapping[str, float]) -> None:
    """Choose the adapters that forward applies: one, several in order, or a map from name to a run-time scale. The choice is the
    model's, in all threads: none may run it meanwhile.

    Raises:
        AdapterError: no such adapter, a merged one, one named twice, two that one site cannot carry together, or a scale that
            is not a finite number.
    """
    model = unwrap(model)
    wanted = _scales(names)
    registry = find_registry(model)
    known = registry.banks if registry else {}
    for name in wanted:
        if name not in known:
            raise AdapterError(
                f"no adapter '{name}' on this model{suggestion(name, known)}; there are: {', '.join(known) or 'none'}"
            )
        if registry and registry.is_merged(name):
            raise AdapterError(f"adapter '{name}' is merged; unmerge it to make it active")
    set_active(model, wanted)


def _scales(names: object) -> dict[str, float]:
    """Name → scale, from what a user gave."""
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, Iterable):
        raise AdapterError(f"activate: expected a name, several, or a map from name to scale, got {names!r:.80}")
    wanted: dict[str, float] = {}
    for name in names:
        if not isinstance(name, str):
            raise AdapterError(
                f"activate: {name!r:.80} is not an adapter's name; one choice applies to the whole batch"
            )
        if name in wanted:
            raise AdapterError(f"activate: '{name}' is named twice; give it a scale instead: {{'{name}': 2.0}}")
        scale = names[name] if isinstance(names, Mapping) else 1.0
        if not isinstance(scale, Real) or not math.isfinite(scale):
            raise AdapterError(f"activate: the scale of '{name}' must be a finite number, got {scale!r:.80}")
        wanted[name] = float(scale)
    return wanted


def set_active(model: nn.Module, scales: dict[str, float]) -> None:
    """Let forward apply these adapters, with their run-time scales, in this order.

    Raises:
        AdapterError: one site cannot carry two of them, an adapter that owns its base weights cannot be switched off, or a layer
            was replaced since. Nothing has changed then.
    """
    registry = registry_of(model)
    refuse_together(registry, scales)
    # Sites at which nothing was active and nothing will be are left alone: the cost does not grow with idle adapters.
    concerned = [registry.banks[name] for name in {**registry.active, **scales}]
    places = {path: bank for bank in concerned for path in (*bank.sites, *bank.trained)}
    slots = [bank.slot(path) for path, bank in places.items()]
    owning = [bank for bank in concerned if bank.owned and not registry.is_merged(bank.name)]
    for bank in owning:
        hides = bank.name in registry.active and bank.name not in scales
        if hides and any(owned.original is None for owned in bank.owned.values()):
            raise AdapterError(
                f"adapter '{bank.name}' owns its base weights and the originals were not kept (attach with keep='host')"
            )
    for bank in owning:
        bank.show_owned(bank.name in scales)
    registry.active = scales
    for slot in slots:
        slot.activate(scales)


def refuse_together(registry: Registry, scales: Mapping[str, float]) -> None:
    """Refuse adapters that one site cannot carry at once.

    Raises:
        AdapterError: names the site and both adapters.
    """
    carried: dict[str, str] = {}
    for name in scales:
        bank = registry.banks[name]
        for path in bank.sites:
            other = carried.setdefault(path, name)
            if other == name:
                continue
            for one in (registry.banks[other], bank):
                if one.plan.spec.info.can(one.sites[path].options).exclusive:
                    raise AdapterError(
                        f"'{path}' cannot carry '{other}' and '{name}' at once: method '{one.plan.spec.method}' is not an "
                        "added Δ; activate one of them alone, or detach the other first"
                    )
