"""A saved adapter read tensor by tensor: what it adds at each site, as core's merge takes it.

An adapter can be larger than memory (a method that owns its base weight brings it along), so only tensors that several
sites share are kept, until the last of them has had its turn.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from peft_core import CheckpointError, MergeError, Site, files, plugins
from peft_core.adapter_file import HEADER, owned_key, read_header
from peft_core.checkpoint import TENSORS
from peft_core.merge import Contribution
from peft_core.sharing import stand_ins

from .checkpoint_files import CODES, Entry, Reader, all_finite, read_entries

Adapters: TypeAlias = str | Path | Sequence[str | Path] | Mapping[str, float]


def weights_of(adapters: Adapters) -> dict[str, float]:
    """Adapter directory → weight, of a path, several paths, or a map from path to weight.

    Raises:
        MergeError: none is given, one is given twice under whatever path, or a weight is not a finite number.
    """
    if isinstance(adapters, (str, Path)):
        adapters = [adapters]
    pairs = adapters.items() if isinstance(adapters, Mapping) else ((path, 1.0) for path in adapters)
    weights: dict[str, float] = {}
    known: dict[Path, str] = {}
    for path, weight in pairs:
        first = known.setdefault(Path(path).resolve(), str(path))
        if first in weights:
            also = f" (as '{path}', too)" if first != str(path) else ""
            raise MergeError(
                f"the adapter '{first}' is given twice{also}; give it once, with the weight that it shall have"
            )
        if not math.isfinite(weight):
            raise MergeError(f"'{path}': the weight is {weight:g}; it must be a finite number")
        weights[first] = weight
    if not weights:
        raise MergeError("no adapter is given")
    return weights


class AdapterFiles:
    """One adapter directory.

    Attributes:
        directory, header, weight: the scale with which it is merged. sites: by path, with validated options.
        trained: parameter name of a module trained in full → key of the tensor that takes its place.
    """

    def __init__(self, directory: str | Path, weight: float = 1.0) -> None:
        """Read and check the headers.

        Raises:
            CheckpointError: it is not an adapter, is damaged, or is cut short. PluginError: its method is not installed.
            MergeError: a tensor of it has no use, a site has no tensor, or a weight is asked for where there is no Δ.
        """
        self.directory = Path(directory)
        self.weight = weight
        self.header = read_header(directory)
        self.sites: Mapping[str, Site] = {site.path: site for site in self.header.site_list()}
        self.trained = stand_ins(self.header.trained)
        self._entries = self._checked_entries()
        self._borrowed, self._bindings = self.header.borrowed(), self.header.bindings()
        self._check_uses()
        used = [*self._borrowed.values(), *(named for path, named in self._bindings.items() if path in self.sites)]
        self._uses = Counter(key for named in used for key in named.values())
        self._kept: dict[str, Tensor] = {}
        self._info = plugins.method(self.header.method.name)
        if weight != 1.0:
            self._check_weight()

    @property
    def path(self) -> Path:
        """The file with the tensors."""
        return self.directory / TENSORS

    @property
    def nbytes(self) -> int:
        """Size of the adapter's tensors."""
        return sum(entry.nbytes for entry in self._entries.values())

    def verify(self) -> None:
        """Compare the file with the checksum in the header.

        Raises:
            CheckpointError: they differ.
        """
        expected = self.header.checksums.get(TENSORS)
        if expected is not None and files.checksum(self.path) != expected:
            raise CheckpointError(
                f"'{self.path}' is not the file that was saved (its SHA-256 differs): it is damaged or was exchanged"
            )

    def owns(self, path: str) -> bool:
        """Whether the adapter brings this site's base weight along."""
        return path in self.header.owned

    def exclusive(self, path: str) -> bool:
        """Whether this site can carry no second adapter: its change is not an added Δ."""
        return self._info.can(self.sites[path].options).exclusive

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._entries[key].shape

    def contribution(self, path: str, reader: Reader, owned: Tensor | None = None) -> Contribution:
        """What the adapter adds at a site; each site is asked for once. `owned`: its own weight, if it was read already."""
        tensors = {name: self._shared(key, reader) for name, key in self._borrowed[path].items()}
        binding = {name: self._shared(key, reader) for name, key in self._bindings.get(path, {}).items()}
        if owned is not None:
            self._check_finite(owned_key(path), owned)
        elif self.owns(path):
            owned = self.owned(path, reader)
        return Contribution(self.header.method.name, self.sites[path], tensors, binding, self.weight, owned)

    def owned_entry(self, path: str) -> Entry:
        """Where the weight of a site lies that the adapter owns."""
        return self._entries[owned_key(path)]

    def owned(self, path: str, reader: Reader) -> Tensor:
        """The weight (out × in) of a site that the adapter owns."""
        return self.tensor(owned_key(path), reader)

    def tensor(self, key: str, reader: Reader) -> Tensor:
        """One tensor.

        Raises:
            CheckpointError: it holds NaN or infinite values.
        """
        tensor = reader.read(self._entries[key])
        self._check_finite(key, tensor)
        return tensor

    def _check_finite(self, key: str, tensor: Tensor) -> None:
        if tensor.is_floating_point() and not all_finite(tensor):
            raise CheckpointError(f"'{self.path}': '{key}' holds NaN or infinite values; the training run diverged")

    def _shared(self, key: str, reader: Reader) -> Tensor:
        tensor = self._kept.get(key)
        if tensor is None:
            tensor = self._kept[key] = self.tensor(key, reader)
        self._uses[key] -= 1
        if self._uses[key] <= 0:
            del self._kept[key]
        return tensor

    def _checked_entries(self) -> Mapping[str, Entry]:
        if not self.path.is_file():
            raise CheckpointError(f"'{self.path}' is missing")
        entries, _ = read_entries(self.path)
        stored = self.header.tensors
        for key in [*stored, *entries]:
            if key not in entries or key not in stored:
                what = "is missing" if key not in entries else f"is not expected: {HEADER} does not name it"
                raise CheckpointError(f"'{self.path}': '{key}' {what}")
            entry, said = entries[key], stored[key]
            if entry.shape != tuple(said.shape):
                raise CheckpointError(
                    f"'{self.path}': '{key}' has shape {list(entry.shape)}, expected {list(said.shape)}"
                )
            if entry.dtype != CODES.get(getattr(torch, said.dtype, torch.float32)):
                raise CheckpointError(f"'{self.path}': '{key}' is {entry.dtype}, {HEADER} says {said.dtype}")
            if entry.numel == 0:
                raise CheckpointError(f"'{self.path}': '{key}' is empty")
        return entries

    def _check_uses(self) -> None:
        """Every tensor is used, every use has its tensor."""
        wanted: dict[str, str] = {}
        for path, named in self._borrowed.items():
            if not named:
                raise MergeError(
                    f"'{self.directory}': no tensor belongs to the layer '{path}', which it says that it adapts"
                )
            wanted.update(dict.fromkeys(named.values(), path))
        wanted.update({key: parameter for parameter, key in self.trained.items()})
        wanted.update(
            {key: path for path, named in self._bindings.items() if path in self.sites for key in named.values()}
        )
        wanted.update({owned_key(path): path for path in self.header.owned if path in self.sites})
        if lost := [key for key in wanted if key not in self._entries]:
            raise MergeError(f"'{self.directory}': the tensor '{lost[0]}' of '{wanted[lost[0]]}' is missing")
        if unused := [key for key in self._entries if key not in wanted]:
            raise MergeError(
                f"'{self.directory}': the tensor '{unused[0]}' would not be used: no layer of the adapter borrows it"
            )

    def _check_weight(self) -> None:
        """Only an added Δ can be scaled."""
        for path in self.sites:
            if self.exclusive(path):
                what = "has moved weight into the base" if self.owns(path) else "is not an added Δ"
                raise MergeError(
                    f"'{self.directory}': method '{self.header.method.name}' {what}, and cannot be merged with weight "
                    f"{self.weight:g}; give it weight 1"
                )


def open_adapters(adapters: Adapters) -> list[AdapterFiles]:
    """The adapters of a path, several paths, or a map from path to weight; their headers are checked.

    Raises:
        MergeError: see `weights_of`. CheckpointError, PluginError: see `AdapterFiles`.
    """
    return [AdapterFiles(directory, weight) for directory, weight in weights_of(adapters).items()]
