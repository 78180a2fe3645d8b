"""The bank owns the tensors of one adapter; the registry knows the banks of one model.

Parameters are registered directly on the root model, under names that no module path can have, and not in a submodule:
a root that iterates over its children (nn.Sequential) must not find a new one. Everything that walks a model's
parameters (optimizers, `.to()`, DDP, FSDP2, state_dict) then finds each exactly once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import AdapterError
from .gradients import SharedGradient
from .layer import seen_weight
from .method import Forward
from .originals import Kept
from .owned import OwnedWeight
from .plan import ROOT_PREFIX, Plan
from .sharing import FromBase, FromWeight, TensorSpec, as_declared, draw, own_key
from .sites import Site

_REGISTRY = "_peft_adapters"


class Bank:
    """The tensors of one adapter.

    Attributes:
        root, name, plan, seed: of the adapter. sites: by path.
        state: key → training-only tensor (on the CPU). owned: site path → its weight, for methods that own it.
        steps: real optimizer steps, over resumes. backwards: gradients that came while attached. stepped_by: ids of the
        optimizers that stepped the latest of them; fresh_gradient: whether one came since.
        merged_scale, merged_keep: the run-time scale at which the adapter was merged, if it is, and where the originals are.
        total_steps: length of the run, if somebody told.
    """

    def __init__(self, root: nn.Module, name: str, plan: Plan, seed: int) -> None:
        self.root = root
        self.name = name
        self.plan = plan
        self.seed = seed
        self.state: dict[str, Tensor] = {}
        self.owned: dict[str, OwnedWeight] = {}
        self.steps = 0
        self.backwards = 0
        self.stepped_by: set[int] = set()
        self.fresh_gradient = False
        self.merged_scale = 1.0
        self.merged_keep: str | Path = "host"
        self.total_steps: int | None = None
        self.sites = {site.path: site for site in plan.sites}
        self._borrowed, self._bound = plan.borrowed(), plan.bound()

    def root_name(self, key: str) -> str:
        """The name under which the root model holds a tensor."""
        return f"{ROOT_PREFIX}{self.name}/{key.replace('.', '/')}"

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(key, parameter) of every tensor, as they are now: FSDP and others replace them."""
        for key, _ in self.plan.tensors():
            parameter = self.root._parameters[self.root_name(key)]
            assert parameter is not None
            yield key, parameter

    def site_keys(self, path: str) -> Mapping[str, str]:
        """Tensor name → key, for a site."""
        return self._borrowed[path]

    def tensors(self, path: str) -> dict[str, nn.Parameter]:
        """A site's borrowed parameters by name."""
        parameters = self.root._parameters
        return {name: parameters[self.root_name(key)] for name, key in self._borrowed[path].items()}  # type: ignore[misc]

    def binding(self, path: str) -> dict[str, Tensor]:
        """A site's fixed tensors by name."""
        buffers = self.root._buffers
        return {name: buffers[self.root_name(key)] for name, key in self._bound[path].items()}  # type: ignore[misc]

    def bound_keys(self, path: str) -> Mapping[str, str]:
        """Name in a site's binding → key."""
        return self._bound[path]

    def named_fixed(self) -> Iterator[tuple[str, Tensor]]:
        """(key, buffer) of every fixed tensor, each once."""
        for key, _ in self.plan.fixed():
            buffer = self.root._buffers[self.root_name(key)]
            assert buffer is not None
            yield key, buffer

    def owned_weight(self, site: Site) -> Tensor:
        """The weight (out × in) that the method moved into the base at a site. See `OwnedWeight.current`."""
        return self.owned[site.path].current(self.root.get_submodule(site.path), site)

    def write_owned_weight(self, site: Site, weight: Tensor) -> None:
        """Give a site that the method owns another weight (out × in)."""
        self.owned[site.path].write(self.root.get_submodule(site.path), weight, site)

    def show_owned(self, show: bool) -> None:
        """Let the base hold the weights that the method moved, or the original ones."""
        for path, owned in self.owned.items():
            (owned.show if show else owned.hide)(self.root.get_submodule(path))

    def site_state(self, path: str) -> dict[str, Tensor]:
        """A site's training-only tensors by name."""
        groups = (group for group in self.plan.groups if path in group.members)
        return {name: self.state[f"{group.name}.{name}"] for group in groups for name in group.state}

    def register(self, tensors: Mapping[str, Tensor], fixed: Mapping[str, Tensor], trainable: bool) -> None:
        """Put the adapter's values on the root model, by key; what is fixed in non-persistent buffers."""
        for key, value in tensors.items():
            self.root._parameters[self.root_name(key)] = nn.Parameter(value, requires_grad=trainable)
        for key, value in fixed.items():
            self.root._buffers[self.root_name(key)] = value
            self.root._non_persistent_buffers_set.add(self.root_name(key))

    def unregister(self) -> None:
        """Take everything off the root model."""
        prefix = f"{ROOT_PREFIX}{self.name}/"
        for held in (self.root._parameters, self.root._buffers):
            for name in [name for name in held if name.startswith(prefix)]:
                del held[name]
        for name in [name for name in self.root._non_persistent_buffers_set if name.startswith(prefix)]:
            self.root._non_persistent_buffers_set.discard(name)


