"""A layout that cannot work is the plugin's fault: it is named at plan time, before anything is attached."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from .errors import PlanError, listed
from .method import BASE_WEIGHT
from .sharing import FromWeight, Initializer, Layout, SharingGroup, TensorSpec, borrowed, bound
from .sites import Site
from .spec import AdapterSpec


def check_layout(spec: AdapterSpec, sites: tuple[Site, ...], layout: Layout, groups: tuple[SharingGroup, ...]) -> None:
    """Refuse tensors that are not declared well, names used twice, members that are not sites, and sites without tensors.

    Raises:
        PlanError: names the group, tensor or site.
    """
    where = f"method '{spec.method}': peft_init"
    for group in layout.groups:
        for name, tensor in (*group.tensors.items(), *group.fixed.items(), *group.state.items()):
            _check_tensor(tensor, f"{where}: tensor '{group.name}.{name}'")
        if integers := [name for name, t in group.tensors.items() if not (t.dtype or torch.float32).is_floating_point]:
            raise PlanError(
                f"{where}: tensor '{group.name}.{integers[0]}' has an integer dtype and cannot be trained; declare it in `fixed`"
            )
        if BASE_WEIGHT in group.tensors:
            raise PlanError(
                f"{where}: group '{group.name}' names a tensor '{BASE_WEIGHT}', the name of the base's own weight"
            )
    names = Counter(group.name for group in groups)
    if twice := [name for name, count in names.items() if count > 1]:
        raise PlanError(f"{where} made two groups named '{twice[0]}'")
    keys = Counter(f"{group.name}.{name}" for group in groups for name in (*group.tensors, *group.fixed))
    if twice := [key for key, count in keys.items() if count > 1]:
        raise PlanError(f"{where} made two tensors with the key '{twice[0]}'")
    paths = {site.path for site in sites}
    for group in layout.groups:
        if strangers := [member for member in group.members if member not in paths]:
            raise PlanError(
                f"{where}: group '{group.name}' lists the member '{strangers[0]}', which is not a site of the plan"
            )
        if not (group.tensors or group.fixed) or not group.members:
            what = "members" if group.tensors or group.fixed else "tensors"
            raise PlanError(f"{where}: group '{group.name}' has no {what}")
        starts = [tensor.init for tensor in (*group.tensors.values(), *group.fixed.values())]
        if lost := [init.path for init in starts if isinstance(init, FromWeight) and init.path not in paths]:
            raise PlanError(
                f"{where}: group '{group.name}' starts from the weight of '{lost[0]}', which is not a site of the plan"
            )
    uncovered = paths - {member for group in layout.groups if group.tensors for member in group.members}
    if uncovered:
        raise PlanError(f"{where} gave no tensor to {listed(sorted(uncovered), 3)}")
    for path, named in layout.bindings.items():
        if path not in paths:
            raise PlanError(f"{where}: a binding is for '{path}', which is not a site of the plan")
        for name, tensor in named.items():
            _check_tensor(tensor, f"{where}: '{name}' in the binding of '{path}'")
    borrowed(layout.groups, paths, where)
    bound(layout.groups, paths, layout.bindings, where)


def _check_tensor(tensor: Any, what: str) -> None:
    if not isinstance(tensor, TensorSpec):
        raise PlanError(f"{what} must be a TensorSpec, got {tensor!r}")
    if not (isinstance(tensor.shape, tuple) and all(isinstance(length, int) and length > 0 for length in tensor.shape)):
        raise PlanError(f"{what}: its shape must be a tuple of positive integers, got {tensor.shape!r}")
    if not isinstance(tensor.init, Initializer):
        raise PlanError(f"{what}: its init must be an Initializer such as pc.Zeros(), got {tensor.init!r}")
