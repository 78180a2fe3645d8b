"""What an adapted module knows of its adapters: kept in its plain `__dict__`, so that a copy of the model has its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import _torch, plugins
from .fused import Use
from .gradients import SharedGradient
from .method import Capabilities, Forward
from .sites import Site

SLOT = "_peft_site"


def swapped(root: nn.Module) -> bool:
    """Whether this root's tensors are replaced for a while, so that compiled code must look them up by name: FSDP2 does so at
    every step, `functional_call` for one call.
    """
    return hasattr(root, "unshard") or _torch.compiles_functional_call()


def renew(root: nn.Module) -> None:
    """Tell every adapted module that this root holds other tensors from now on."""
    for module in root.modules():
        slot = module.__dict__.get(SLOT)
        if slot is not None and slot.root is root:
            slot.renew()


@dataclass(eq=False)
class Member:
    """One adapter at one site: which tensors it borrows there and the functions that use them.

    Attributes:
        functions: what the plugin gave for this site. can: the method's capabilities here.
        names: (tensor name, name on the root) of what is borrowed. fixed: likewise for the binding.
        shared: tensor name → where its gradient is summed, for tensors with more than one borrower.
    """

    adapter: str
    method: str
    site: Site
    functions: Forward
    can: Capabilities
    names: Sequence[tuple[str, str]]
    fixed: Sequence[tuple[str, str]]
    shared: Mapping[str, SharedGradient]
    dropout: float

    @property
    def where(self) -> str:
        """For messages."""
        return f"'{self.site.path}', method '{self.method}'"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "functions": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.functions = plugins.call(self.method, "peft_forward", site=self.site)


class Slot:
    """What an adapted layer knows of its adapters.

    Attributes:
        parameters, buffers: the root's own dictionaries, compared at every forward. members: by adapter.
        active: the active members with their run-time scale. dense: a weight that stands in for a quantized one.
        paired: whether all active methods have an accumulating pair. drops: whether one has dropout.
    """

    def __init__(self, root: nn.Module, transposed: bool, fused: bool) -> None:
        self.root = root
        self.parameters, self.buffers = root._parameters, root._buffers
        self.transposed, self.fused = transposed, fused
        self.members: dict[str, Member] = {}
        self.active: list[tuple[Member, float]] = []
        self.dense: Tensor | None = None
        self.paired = self.drops = False
        self._uses: list[Use] | None = None
        self._sources: list[tuple[dict[str, Any], str, Any]] = []

    def activate(self, scales: dict[str, float]) -> None:
        """Make these adapters the active ones, in their order."""
        self.active = [(self.members[name], scale) for name, scale in scales.items() if name in self.members]
        self.renew()

    def uses(self) -> list[Use]:
        """The active adapters with their tensors as they are now.

        Compiled code reads the tensors from this object: names would be guarded, and every other adapter of the same layout
        would compile anew. So what the root holds only for a while (`functional_call`, torch.export) is not kept here.
        """
        if self._uses is None:
            self.renew()
        if torch.compiler.is_dynamo_compiling():
            return self._look_up() if swapped(self.root) else self._uses  # type: ignore[return-value]
        for held, name, tensor in self._sources:
            if held.get(name) is not tensor:
                if not hasattr(self.root, "unshard"):
                    return self._look_up()
                self.renew()  # FSDP2's tensors are the same ones at every step
                break
        return self._uses  # type: ignore[return-value]

    def renew(self) -> None:
        """Look everything up anew: something was activated, or the root holds other tensors from now on."""
        self._uses = self._look_up()
        self._sources = [
            (held, there, held[there])
            for member, _ in self.active
            for held, names in ((self.parameters, member.names), (self.buffers, member.fixed))
            for _, there in names
        ]
        self.paired = all(use.functions.add_ is not None and use.additive for use in self._uses)
        self.drops = any(use.dropout for use in self._uses)

    def _look_up(self) -> list[Use]:
        return [
            Use(
                member.functions,
                {name: self.parameters[there] for name, there in member.names},  # type: ignore[misc]
                {name: self.buffers[there] for name, there in member.fixed},  # type: ignore[misc]
                member.shared,
                scale,
                member.dropout,
                member.can.additive,
                member.where,
            )
            for member, scale in self.active
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_uses": None, "_sources": []}


class TrainedSlot:
    """What a module whose own parameters are trained in full knows of its adapters.

    Attributes:
        parameters: the root's own dictionary. members: adapter → parameter name → name on the root of what stands in for it.
        active: of the adapter that counts. tensors: parameter name → what stands in for it.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root, self.parameters = root, root._parameters
        self.members: dict[str, Mapping[str, str]] = {}
        self.active: Mapping[str, str] = {}
        self.tensors: dict[str, Any] = {}

    def activate(self, scales: dict[str, float]) -> None:
        """The last active adapter that brings this module counts."""
        self.active = next((self.members[name] for name in reversed(scales) if name in self.members), {})
        self.renew()

    def stand_in(self, name: str) -> Tensor:
        """The bank's tensor for an active parameter. Compiled code reads it from this object, see `Slot.uses`."""
        if name not in self.tensors:
            self.renew()
        if not torch.compiler.is_dynamo_compiling() or swapped(self.root):
            return self.parameters[self.active[name]]  # type: ignore[return-value]
        return self.tensors[name]  # type: ignore[no-any-return]

    def renew(self) -> None:
        """Look the active tensors up anew, see `Slot.renew`."""
        self.tensors = {name: self.parameters[there] for name, there in self.active.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "tensors": {}}