def homes(root: nn.Module, plan: Plan) -> dict[str, torch.device]:
    """Key of every tensor, trainable or fixed → where it belongs: the device of its first borrower."""
    out = {}
    for group in plan.groups:
        device = device_of(root, group.members[0])
        out.update({f"{group.name}.{name}": device for name in (*group.tensors, *group.fixed)})
    for path, named in plan.bindings.items():
        out.update({own_key(path, name): device_of(root, path) for name in named})
    return out


def initial_tensors(root: nn.Module, plan: Plan, seed: int, home: Mapping[str, torch.device]) -> dict[str, Tensor]:
    """First values of the trainable tensors, by key. `home`: see `homes`."""
    return {
        (key := f"{group.name}.{name}"): _first(root, spec, plan, home[key], seed, group.name, name)
        for group in plan.groups
        for name, spec in group.tensors.items()
    }


def initial_fixed(root: nn.Module, plan: Plan, seed: int, home: Mapping[str, torch.device]) -> dict[str, Tensor]:
    """First values of the fixed tensors, by key: drawn once in an adapter's life. `home`: see `homes`."""
    own = {
        (key := own_key(path, name)): _first(root, spec, plan, home[key], seed, "binding", path, name)
        for path, named in plan.bindings.items()
        for name, spec in named.items()
    }
    shared = {
        (key := f"{group.name}.{name}"): _first(root, spec, plan, home[key], seed, group.name, name)
        for group in plan.groups
        for name, spec in group.fixed.items()
    }
    return {**own, **shared}


def initial_state(plan: Plan, seed: int) -> dict[str, Tensor]:
    """First values of the training-only tensors, on the CPU."""
    return {
        f"{group.name}.{name}": draw(spec, torch.float32, seed, "state", group.name, name)
        for group in plan.groups
        for name, spec in group.state.items()
    }


def _first(root: nn.Module, spec: TensorSpec, plan: Plan, device: torch.device, seed: int, *key: str) -> Tensor:
    dtype = spec.dtype or plan.spec.torch_dtype
    if device.type == "meta":
        return torch.empty(spec.shape, dtype=dtype, device=device)
    if isinstance(spec.init, FromBase):
        return root.get_parameter(spec.init.path).detach().clone().to(dtype)
    if isinstance(spec.init, FromWeight):
        weight = seen_weight(root.get_submodule(spec.init.path))
        if weight.device.type == "meta":
            raise AdapterError(
                f"'{spec.init.path}': the weight is offloaded, and method '{plan.spec.method}' starts from it; "
                "load the model without offloading this layer, or exclude it"
            )
        with torch.no_grad():
            computed = spec.init.compute(weight.to(torch.promote_types(weight.dtype, torch.float32)))
        return as_declared(computed, spec, dtype).clone().to(device)
    return draw(spec, dtype, seed, *key).to(device)


def device_of(root: nn.Module, path: str) -> torch.device:
    """Where a module computes: its weights' device, or its hook's where the weights are offloaded."""
    module = root.get_submodule(path)
    hook = getattr(module, "_hf_hook", None)  # Accelerate's offloading leaves weights on the meta device
    executes = getattr(hook, "execution_device", None)
    device = next(module.parameters()).device
    return torch.device(executes) if device.type == "meta" and executes is not None else device


class Packed:
    """In place of an original: a quantized weight is not changed by merging, a dense one stands in for it."""


@dataclass
class MergedSite:
    """What merging changed at one site: its original weight, or that it was packed, and the merged adapters in order."""

    original: Kept | Packed
    adapters: list[str] = field(default_factory=list)


class Registry:
    """The adapters of one model.

    Attributes:
        banks: by name, in the order of attaching. active: name → run-time scale, in the order of application.
        frozen: the requires_grad flags of the base before the first adapter came.
        merged: path → what merging changed there.
    """

    def __init__(self) -> None:
        self.banks: dict[str, Bank] = {}
        self.active: dict[str, float] = {}
        self.frozen: dict[str, bool] = {}
        self.merged: dict[str, MergedSite] = {}
        self.gradients: dict[str, SharedGradient] = {}
        self.forwards: dict[Any, Forward] = {}
        self.watches: dict[str, Any] = {}

    def is_merged(self, name: str) -> bool:
        """Whether an adapter is merged into the base's weights."""
        return any(name in kept.adapters for kept in self.merged.values())

    def __getstate__(self) -> dict[str, Any]:
        # Functions of plugins do not pickle; layers ask for them again.
        return {**self.__dict__, "forwards": {}}


def registry(model: nn.Module, create: bool = False) -> Registry | None:
    """The model's registry, if it has adapters."""
    found: Registry | None = model.__dict__.get(_REGISTRY)
    if found is None and create:
        found = model.__dict__[_REGISTRY] = Registry()
    return found


def forget(model: nn.Module) -> None:
    """Remove the registry of a model that has no adapter left."""
    model.__dict__.pop(_REGISTRY, None)
