"""Sharing groups: which tensors an adapter has, and which sites borrow them.

Groups are data. They hold no weights, so a layout can be made on the meta device, printed, saved and compared;
`draw` turns a tensor's initialiser into values, keyed so that every process draws the same.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

import torch
from torch import Tensor

from .errors import PlanError, PluginError
from .sites import Site, options_key


class Initializer(ABC):
    """How a tensor gets its first values: a frozen dataclass, so that it can be printed and compared.

    A plugin may define its own. `draw` must depend on nothing but the dataclass's fields and the generator (not on torch's
    default dtype); what depends on the base's weight is computed by `FromWeight`.
    """

    @abstractmethod
    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Values of this shape, on the CPU, in float32 or an integer type."""


@dataclass(frozen=True)
class Zeros(Initializer):
    """All zeros."""

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.zeros(shape, dtype=torch.float32)


@dataclass(frozen=True)
class Constant(Initializer):
    """One value everywhere."""

    value: float

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.full(shape, self.value, dtype=torch.float32)


@dataclass(frozen=True)
class Uniform(Initializer):
    """Uniform in [-bound, bound]."""

    bound: float

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.empty(shape, dtype=torch.float32).uniform_(-self.bound, self.bound, generator=generator)


@dataclass(frozen=True)
class Normal(Initializer):
    """Normal with the given mean and standard deviation."""

    std: float
    mean: float = 0.0

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.empty(shape, dtype=torch.float32).normal_(self.mean, self.std, generator=generator)


@dataclass(frozen=True)
class FromBase(Initializer):
    """A copy of the base model's tensor at `path`: what a module trained in full starts from."""

    path: str

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        raise TypeError(f"'{self.path}' is copied from the base model, not drawn")


@dataclass(frozen=True)
class FromWeight(Initializer):
    """Computed from the base weight (out × in, float32 or float64) of the site at `path`: its norms, its singular vectors.

    `compute` is a function of a module, no closure, so that plans can be compared.
    """

    path: str
    compute: Callable[[Tensor], Tensor]

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        raise TypeError(f"computed from the weight of '{self.path}', not drawn")


def kaiming_uniform(fan_in: int) -> Uniform:
    """Uniform in ±1/√fan_in: what `torch.nn.init.kaiming_uniform_(a=√5)` gives on an r × fan_in matrix."""
    return Uniform(1 / math.sqrt(fan_in))


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be: its shape, how it starts, and its dtype (None: the dtype that the adapter spec asks for)."""

    shape: tuple[int, ...]
    init: Initializer = Zeros()
    dtype: torch.dtype | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def nbytes(self, default: torch.dtype) -> int:
        """Size in bytes, with `default` where the tensor names no dtype of its own."""
        return self.numel * (self.dtype or default).itemsize


@dataclass(frozen=True)
class SharingGroup:
    """Named tensors and the sites that borrow them, in order. A private tensor is in a group of one member (`private`).

    Attributes:
        name: stable and unique in its plan; a tensor's key in the checkpoint is `{name}.{tensor}`.
        members: module paths of the borrowers.
        tensors: the trainable tensors. A site may borrow from several groups, whose tensor names then differ.
        fixed: tensors that are never trained (a random projection), drawn and stored once for all members. Each finds them
            in its `binding`, beside those of its own (`Layout.bindings`).
        state: tensors that only training needs (candidates, counters). They are not parameters, stay on the CPU, and
            are saved to `state.safetensors`.
    """

    name: str
    members: tuple[str, ...]
    tensors: Mapping[str, TensorSpec]
    state: Mapping[str, TensorSpec] = field(default_factory=dict)
    fixed: Mapping[str, TensorSpec] = field(default_factory=dict)

    @classmethod
    def private(
        cls, site: Site, tensors: Mapping[str, TensorSpec], state: Mapping[str, TensorSpec] | None = None
    ) -> SharingGroup:
        """The tensors that one site has to itself: a group of its own, named by its path."""
        return cls(site.path, (site.path,), tensors, state or {})

    @property
    def num_trainable(self) -> int:
        """Trainable parameters, counted once however many sites borrow them."""
        return sum(tensor.numel for tensor in self.tensors.values())


@dataclass(frozen=True)
class Layout:
    """What `peft_init` returns.

    Attributes:
        groups: together they must cover every site.
        bindings: for a site, fixed tensors of its own: how it uses what it borrows (index matrices), or numbers in the
            spec's dtype where a tensor names none. They are drawn once, stored in the checkpoint and never drawn again.
        notes: remarks that the plan prints.
    """

    groups: tuple[SharingGroup, ...]
    bindings: Mapping[str, Mapping[str, TensorSpec]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


BINDING = "binding/"


class Lender(Protocol):
    """A sharing group, or what a file says of one: whose tensors, under which names."""

    @property
    def name(self) -> str: ...
    @property
    def members(self) -> Sequence[str]: ...
    @property
    def tensors(self) -> Mapping[str, object]: ...
    @property
    def fixed(self) -> Mapping[str, object]: ...


def borrowed(groups: Iterable[Lender], paths: Iterable[str], where: str) -> dict[str, dict[str, str]]:
    """Site path → tensor name → key of the trainable tensor that the site borrows under that name: `{group}.{tensor}`.

    Raises:
        PlanError: `where` gives a site two of one name.
    """
    lent: dict[str, dict[str, str]] = {path: {} for path in paths}
    for group in groups:
        _lend(group, group.tensors, lent, where, "borrows two tensors")
    return lent


def bound(
    groups: Iterable[Lender], paths: Iterable[str], own: Mapping[str, Iterable[str]], where: str
) -> dict[str, dict[str, str]]:
    """Site path → name in its binding → key of that fixed tensor: a group's, or, by the names in `own`, one of the site's own.

    Raises:
        PlanError: `where` gives a site two of one name.
    """
    lent = {path: {name: binding_key(path, name) for name in own.get(path, ())} for path in paths}
    for group in groups:
        _lend(group, group.fixed, lent, where, "has two fixed tensors")
    return lent


def binding_key(path: str, name: str) -> str:
    """Key of a fixed tensor that a single site has for itself."""
    return f"{BINDING}{path}.{name}"


def stand_ins(trained: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Name of a base parameter that is trained in full → key of the tensor that stands in for it."""
    return {f"{path}.{local}": key for path, named in trained.items() for local, key in named.items()}


