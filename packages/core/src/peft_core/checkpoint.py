"""The checkpoint directory of an adapter: plain files, tensors only, written whole or not at all, read strictly.

adapter.json         format version, spec, method, base, sites, groups (`AdapterFile`)
adapter.safetensors  `{group}.{tensor}` once per tensor, trained or fixed, `binding/{site}.{name}`, `base_weight/{site}`
state.safetensors    what only resuming needs, where the method has such state
README.md            the model card
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from . import files, plugins, sharing
from .bank import Bank
from .base_model import base_info
from .errors import CheckpointError, listed
from .method import BASE_WEIGHT
from .optim import check_stepped
from .plan import Plan
from .sharded import whole
from .sites import Site
from .spec import AdapterSpec, check_options

FORMAT_VERSION = 1
OWNED = f"{BASE_WEIGHT}/"
HEADER, TENSORS, STATE, CARD = "adapter.json", "adapter.safetensors", "state.safetensors", "README.md"


class _Stored(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StoredTensor(_Stored):
    """Shape and dtype of a tensor in the file."""

    shape: tuple[int, ...]
    dtype: str


class StoredSite(_Stored):
    """A site as it was planned."""

    path: str
    in_features: int
    out_features: int
    transposed: bool
    dtype: str
    options: dict[str, Any]


class StoredGroup(_Stored):
    """A sharing group: its borrowers, and its tensors' shapes. `fixed`: of those that are not trained."""

    name: str
    members: tuple[str, ...]
    tensors: dict[str, tuple[int, ...]]
    fixed: dict[str, tuple[int, ...]] = {}


class StoredBase(_Stored):
    """The base model that the adapter was trained on. `quantization`: see `plan.BaseInfo`."""

    name: str
    architecture: str
    model_type: str
    num_parameters: int
    fingerprint: str
    shapes: dict[str, tuple[int, ...]]
    quantization: str = ""


class StoredMethod(_Stored):
    """The plugin that wrote it."""

    name: str
    distribution: str
    version: str


class AdapterFile(_Stored):
    """`adapter.json`.

    Attributes:
        steps: real optimizer steps so far. tensors: key → shape and dtype of everything in adapter.safetensors.
        trained: module → parameter → key of the tensor that replaces it. owned: sites whose base weight is stored.
        checksums: file → SHA-256.
    """

    format_version: int
    spec: dict[str, Any]
    method: StoredMethod
    base: StoredBase
    seed: int
    steps: int
    sites: tuple[StoredSite, ...]
    groups: tuple[StoredGroup, ...]
    trained: dict[str, dict[str, str]]
    owned: tuple[str, ...]
    tensors: dict[str, StoredTensor]
    checksums: dict[str, str]

    def site_list(self) -> tuple[Site, ...]:
        """The sites, with validated options.

        Raises:
            PluginError: the method is not installed. SpecError: the installed version does not know an option.
        """
        info = plugins.method(self.method.name)
        return tuple(
            Site(
                site.path,
                site.in_features,
                site.out_features,
                site.transposed,
                _dtype(site.dtype),
                check_options(info, site.options, f"'{site.path}'"),
            )
            for site in self.sites
        )

    def borrowed(self) -> dict[str, dict[str, str]]:
        """Site path → tensor name → key in the file."""
        return sharing.borrowed(self.groups, self._paths, HEADER)

    def bindings(self) -> dict[str, dict[str, str]]:
        """Site path → name of a fixed tensor → key in the file."""
        own: dict[str, list[str]] = {}
        for key in self.tensors:
            if key.startswith(sharing.OWN):
                path, _, name = key.removeprefix(sharing.OWN).rpartition(".")
                own.setdefault(path, []).append(name)
        return sharing.bound(self.groups, self._paths, own, HEADER)

    @property
    def _paths(self) -> list[str]:
        return [site.path for site in self.sites]


