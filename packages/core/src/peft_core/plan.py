"""The plan: what a spec will do to a model, known before any weight is touched."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from . import bases, plugins
from .base_model import BaseInfo, base_info, meta_model
from .errors import ModelError, PlanError, SpecError, size
from .layout_checks import check_layout
from .plan_table import table_of
from .sharing import FromBase, Layout, SharingGroup, TensorSpec, binding_key, borrowed, bound, stand_ins
from .sites import Site
from .spec import AdapterSpec
from .targets import choose, find_modules
from .unwrapping import unwrap


@dataclass(frozen=True)
class Plan:
    """Sites and sharing groups of one spec on one model: pure data, the same on every machine.

    Attributes:
        spec: with complete options. sites: in the model's order. groups: the method's, then those of trained modules.
        bindings: site path → its fixed tensors. trained: path of a module trained in full → its parameter names →
            key of the tensor that stands in for it. base: the model it was made for. notes: remarks for the reader.
    """

    spec: AdapterSpec
    sites: tuple[Site, ...]
    groups: tuple[SharingGroup, ...]
    bindings: Mapping[str, Mapping[str, TensorSpec]]
    trained: Mapping[str, Mapping[str, str]]
    base: BaseInfo
    notes: tuple[str, ...]

    @property
    def num_trainable(self) -> int:
        """Trainable parameters, each counted once."""
        return sum(group.num_trainable for group in self.groups)

    @property
    def trainable_bytes(self) -> int:
        """Bytes of the trainable parameters."""
        return sum(tensor.nbytes(self.spec.torch_dtype) for _, tensor in self.tensors())

    @property
    def fixed_bytes(self) -> int:
        """Bytes of the tensors that are saved but never trained."""
        return sum(tensor.nbytes(self.spec.torch_dtype) for _, tensor in self.fixed())

    @property
    def state_bytes(self) -> int:
        """Bytes of the tensors that only training needs."""
        return sum(t.nbytes(torch.float32) for group in self.groups for t in group.state.values())

    @property
    def merge_bytes(self) -> int:
        """Bytes of the original weights that merging keeps, so that unmerging restores every bit."""
        return sum(site.in_features * site.out_features * site.dtype.itemsize for site in self.sites)

    @property
    def disable_bytes(self) -> int:
        """Bytes that attaching keeps, so that disabling and detaching restore every bit: none, unless the method owns
        the base weight."""
        return self.merge_bytes if self.spec.capabilities.owns_base_weight else 0

    def tensors(self) -> Iterator[tuple[str, TensorSpec]]:
        """(key, tensor) of every trainable tensor; the key is `{group}.{tensor}`."""
        for group in self.groups:
            for name, tensor in group.tensors.items():
                yield f"{group.name}.{name}", tensor

    def fixed(self) -> Iterator[tuple[str, TensorSpec]]:
        """(key, tensor) of every tensor that is saved but never trained; see `bound` for the key."""
        for path, named in self.bindings.items():
            for name, tensor in named.items():
                yield binding_key(path, name), tensor
        for group in self.groups:
            for name, tensor in group.fixed.items():
                yield f"{group.name}.{name}", tensor

    def borrowed(self) -> dict[str, dict[str, str]]:
        """Site path → tensor name → key of the tensor that the site borrows under that name."""
        return borrowed(self.groups, self._paths, f"method '{self.spec.method}'")

    def bound(self) -> dict[str, dict[str, str]]:
        """Site path → name in its binding → key of that fixed tensor: `{group}.{tensor}`, or `binding/{path}.{name}`."""
        return bound(self.groups, self._paths, self.bindings, f"method '{self.spec.method}'")

    @property
    def _paths(self) -> list[str]:
        return [site.path for site in self.sites]

    def to_json(self) -> dict[str, Any]:
        """The plan's figures, as plain data."""
        return {
            "spec": self.spec.model_dump(mode="json"),
            "sites": len(self.sites),
            "trainable_parameters": self.num_trainable,
            "trainable_bytes": self.trainable_bytes,
            "base_parameters": self.base.num_parameters,
            "fixed_bytes": self.fixed_bytes,
            "state_bytes": self.state_bytes,
            "merge_keeps_bytes": self.merge_bytes,
            "disable_keeps_bytes": self.disable_bytes,
            "groups": [
                {
                    "name": group.name,
                    "borrowers": len(group.members),
                    "tensors": {name: list(tensor.shape) for name, tensor in group.tensors.items()},
                    "fixed": {name: list(tensor.shape) for name, tensor in group.fixed.items()},
                }
                for group in self.groups
            ],
            "notes": list(self.notes),
        }

    def __rich__(self) -> Table:
        title = f"Plan: {self.spec.method} on {self.base.architecture}"
        remarks = [
            f"merging keeps {size(self.merge_bytes)} of original weights, disabling keeps {size(self.disable_bytes)}"
        ]
        if self.fixed_bytes:
            remarks.append(f"saved with them but never trained: {size(self.fixed_bytes)}")
        if self.state_bytes:
            remarks.append(f"training keeps {size(self.state_bytes)} of state beside its parameters, on the CPU")
        remarks += self.notes
        return table_of(title, self.sites, self.groups, self.spec.torch_dtype, self.base.num_parameters, remarks)

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=120, color_system=None)
        console.print(self)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        return "\n".join(line.rstrip() for line in text.splitlines())


