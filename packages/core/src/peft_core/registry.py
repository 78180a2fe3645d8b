"""The adapters of one model: their banks, which are active, what is merged."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .bank import Bank
from .method import Forward
from .originals import Kept
from .sites import Site

_REGISTRY = "_peft_adapters"


@dataclass
class Merged:
    """What merging changed at one parameter.

    Attributes:
        site: path of the site whose weight it is; nothing for a parameter of a module trained in full.
        original: what stood there before; None: it was not kept, or there is none to keep.
        packed: it is a quantized weight, which merging leaves alone: a dense one stands in for it.
        adapters: merged on top of the original, in order. beneath: merged into what `original` holds: their own original was
            not kept.
    """

    site: str = ""
    original: Kept = None
    packed: bool = False
    adapters: list[str] = field(default_factory=list)
    beneath: list[str] = field(default_factory=list)

    @property
    def restorable(self) -> bool:
        """Whether what stood there can be brought back."""
        return self.packed or self.original is not None


class Registry:
    """The adapters of one model.

    Attributes:
        banks: by name, in the order of attaching. active: name → run-time scale, in the order of application.
        requires_grad: the base's flags before the first adapter came. save_pretrained: the instance's own, if it had one.
        packing: see `quantized.make_trainable`.
        merged: name of a parameter → what merging changed there.
        left_out: merged adapters that are disabled for the moment.
        forwards: what plugins gave, by method, site and its options.
        watches: adapter → what notices its gradients, see `optim`.
    """

    def __init__(self) -> None:
        self.banks: dict[str, Bank] = {}
        self.active: dict[str, float] = {}
        self.requires_grad: dict[str, bool] = {}
        self.save_pretrained: Any = None
        self.packing: list[str] = []
        self.merged: dict[str, Merged] = {}
        self.left_out: set[str] = set()
        self.forwards: dict[tuple[str, Site, str], Forward] = {}
        self.watches: dict[str, Any] = {}

    def is_merged(self, name: str) -> bool:
        """Whether an adapter is merged into the base's weights."""
        return any(name in merged.adapters or name in merged.beneath for merged in self.merged.values())

    def __getstate__(self) -> dict[str, Any]:
        # Functions of plugins do not pickle; layers ask for them again.
        return {**self.__dict__, "forwards": {}}


def find_registry(model: nn.Module) -> Registry | None:
    """The model's registry, if it has adapters."""
    return model.__dict__.get(_REGISTRY)


def registry_of(model: nn.Module) -> Registry:
    """The registry of a model that has adapters."""
    return model.__dict__[_REGISTRY]


def create_registry(model: nn.Module) -> Registry:
    """A registry for a model that is to have its first adapter."""
    created = model.__dict__[_REGISTRY] = Registry()
    return created


def remove_registry(model: nn.Module) -> None:
    """Remove the registry of a model that has no adapter left."""
    del model.__dict__[_REGISTRY]