def save(bank: Bank, directory: str | Path) -> None:
    """Write an adapter. Other files in the directory stay; an adapter that stood there is replaced in one step.

    Raises:
        CheckpointError: the directory cannot be written, or a module trained in full was resized since; what was there is
            unchanged.
        OptimizerStepError: the method needs optimizer steps, gradients came, and no step was seen.
        AdapterError: it owns base weights, and was merged without keeping them.
    """
    check_stepped(bank)
    _refuse_resized(bank)
    tensors = _collect(bank)
    state = bank.state
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return  # sharded tensors have been gathered with the others; one process writes
    with files.whole_directory(directory, (HEADER, TENSORS, STATE, *_own_card(Path(directory)))) as temporary:
        checksums = {TENSORS: files.write_tensors(temporary / TENSORS, tensors, {"format": "pt"})}
        if state:
            checksums[STATE] = files.write_tensors(temporary / STATE, state, {"format": "pt"})
        header = describe(bank, tensors, checksums)
        (temporary / HEADER).write_text(header.model_dump_json(indent=1), encoding="utf-8")
        if _own_card(Path(directory)):
            (temporary / CARD).write_text(model_card(header), encoding="utf-8")


def describe(bank: Bank, tensors: Mapping[str, Tensor], checksums: dict[str, str]) -> AdapterFile:
    """The header of an adapter's files."""
    plan, info = bank.plan, bank.plan.spec.info
    base = base_info(bank.root, plan.spec.base_model)  # as it is now: its embeddings may have been resized
    return AdapterFile(
        format_version=FORMAT_VERSION,
        spec=plan.spec.model_dump(mode="json"),
        method=StoredMethod(name=info.name, distribution=info.distribution, version=info.version),
        base=StoredBase(
            name=base.name,
            architecture=base.architecture,
            model_type=base.model_type,
            num_parameters=base.num_parameters,
            fingerprint=base.fingerprint,
            shapes=dict(base.shapes),
            quantization=base.quantization,
        ),
        seed=bank.seed,
        steps=bank.progress.steps,
        sites=_stored_sites(plan.sites),
        groups=_stored_groups(plan),
        trained={path: dict(named) for path, named in plan.trained.items()},
        owned=_owned(plan),
        tensors=_stored_tensors(tensors),
        checksums=checksums,
    )


def _refuse_resized(bank: Bank) -> None:
    shapes = {key: tensor.shape for key, tensor in bank.plan.tensors()}
    for path, named in bank.plan.trained.items():
        for local, key in named.items():
            if tuple(bank.root.get_parameter(f"{path}.{local}").shape) != shapes[key]:
                raise CheckpointError(
                    f"'{path}' was resized or replaced after the adapter was attached, so that its trained copy fits no "
                    "model; resize first, then attach"
                )


def _stored_sites(sites: Iterable[Site]) -> tuple[StoredSite, ...]:
    return tuple(
        StoredSite(
            path=site.path,
            in_features=site.in_features,
            out_features=site.out_features,
            transposed=site.transposed,
            dtype=_name(site.dtype),
            options=site.options.model_dump(mode="json"),
        )
        for site in sites
    )


def _stored_groups(plan: Plan) -> tuple[StoredGroup, ...]:
    return tuple(
        StoredGroup(
            name=group.name,
            members=group.members,
            tensors={name: tensor.shape for name, tensor in group.tensors.items()},
            fixed={name: tensor.shape for name, tensor in group.fixed.items()},
        )
        for group in plan.groups
    )


def _stored_tensors(tensors: Mapping[str, Tensor]) -> dict[str, StoredTensor]:
    return {key: StoredTensor(shape=tuple(t.shape), dtype=_name(t.dtype)) for key, t in tensors.items()}


def _owned(plan: Plan) -> tuple[str, ...]:
    """Sites whose base weight is stored."""
    return tuple(site.path for site in plan.sites) if plan.spec.capabilities.owns_base_weight else ()


def read_header(directory: str | Path) -> AdapterFile:
    """`adapter.json` of an adapter directory.

    Raises:
        CheckpointError: it is no adapter directory, the file is damaged, or a newer peft-core wrote it.
    """
    path = Path(directory) / HEADER
    if not path.is_file():
        what = "does not exist" if not Path(directory).exists() else f"is no adapter directory: it has no {HEADER}"
        if (Path(directory) / "adapter_config.json").is_file():
            what = "is an adapter of Hugging Face PEFT, not one of peft-core"
        raise CheckpointError(f"'{directory}' {what}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version = data["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        what = "not JSON" if isinstance(error, ValueError) else "no format_version"
        raise CheckpointError(f"'{path}' is damaged: {what}") from None
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CheckpointError(
            f"'{directory}' has format version {version}; this peft-core reads up to {FORMAT_VERSION}: upgrade peft-core"
        )
    try:
        return AdapterFile.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"'{path}' is damaged: {place}: {first['msg']}") from None


