"""Whether a saved adapter fits a base model, a plan, or the adapter whose place its values are to take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapter_file import (
    HEADER,
    AdapterFile,
    StoredGroup,
    StoredSite,
    owned_key,
    owned_sites,
    stored_groups,
    stored_sites,
    stored_tensors,
)
from .base_model import base_info
from .errors import CheckpointError
from .plan import Plan


def check_fit(directory: str | Path, header: AdapterFile, model: nn.Module) -> None:
    """Refuse another base model.

    Raises:
        CheckpointError: names the first layer or parameter that differs.
    """
    here, there = base_info(model).shapes, header.base.shapes
    key = next((key for key in [*there, *here] if here.get(key) != there.get(key)), None)
    if key is None:
        return
    mine, theirs = here.get(key), there.get(key)
    if mine is None:
        what = f"this model has no '{key}'"
    elif theirs is None:
        what = f"this model has '{key}', which that base lacks"
    else:
        what = f"'{key}' is {list(mine)} here and {list(theirs)} there"
    name = f"{header.base.architecture} '{header.base.name}'" if header.base.name else header.base.architecture
    raise CheckpointError(f"'{directory}' was trained on another base model ({name}): {what}")


def check_plan(directory: str | Path, header: AdapterFile, plan: Plan) -> None:
    """Refuse a plan that is not the stored one: another version of the method may lay its tensors out otherwise.

    Raises:
        CheckpointError: names the layer, group or tensor that differs.
    """
    # Options as the installed version completes them. A base of another dtype, or stored in the other orientation, will do.
    here, there = (
        stored_sites(replace(site, transposed=False, dtype=torch.float32) for site in sites)
        for sites in (plan.sites, header.site_list())
    )
    owned = owned_sites(plan)
    shapes = {key: {"shape": tuple(tensor.shape)} for key, tensor in (*plan.tensors(), *plan.fixed())}
    shapes |= {owned_key(site.path): {"shape": (site.out_features, site.in_features)} for site in plan.sites if owned}
    stored = {key: {"shape": tensor.shape} for key, tensor in header.tensors.items()}
    differs = _first_difference(
        _layout(here, stored_groups(plan), plan.trained, owned, shapes),
        _layout(there, header.groups, header.trained, header.owned, stored),
    )
    if differs:
        info = plan.spec.info
        written, installed = (
            f"{info.distribution or info.name} {version}".rstrip() for version in (header.method.version, info.version)
        )
        raise CheckpointError(
            f"'{directory}' was written by {written}, and the installed {installed} has another layout (or {HEADER} was "
            f"edited): {differs}"
        )


def check_layout(
    directory: str | Path, header: AdapterFile, plan: Plan, name: str, values: Mapping[str, Tensor]
) -> None:
    """Refuse a saved adapter whose values cannot take the place of these, which the adapter `name` has.

    Raises:
        CheckpointError: names the method, the layer or the tensor that differs.
    """
    if header.method.name != plan.spec.method:
        raise CheckpointError(
            f"'{directory}' was made by method '{header.method.name}', adapter '{name}' uses '{plan.spec.method}'"
        )
    here, there = (
        {key: tensor.model_dump() for key, tensor in tensors.items()}
        for tensors in (stored_tensors(values), header.tensors)
    )
    differs = _first_difference(
        _layout(stored_sites(plan.sites), stored_groups(plan), plan.trained, owned_sites(plan), here),
        _layout(header.sites, header.groups, header.trained, header.owned, there),
    )
    if differs:
        raise CheckpointError(
            f"'{directory}' has another layout than adapter '{name}', so its values cannot be taken over: {differs}; "
            "use load() to attach it as a separate adapter"
        )


def _layout(
    sites: Iterable[StoredSite],
    groups: Iterable[StoredGroup],
    trained: Mapping[str, Mapping[str, str]],
    owned: Iterable[str],
    tensors: Mapping[str, Any],
) -> list[Mapping[str, Any]]:
    """What two descriptions of an adapter must agree on, by name."""
    return [
        {site.path: site.model_dump() for site in sites},
        {group.name: {"members": group.members} for group in groups},
        {path: dict(named) for path, named in trained.items()},
        dict.fromkeys(owned, True),
        tensors,
    ]


def _first_difference(here: Iterable[Mapping[str, Any]], there: Iterable[Mapping[str, Any]]) -> str:
    """`'q_proj' has r 4 there and 8 here` for the first entry in which two descriptions differ."""
    for mine, theirs in zip(here, there, strict=True):
        for key in [*theirs, *mine]:
            if mine.get(key) != theirs.get(key):
                return f"'{key}' {_difference(theirs.get(key), mine.get(key))}"
    return ""


def _difference(there: Any, here: Any) -> str:
    """`has r 4 there and 8 here`: where two descriptions differ."""
    if there is None or here is None:
        return f"is absent {'there' if there is None else 'here'}"
    name = next(name for name in [*there, *here] if there.get(name) != here.get(name))
    if isinstance(there.get(name), dict) and isinstance(here.get(name), dict):
        return _difference(there[name], here[name])
    return f"has {name} {there.get(name)} there and {here.get(name)} here"
