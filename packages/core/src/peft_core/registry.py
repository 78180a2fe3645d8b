"""The adapters of one model: their banks, which are active, what is merged."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .bank import Bank
from .gradients import SharedGradient
from .method import Forward
from .originals import Kept

_REGISTRY = "_peft_adapters"


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