def read(directory: str | Path, header: AdapterFile) -> dict[str, Tensor]:
    """The tensors of an adapter directory by key, complete, finite and of the recorded shapes.

    Raises:
        CheckpointError: names the first key that is missing, unexpected, wrongly shaped, empty or not finite.
    """
    path = Path(directory) / TENSORS
    tensors = files.read_tensors(path, header.checksums.get(TENSORS))
    _compare(str(path), {key: stored.shape for key, stored in header.tensors.items()}, tensors)
    for key, tensor in tensors.items():
        if _name(tensor.dtype) != header.tensors[key].dtype:
            raise CheckpointError(
                f"'{path}': '{key}' is {_name(tensor.dtype)}, {HEADER} says {header.tensors[key].dtype}"
            )
        if tensor.numel() == 0:
            raise CheckpointError(f"'{path}': '{key}' is empty")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"'{path}': '{key}' holds NaN or infinite values; the training run diverged")
    return tensors


def read_state(directory: str | Path, header: AdapterFile, plan: Plan) -> dict[str, Tensor]:
    """The tensors that only resuming needs. See `read` for the errors."""
    expected = {f"{g.name}.{name}": spec.shape for g in plan.groups for name, spec in g.state.items()}
    if not expected:
        return {}
    path = Path(directory) / STATE
    tensors = files.read_tensors(path, header.checksums.get(STATE))
    _compare(str(path), expected, tensors)
    return tensors


def check_fit(directory: str | Path, header: AdapterFile, model: nn.Module) -> None:
    """Refuse another base model.

    Raises:
        CheckpointError: names the first layer or parameter that differs.
    """
    here, there = base_info(model).shapes, header.base.shapes
    if dict(here) == there:
        return
    name = (
        f" ({header.base.architecture} '{header.base.name}')" if header.base.name else f" ({header.base.architecture})"
    )
    for key in [*there, *here]:
        mine, theirs = here.get(key), there.get(key)
        if mine != theirs:
            if mine is None:
                what = f"this model has no '{key}'"
            elif theirs is None:
                what = f"this model has '{key}', which that base has not"
            else:
                what = f"'{key}' is {list(mine)} here and {list(theirs)} there"
            raise CheckpointError(f"'{directory}' was trained on another base model{name}: {what}")


def check_plan(directory: str | Path, header: AdapterFile, plan: Plan) -> None:
    """Refuse a plan that is not the stored one: another version of the method may lay its tensors out otherwise.

    Raises:
        CheckpointError: names the layer, group or tensor that differs.
    """
    # Options as the installed version completes them. A base of another dtype, or stored in the other orientation, will do.
    here, there = (
        _stored_sites(replace(site, transposed=False, dtype=torch.float32) for site in sites)
        for sites in (plan.sites, header.site_list())
    )
    owned = _owned(plan)
    shapes = {key: {"shape": tuple(tensor.shape)} for key, tensor in (*plan.tensors(), *plan.fixed())}
    shapes |= {f"{OWNED}{site.path}": {"shape": (site.out_features, site.in_features)} for site in plan.sites if owned}
    differs = _first_difference(
        _layout(here, _stored_groups(plan), plan.trained, owned),
        _layout(there, header.groups, header.trained, header.owned),
    ) or _first_difference([shapes], [{key: {"shape": tensor.shape} for key, tensor in header.tensors.items()}])
    if differs:
        info = plan.spec.info
        raise CheckpointError(
            f"'{directory}' is laid out otherwise by {info.distribution or info.name} {info.version} than by "
            f"{header.method.version or 'the version'} that wrote it, or {HEADER} was changed: {differs}"
        )


def check_layout(directory: str | Path, header: AdapterFile, bank: Bank) -> None:
    """Refuse an adapter whose values cannot take the place of this bank's.

    Raises:
        CheckpointError: names the method, the layer or the tensor that differs.
    """
    plan, method = bank.plan, bank.plan.spec.method
    if header.method.name != method:
        raise CheckpointError(f"'{directory}' has the method '{header.method.name}', adapter '{bank.name}' '{method}'")
    tensors = _stored_tensors(_collect(bank))
    differs = _first_difference(
        _layout(_stored_sites(plan.sites), _stored_groups(plan), plan.trained, _owned(plan)),
        _layout(header.sites, header.groups, header.trained, header.owned),
    ) or _first_difference(
        [{key: tensor.model_dump() for key, tensor in tensors.items()}],
        [{key: tensor.model_dump() for key, tensor in header.tensors.items()}],
    )
    if differs:
        raise CheckpointError(
            f"'{directory}' has another layout than adapter '{bank.name}', so that its values cannot be taken over: "
            f"{differs}; use load() for an adapter of its own"
        )


