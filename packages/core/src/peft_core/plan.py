"""The plan: what a spec will do to a model, known before any weight is touched."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from . import bases, plugins
from .bases import ROOT_PREFIX as ROOT_PREFIX
from .errors import ModelError, PlanError, SpecError, listed
from .sharing import (
    FromBase,
    FromWeight,
    Initializer,
    Layout,
    SharingGroup,
    TensorSpec,
    borrowed,
    bound,
    own_key,
)
from .sites import Site
from .spec import AdapterSpec
from .targets import choose, find_modules

RESERVED = "base_weight"
"""What a method that is not additive finds its site's weight under, beside the tensors that it borrows."""


@dataclass(frozen=True)
class BaseInfo:
    """What is remembered of a base model: enough to recognise it, and to name the first difference.

    Attributes:
        name: as recorded by the spec or the model's configuration. model_type, architecture: as transformers has them.
        num_parameters: of the base, embeddings and heads included, shared ones once.
        shapes: layer or parameter path → logical shape. fingerprint: a hash of them.
        quantization: in what its layers were packed, as "4-bit (nf4)"; nothing for a dense base.
    """

    name: str
    architecture: str
    model_type: str
    num_parameters: int
    shapes: Mapping[str, tuple[int, ...]]
    quantization: str = ""

    @property
    def fingerprint(self) -> str:
        """Hash of all paths and shapes."""
        return hashlib.sha256(json.dumps(self.shapes, sort_keys=True).encode()).hexdigest()[:32]


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
                yield own_key(path, name), tensor
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
        return _table(self)

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=120, color_system=None)
        console.print(self)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        return "\n".join(line.rstrip() for line in text.splitlines())


def plan(model: nn.Module | str | Path, spec: AdapterSpec) -> Plan:
    """Lay out a spec on a model: a module, on any device (meta included), or a checkpoint directory.

    Raises:
        TargetError: the targets do not fit the model. PlanError: the method's options do not fit a site.
        ModelError: the directory holds no model configuration that can be read. SpecError: `spec` is no AdapterSpec.
    """
    if not isinstance(spec, AdapterSpec):
        raise SpecError(
            f"a plan needs an AdapterSpec, it was given {spec!r:.80}: AdapterSpec.model_validate(...) makes one"
        )
    model = bases.unwrap(model) if isinstance(model, nn.Module) else meta_model(model)
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
            f"method '{spec.method}': peft_init must return a Layout with a tuple of groups, it returned {layout!r:.200}"
        )
    trained_groups, trained, trained_notes = _trained_modules(model, spec)
    groups = layout.groups + trained_groups
    _check(spec, choice.sites, layout, groups)
    return Plan(
        spec=spec,
        sites=choice.sites,
        groups=groups,
        bindings=layout.bindings,
        trained=trained,
        base=base_info(model, spec.base_model),
        notes=choice.notes + layout.notes + trained_notes,
    )


def meta_model(directory: str | Path) -> nn.Module:
    """The model that a checkpoint directory describes, on the meta device: shapes without weights.

    Raises:
        ModelError: there is no configuration, or it names a class that transformers does not have.
    """
    import transformers

    path = Path(directory)
    if not (path / "config.json").is_file():
        raise ModelError(f"'{directory}' is no checkpoint directory: it has no config.json")
    try:
        config = transformers.AutoConfig.from_pretrained(path)
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(f"'{directory}': config.json cannot be read: {_first_sentence(error)}") from None
    architecture = (config.architectures or [None])[0]
    cls = getattr(transformers, architecture or "", None)
    if cls is None:
        raise ModelError(
            f"'{directory}': config.json names the architecture '{architecture}', which transformers lacks"
        )
    with torch.device("meta"):
        model: nn.Module = cls._from_config(config, dtype=getattr(config, "dtype", None) or torch.float32)
    return model


def _first_sentence(error: Exception) -> str:
    """What another library says, without the page that follows."""
    return " ".join(str(error).split()).partition(". ")[0][:200]


