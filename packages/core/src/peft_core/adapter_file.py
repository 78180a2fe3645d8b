"""`adapter.json`: what an adapter directory says of itself."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from . import plugins, sharing
from .base_model import BaseInfo
from .dtypes import DtypeName, dtype_of, name_of
from .errors import CheckpointError, reason
from .method import BASE_WEIGHT
from .plan import Plan
from .sites import Site
from .spec import AdapterSpec, check_options

FORMAT_VERSION = 1
HEADER = "adapter.json"


class _Stored(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StoredTensor(_Stored):
    """Shape and dtype of a tensor in the file."""

    shape: tuple[int, ...]
    dtype: DtypeName


class StoredSite(_Stored):
    """A site as it was planned."""

    path: str
    in_features: int
    out_features: int
    transposed: bool
    dtype: DtypeName
    options: dict[str, Any]


class StoredGroup(_Stored):
    """A sharing group: its borrowers, and its tensors' shapes. `fixed`: of those that are not trained."""

    name: str
    members: tuple[str, ...]
    tensors: dict[str, tuple[int, ...]]
    fixed: dict[str, tuple[int, ...]] = {}


class StoredBase(_Stored):
    """The base model that the adapter was trained on; see `BaseInfo`."""

    name: str
    architecture: str
    model_type: str
    num_parameters: int
    fingerprint: str
    shapes: dict[str, tuple[int, ...]]
    quantization: str = ""
    classes: tuple[str, ...] = ()
    pad_token_id: int | None = None


class StoredMethod(_Stored):
    """The plugin that wrote it."""

    name: str
    distribution: str
    version: str


class AdapterFile(_Stored):
    """`adapter.json`.

    Attributes:
        steps: real optimizer steps so far. run_start: as many as there were when the latest run began.
        tensors: key → shape and dtype of everything in adapter.safetensors.
        trained: module → parameter → key of the tensor that replaces it. owned: sites whose base weight is stored.
        checksums: file → SHA-256.
    """

    format_version: int
    spec: dict[str, Any]
    method: StoredMethod
    base: StoredBase
    seed: int
    steps: int
    run_start: int = 0
    sites: tuple[StoredSite, ...]
    groups: tuple[StoredGroup, ...]
    trained: dict[str, dict[str, str]]
    owned: tuple[str, ...]
    tensors: dict[str, StoredTensor]
    checksums: dict[str, str]

    @property
    def num_trainable(self) -> int:
        """Trainable parameters, each counted once."""
        return sum(math.prod(shape) for group in self.groups for shape in group.tensors.values())

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
                dtype_of(site.dtype),
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
            if key.startswith(sharing.BINDING):
                path, _, name = key.removeprefix(sharing.BINDING).rpartition(".")
                own.setdefault(path, []).append(name)
        return sharing.bound(self.groups, self._paths, own, HEADER)

    @property
    def _paths(self) -> list[str]:
        return [site.path for site in self.sites]


def owned_key(path: str) -> str:
    """Key of the weight that the method owns at a site."""
    return f"{BASE_WEIGHT}/{path}"


def describe(
    plan: Plan,
    base: BaseInfo,
    tensors: Mapping[str, Tensor],
    checksums: dict[str, str],
    seed: int,
    steps: int,
    run_start: int,
) -> AdapterFile:
    """The header of an adapter's files. `base`: the base model as it is now (its embeddings may have been resized)."""
    info = plan.spec.info
    return AdapterFile(
        format_version=FORMAT_VERSION,
        spec=plan.spec.model_dump(mode="json"),
        method=StoredMethod(name=info.name, distribution=info.distribution, version=info.version),
        base=StoredBase(**vars(base), fingerprint=base.fingerprint),
        seed=seed,
        steps=steps,
        run_start=run_start,
        sites=stored_sites(plan.sites),
        groups=stored_groups(plan),
        trained={path: dict(named) for path, named in plan.trained.items()},
        owned=owned_sites(plan),
        tensors=stored_tensors(tensors),
        checksums=checksums,
    )


def read_header(directory: str | Path) -> AdapterFile:
    """`adapter.json` of an adapter directory.

    Raises:
        CheckpointError: it is not an adapter directory, the file is damaged, or a newer peft-core wrote it.
    """
    path = Path(directory) / HEADER
    if not path.is_file():
        what = "does not exist" if not Path(directory).exists() else f"is not an adapter directory: it has no {HEADER}"
        if (Path(directory) / "adapter_config.json").is_file():
            what = "is an adapter of Hugging Face PEFT, not one of peft-core"
        raise CheckpointError(f"'{directory}' {what}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version = data["format_version"]
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read: {reason(error)}") from None
    except (ValueError, KeyError, TypeError) as error:
        what = "not JSON" if isinstance(error, ValueError) else "no format_version"
        raise CheckpointError(f"'{path}' is damaged: {what}") from None
    if type(version) is not int or version < 1:
        raise CheckpointError(f"'{path}' is damaged: format_version is {version!r}, expected a number from 1 on")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"'{directory}' has format version {version}; this peft-core reads up to {FORMAT_VERSION}: upgrade peft-core"
        )
    try:
        return AdapterFile.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"'{path}' is damaged: {place}: {first['msg']}") from None


def spec_of(header: AdapterFile) -> AdapterSpec:
    """The stored spec.

    Raises:
        PluginError: its method is not installed. SpecError: an option is unknown to the installed version.
    """
    return AdapterSpec.model_validate(header.spec)


def stored_sites(sites: Iterable[Site]) -> tuple[StoredSite, ...]:
    """Sites as the file describes them."""
    return tuple(
        StoredSite(
            path=site.path,
            in_features=site.in_features,
            out_features=site.out_features,
            transposed=site.transposed,
            dtype=name_of(site.dtype),
            options=site.options.model_dump(mode="json"),
        )
        for site in sites
    )


def stored_groups(plan: Plan) -> tuple[StoredGroup, ...]:
    """A plan's groups as the file describes them."""
    return tuple(
        StoredGroup(
            name=group.name,
            members=group.members,
            tensors={name: tensor.shape for name, tensor in group.tensors.items()},
            fixed={name: tensor.shape for name, tensor in group.fixed.items()},
        )
        for group in plan.groups
    )


def stored_tensors(tensors: Mapping[str, Tensor]) -> dict[str, StoredTensor]:
    """Tensors by key as the file describes them."""
    return {key: StoredTensor(shape=tuple(t.shape), dtype=name_of(t.dtype)) for key, t in tensors.items()}


def owned_sites(plan: Plan) -> tuple[str, ...]:
    """Sites whose base weight is stored."""
    return tuple(site.path for site in plan.sites) if plan.spec.capabilities.owns_base_weight else ()
