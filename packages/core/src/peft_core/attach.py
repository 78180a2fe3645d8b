"""Attaching an adapter to a model: a new one by its spec, or a saved one."""

from __future__ import annotations

import re
from numbers import Integral
from pathlib import Path

from torch import nn

from . import checkpoint
from .adapter import Adapter
from .adapter_file import owned_key, read_header, spec_of
from .bank import Bank
from .errors import AdapterError
from .initial_values import device_of, initial_state, initial_values, tensor_devices
from .install import install
from .matching import check_fit, check_plan
from .plan import Plan, plan
from .registry import find_registry
from .spec import AdapterSpec
from .unwrapping import unwrap_to_attach


def attach(
    model: nn.Module, spec: AdapterSpec, name: str = "default", seed: int = 0, keep: str | Path = "host"
) -> Adapter:
    """Plan a spec on a model and put the adapter on it, in place. The base is frozen; only the new adapter is active.

    On a base without weights (the meta device) the adapter has no values either, and `to_empty` gives it none: attach to a base
    that has its weights, or `restore` a saved adapter before the first forward.

    Args:
        name: of the adapter; letters, digits, `_` and `-`. seed: of its initial values and random decisions.
        keep: for methods that own the base weight, where to keep the originals: `host` (memory), a directory, or `none`;
            without them the adapter can be neither disabled nor detached.

    Raises:
        TargetError, PlanError: the spec does not fit the model. AdapterError: the name is taken, the seed is no whole number, a
        method that reads base weights meets a layer that does not multiply by its own, the model is wrapped for parallel training
        already, another adapter stands on a site that one of the two needs for itself, sites that share
        tensors are on several devices, or a weight that the method starts from is offloaded. MergeError: the originals
        cannot be kept there. PluginError: an initialiser made another shape. The model is unchanged then.
    """
    model = unwrap_to_attach(model)
    _check_name(model, name)
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise AdapterError(f"seed: expected a whole number, got {seed!r:.80}")
    seed = int(seed)
    made = plan(model, spec)
    _refuse_several_devices(model, made)
    bank = Bank(model, name, made, seed)
    bank.state = initial_state(made, seed)
    install(bank, initial_values(model, made, seed), trainable=True, keep=keep, owned={})
    return Adapter(bank)


def load(
    model: nn.Module,
    directory: str | Path,
    name: str = "default",
    trainable: bool = False,
    keep: str | Path = "host",
) -> Adapter:
    """Put a saved adapter on a model. With `trainable`, training goes on from where it was saved.

    On a base without weights (the meta device) the adapter's values come on the CPU. Give the base its own with
    `load_state_dict(..., assign=True)`; `to_empty` would lose the adapter's.

    Raises:
        CheckpointError: the directory is not an adapter, is damaged, or belongs to another base model.
        PluginError: its method is not installed. AdapterError: the name is taken, or the model is wrapped for parallel
            training already.
    """
    model = unwrap_to_attach(model)
    _check_name(model, name)
    header = read_header(directory)
    check_fit(directory, header, model)
    made = plan(model, spec_of(header))
    check_plan(directory, header, made)
    _refuse_several_devices(model, made)
    stored = checkpoint.read(directory, header)
    bank = Bank(model, name, made, header.seed)
    bank.progress.steps, bank.progress.run_start = header.steps, header.run_start
    if trainable:
        bank.state = checkpoint.read_state(directory, header, made)
    values = {
        key: stored[key].to("cpu" if device.type == "meta" else device)
        for key, device in tensor_devices(model, made).items()
    }
    owned = {path: stored[owned_key(path)] for path in header.owned}
    install(bank, values, trainable=trainable, keep=keep, owned=owned)
    return Adapter(bank)


def _check_name(model: nn.Module, name: str) -> None:
    if not (isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_-]+", name)):
        raise AdapterError(f"adapter name {name!r:.80}: use letters, digits, '_' and '-'")
    registry = find_registry(model)
    if registry and name in registry.banks:
        raise AdapterError(f"an adapter '{name}' is attached already; detach it or choose another name")


def _refuse_several_devices(model: nn.Module, made: Plan) -> None:
    """A tensor lies on one device; sites on several cannot borrow it."""
    for group in [group for group in made.groups if len(group.members) > 1]:
        devices = {path: device_of(model, path) for path in group.members}
        real = {(device.type, device.index or 0): path for path, device in devices.items() if device.type != "meta"}
        if len(real) > 1:
            here, there, *_ = real.values()
            raise AdapterError(
                f"'{here}' is on {devices[here]} and '{there}' on {devices[there]}, and method '{made.spec.method}' shares "
                "tensors between them; put the model on one device, or choose targets on a single device"
            )