def base_info(model: nn.Module, name: str | None = None) -> BaseInfo:
    """What to remember of a base model. What adapters have registered on it is not part of it."""
    shapes: dict[str, tuple[int, ...]] = {}
    count = 0
    seen: set[int] = set()
    packed: set[str] = set()
    for path, module in model.named_modules():
        base = bases.describe(module)
        if bases.is_quantized(module):
            packed.add(bases.packing(module))
        if base:
            shapes[path] = (base.out_features, base.in_features)
        for local, parameter in bases.own_parameters(module):
            logical = base.in_features * base.out_features if base and local == "weight" else parameter.numel()
            if not (base and local == "weight"):
                shapes[f"{path}.{local}" if path else local] = tuple(parameter.shape)
            if id(parameter) not in seen:
                seen.add(id(parameter))
                count += logical
    config = getattr(model, "config", None)
    recorded = name or getattr(config, "_name_or_path", "") or ""
    return BaseInfo(
        recorded,
        type(model).__name__,
        getattr(config, "model_type", ""),
        count,
        shapes,
        ", ".join(sorted(packed)),
    )


def _trained_modules(
    model: nn.Module, spec: AdapterSpec
) -> tuple[tuple[SharingGroup, ...], dict[str, dict[str, str]], tuple[str, ...]]:
    """Groups that hold copies of modules trained in full. Parameters tied in the base stay tied: one group borrows."""
    owners: dict[int, str] = {}
    groups: dict[str, dict[str, TensorSpec]] = {}
    members: dict[str, list[str]] = {}
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
        for name, parameter in module.named_parameters():
            if not parameter.is_floating_point():
                raise PlanError(f"train_modules: '{path}.{name}' is quantized and cannot be trained in full")
            if id(parameter) not in owners:
                owners[id(parameter)] = f"{path}.{name}"
                groups.setdefault(path, {})[name] = TensorSpec(tuple(parameter.shape), FromBase(f"{path}.{name}"))
                members[path] = [path]
            key = owners[id(parameter)]
            trained[path][name] = key
            owner = next(p for p in groups if key.startswith(p + ".") and key.removeprefix(p + ".") in groups[p])
            if path not in members[owner]:
                members[owner].append(path)
    made = tuple(SharingGroup(path, tuple(members[path]), tensors) for path, tensors in groups.items())
    notes = tuple(
        f"'{group.name}' and '{group.members[1]}' share their weight and stay tied"
        for group in made
        if len(group.members) > 1
    )
    return made, trained, notes


def _check(spec: AdapterSpec, sites: tuple[Site, ...], layout: Layout, groups: tuple[SharingGroup, ...]) -> None:
    """A layout that cannot work is a fault of the plugin; name it here, before anything is attached."""
    where = f"method '{spec.method}': peft_init"
    for group in layout.groups:
        for name, tensor in (*group.tensors.items(), *group.fixed.items(), *group.state.items()):
            _check_tensor(tensor, f"{where}: tensor '{group.name}.{name}'")
        if integers := [name for name, t in group.tensors.items() if not (t.dtype or torch.float32).is_floating_point]:
            raise PlanError(
                f"{where}: tensor '{group.name}.{integers[0]}' is of integers, which cannot be trained; make it fixed"
            )
        if RESERVED in group.tensors:
            raise PlanError(
                f"{where}: group '{group.name}' names a tensor '{RESERVED}', the name of the base's own weight"
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
                f"{where}: group '{group.name}' has the member '{strangers[0]}', which is no site of the plan"
            )
        if not (group.tensors or group.fixed) or not group.members:
            what = "members" if group.tensors or group.fixed else "tensors"
            raise PlanError(f"{where}: group '{group.name}' has no {what}")
        starts = [tensor.init for tensor in (*group.tensors.values(), *group.fixed.values())]
        if lost := [init.path for init in starts if isinstance(init, FromWeight) and init.path not in paths]:
            raise PlanError(
                f"{where}: group '{group.name}' starts from the weight of '{lost[0]}', which is no site of the plan"
            )
    uncovered = paths - {member for group in layout.groups if group.tensors for member in group.members}
    if uncovered:
        raise PlanError(f"{where} gave no tensor to {listed(sorted(uncovered), 3)}")
    for path, named in layout.bindings.items():
        if path not in paths:
            raise PlanError(f"{where}: a binding is for '{path}', which is no site of the plan")
        for name, tensor in named.items():
            _check_tensor(tensor, f"{where}: '{name}' in the binding of '{path}'")
    borrowed(layout.groups, paths, where)
    bound(layout.groups, paths, layout.bindings, where)