def _layout(
    sites: Iterable[StoredSite],
    groups: Iterable[StoredGroup],
    trained: Mapping[str, Mapping[str, str]],
    owned: Iterable[str],
) -> list[dict[str, Any]]:
    """What two descriptions of an adapter must agree on, by name."""
    return [
        {site.path: site.model_dump() for site in sites},
        {group.name: {"members": group.members} for group in groups},
        {path: dict(named) for path, named in trained.items()},
        dict.fromkeys(owned, True),
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


def spec_of(header: AdapterFile) -> AdapterSpec:
    """The stored spec.

    Raises:
        PluginError: its method is not installed. SpecError: an option is unknown to the installed version.
    """
    return AdapterSpec.model_validate(header.spec)


def model_card(header: AdapterFile) -> str:
    """README.md of an adapter directory, with the front matter that model hubs read."""
    size = sum(math.prod(s.shape) * _dtype(s.dtype).itemsize for s in header.tensors.values())
    trainable = sum(math.prod(shape) for g in header.groups for shape in g.tensors.values())
    types: dict[str, int] = {}
    for site in header.sites:
        types[site.path.rpartition(".")[2]] = types.get(site.path.rpartition(".")[2], 0) + 1
    front = ["---", "library_name: peft-core", "tags:", "- peft-core", f"- {header.method.name}"]
    if header.base.name and not Path(header.base.name).is_absolute():
        front.insert(1, f"base_model: {header.base.name}")
    package = header.method.distribution or f"peft-method-{header.method.name}"
    return "\n".join(
        [
            *front,
            "---",
            "",
            f"# {header.method.name} adapter",
            "",
            f"Trained with [peft-core] and `{package}` {header.method.version} on a "
            f"`{header.base.architecture}`" + (f" (`{header.base.name}`)." if header.base.name else "."),
            "",
            f"- Trainable parameters: {trainable:,} ({100 * trainable / header.base.num_parameters:.3f} % of the base)",
            f"- Tensors: {len(header.tensors)}, {size:,} bytes",
            f"- Adapted layers: {listed([f'{name} ({count})' for name, count in types.items()], 20)}",
            *([f"- Trained in full: {', '.join(header.trained)}"] if header.trained else []),
            *([f"- Optimizer steps: {header.steps}"] if header.steps else []),
            "",
            "```python",
            f"# pip install peft-core {package}",
            "import peft_core as pc",
            "",
            "adapter = pc.load(base_model, 'path/to/this/directory')",
            "```",
            "",
            "```json",
            json.dumps(header.spec, indent=2),
            "```",
            "",
        ]
    )


def _collect(bank: Bank) -> dict[str, Tensor]:
    """Everything that inference needs, by key."""
    tensors: dict[str, Tensor] = {}
    for key, parameter in bank.named_parameters():
        tensors[key] = whole(parameter)
    tensors.update(bank.named_fixed())
    for path in bank.owned:
        tensors[f"{OWNED}{path}"] = bank.owned_weight(bank.sites[path])
    return tensors


def _compare(path: str, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor]) -> None:
    if missing := [key for key in expected if key not in found]:
        raise CheckpointError(f"'{path}': '{missing[0]}' is missing")
    if unexpected := [key for key in found if key not in expected]:
        raise CheckpointError(f"'{path}': '{unexpected[0]}' is not expected")
    for key, shape in expected.items():
        if tuple(found[key].shape) != tuple(shape):
            raise CheckpointError(f"'{path}': '{key}' has shape {list(found[key].shape)}, expected {list(shape)}")


def _own_card(directory: Path) -> tuple[str, ...]:
    """README.md is ours to write, unless somebody else's stands there."""
    return () if (directory / CARD).exists() and not (directory / HEADER).exists() else (CARD,)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"{HEADER}: '{name}' is no dtype")
    return dtype