def _lend(group: Lender, names: Iterable[str], lent: dict[str, dict[str, str]], where: str, twice: str) -> None:
    """Enter the keys of a group's tensors at its members; modules trained in full are not sites, and are passed over."""
    for member in [member for member in group.members if member in lent]:
        for name in names:
            if name in lent[member]:
                sources = f"'{lent[member][name]}' and '{group.name}'"
                raise PlanError(f"{where}: '{member}' {twice} named '{name}', from {sources}")
            lent[member][name] = f"{group.name}.{name}"


def draw(spec: TensorSpec, dtype: torch.dtype, *key: object) -> Tensor:
    """The first values of a tensor, the same on every machine and process for the same key (seed, group, tensor)."""
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    # Whatever the default device is; entering a device slows down every call in it.
    with nullcontext() if torch.empty(0).device.type == "cpu" else torch.device("cpu"):
        return as_declared(spec.init.draw(spec.shape, generator), spec, dtype)


def as_declared(value: Tensor, spec: TensorSpec, dtype: torch.dtype) -> Tensor:
    """A tensor's first values in its dtype, contiguous as they will be when they are loaded.

    Raises:
        PluginError: the initialiser made another shape than the tensor is declared with.
    """
    if not isinstance(value, Tensor) or tuple(value.shape) != tuple(spec.shape):
        made = list(value.shape) if isinstance(value, Tensor) else repr(value)
        raise PluginError(f"{spec.init} made {made} for a tensor that is declared as {list(spec.shape)}")
    return value.to(spec.dtype or dtype).contiguous()


def alike(
    sites: Sequence[Site], key: Callable[[Site], Hashable] = lambda site: None
) -> list[tuple[str, tuple[Site, ...]]]:
    """Sites that can share tensors: one module type, one shape, the same options, and equal `key(site)`.

    Returns:
        (name, sites) in order of first appearance. The name is the module type where that is unambiguous, otherwise
        it carries the shape (`dense.3072x768`) and, if that is not enough, a running number.
    """
    classes: dict[tuple[str, str, str, Hashable], list[Site]] = {}
    for site in sites:
        shaped = f"{site.type}.{site.out_features}x{site.in_features}"
        classes.setdefault((site.type, shaped, options_key(site.options), key(site)), []).append(site)
    types = Counter(kind for kind, *_ in classes)
    shapes = Counter(shaped for _, shaped, *_ in classes)
    numbers = {shaped: count() for shaped in shapes}
    named: list[tuple[str, tuple[Site, ...]]] = []
    for (kind, shaped, *_), members in classes.items():
        name = kind if types[kind] == 1 else shaped if shapes[shaped] == 1 else f"{shaped}.{next(numbers[shaped])}"
        named.append((name, tuple(members)))
    return named