def _check_tensor(tensor: Any, what: str) -> None:
    if not isinstance(tensor, TensorSpec):
        raise PlanError(f"{what} must be a TensorSpec, it is {tensor!r}")
    if not (isinstance(tensor.shape, tuple) and all(isinstance(length, int) and length > 0 for length in tensor.shape)):
        raise PlanError(f"{what}: its shape must be a tuple of positive integers, it is {tensor.shape!r}")
    if not isinstance(tensor.init, Initializer):
        raise PlanError(f"{what}: its init must be an Initializer such as pc.Zeros(), it is {tensor.init!r}")


def size(count: float) -> str:
    """Bytes for people: `1.4 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _table(plan: Plan) -> Table:
    spec = plan.spec
    table = Table(title=f"Plan: {spec.method} on {plan.base.architecture}", title_justify="left")
    for heading in (
        "module type",
        "sites",
        "tensor",
        "shape",
        "tensors × borrowers",
        "trainable",
        "bytes",
        "% of base",
    ):
        table.add_column(heading, justify="left" if heading in ("module type", "tensor") else "right")
    site_types = {site.path: site.type for site in plan.sites}
    rows: dict[tuple[str, str, tuple[int, ...]], list[tuple[TensorSpec, int]]] = {}
    for group in plan.groups:
        types = sorted({site_types.get(member, f"{member} (in full)") for member in group.members})
        for name, tensor in group.tensors.items():
            rows.setdefault((", ".join(types), name, tensor.shape), []).append((tensor, len(group.members)))
    counts = Counter(site_types.values())
    previous = ""
    for (kind, name, shape), tensors in sorted(rows.items(), key=lambda row: list(rows).index(row[0])):
        numel = sum(tensor.numel for tensor, _ in tensors)
        nbytes = sum(tensor.nbytes(spec.torch_dtype) for tensor, _ in tensors)
        borrowers = sorted({count for _, count in tensors})
        span = str(borrowers[0]) if len(borrowers) == 1 else f"{borrowers[0]}–{borrowers[-1]}"
        table.add_row(
            kind if kind != previous else "",
            str(counts.get(kind, "")) if kind != previous else "",
            name,
            "×".join(map(str, shape)) or "scalar",
            f"{len(tensors)} × {span}",
            f"{numel:,}",
            size(nbytes),
            f"{100 * numel / plan.base.num_parameters:.3f}",
        )
        previous = kind
    table.add_section()
    table.add_row(
        "total",
        str(len(plan.sites)),
        "",
        "",
        str(sum(len(group.tensors) for group in plan.groups)),
        f"{plan.num_trainable:,}",
        size(plan.trainable_bytes),
        f"{100 * plan.num_trainable / plan.base.num_parameters:.3f}",
    )
    remarks = [f"merging keeps {size(plan.merge_bytes)} of original weights, disabling {size(plan.disable_bytes)}"]
    if plan.fixed_bytes:
        remarks.append(f"saved beside them, and never trained: {size(plan.fixed_bytes)}")
    if plan.state_bytes:
        remarks.append(f"training keeps {size(plan.state_bytes)} of state that is no parameter, on the CPU")
    table.caption = "\n".join([*remarks, *plan.notes])
    table.caption_justify = "left"
    return table