def plan(model: nn.Module | str | Path, spec: AdapterSpec) -> Plan:
    """Lay out a spec on a model: a module, on any device (meta included), a checkpoint directory, or a name on a hub.

    Raises:
        TargetError: the targets do not fit the model. PlanError: the method's options do not fit a site.
        ModelError: there is no model configuration that can be read. SpecError: `spec` is not an AdapterSpec.
    """
    if not isinstance(spec, AdapterSpec):
        raise SpecError(f"plan needs an AdapterSpec, got {spec!r:.80}; build one with AdapterSpec.model_validate(...)")
    if not isinstance(model, (nn.Module, str, Path)):
        raise ModelError(f"plan needs a model, a checkpoint directory or a name on a hub, got {model!r:.80}")
    model = unwrap(model) if isinstance(model, nn.Module) else meta_model(model)
    choice = choose(model, spec)
    if spec.capabilities.owns_base_weight:
        for site in choice.sites:
            if bases.is_quantized(model.get_submodule(site.path)):
                raise PlanError(
                    f"'{site.path}' is quantized, and method '{spec.method}' writes into the base's weight: "
                    "load the base in its original precision"
                )
    layout = plugins.call(spec.method, "peft_init", sites=choice.sites)
    if not isinstance(layout, Layout) or not isinstance(layout.groups, tuple):
        raise PlanError(
            f"method '{spec.method}': peft_init must return a Layout with a tuple of groups, got {layout!r:.200}"
        )
    trained_groups, trained, trained_notes = _trained_modules(model, spec)
    groups = layout.groups + trained_groups
    check_layout(spec, choice.sites, layout, groups)
    return Plan(
        spec=spec,
        sites=choice.sites,
        groups=groups,
        bindings=layout.bindings,
        trained=trained,
        base=base_info(model, spec.base_model),
        notes=choice.notes + layout.notes + trained_notes + _tie_notes(model, choice.sites, trained),
    )


def _tie_notes(model: nn.Module, sites: tuple[Site, ...], trained: Mapping[str, Mapping[str, str]]) -> tuple[str, ...]:
    """What is tied in the base and comes apart in an adapter can be trained, but not merged into one tensor."""
    weights = [f"{site.path}.weight" for site in sites if "weight" in model.get_submodule(site.path)._parameters]
    apart = bases.tied(model, weights) | bases.tied(model, stand_ins(trained), trained)
    return tuple(
        f"'{name}' and '{other}' are one tensor in the base: the adapter changes only the first, and cannot be merged in place"
        for name, other in apart.items()
    )


def _trained_modules(
    model: nn.Module, spec: AdapterSpec
) -> tuple[tuple[SharingGroup, ...], dict[str, dict[str, str]], tuple[str, ...]]:
    """Groups that hold copies of modules trained in full. Parameters tied in the base stay tied: one group borrows."""
    owners: dict[int, tuple[str, str]] = {}  # parameter → the first module that has it, and its name there
    groups: dict[str, dict[str, TensorSpec]] = {}
    members: dict[str, dict[str, None]] = {}  # an ordered set
    trained: dict[str, dict[str, str]] = {}
    for path in find_modules(model, spec.train_modules):
        module = model.get_submodule(path)
        for name, buffer in module.named_buffers():
            persistent = name in module.state_dict()
            if persistent and buffer.is_floating_point():
                raise PlanError(
                    f"train_modules: '{path}' has the running buffer '{name}', which training would change in the base"
                )
        trained[path] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if not parameter.is_floating_point():
                raise PlanError(f"train_modules: '{path}.{name}' is quantized and cannot be trained in full")
            owner, local = owners.setdefault(id(parameter), (path, name))
            key = f"{owner}.{local}"
            if (owner, local) == (path, name):
                groups.setdefault(path, {})[name] = TensorSpec(tuple(parameter.shape), FromBase(key))
            members.setdefault(owner, {})[path] = None
            trained[path][name] = key
    made = tuple(SharingGroup(path, tuple(members[path]), tensors) for path, tensors in groups.items())
    notes = tuple(
        f"'{group.name}' and '{group.members[1]}' share their weight and stay tied"
        for group in made
        if len(group.members) > 1
    )
    return made, trained, notes
