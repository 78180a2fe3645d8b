"""The model that carries adapters, and the modules in it that are trained in full, as subclasses of their own classes.

The model lists its own parameters first and explains what is not supported. A module trained in full gives the bank's copies of
its parameters to whoever reads them while a forward of the model, or its own, runs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from . import _torch, bases
from .errors import AdapterError
from .slots import SLOT, TrainedSlot, renew
from .subclassing import Mixin, specialize


class _Running(threading.local):
    """Whether this thread is within the forward of a model that carries adapters, or of a module in it trained in full."""

    def __init__(self) -> None:
        self.forward = False  # of every thread from the start: compiled code notices when it appears


_running = _Running()


def _noting(name: str) -> Callable[..., Any]:
    """A method that calls the module's own of this name, and notes that a forward runs. See `_NotesForward`."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, _NotesForward):  # a plain module, whose adapters have gone
            return getattr(self, name)(*args, **kwargs)
        outer, _running.forward = _running.forward, True
        try:
            return getattr(super(_NotesForward, self), name)(*args, **kwargs)
        finally:
            _running.forward = outer

    return call


class _NotesForward(Mixin):
    """Notes that its forward runs.

    Compiled code keeps for good the `__call__` (torch.compile) or the `_call_impl` (nn.Module.compile) that the module had when
    it was compiled. A plain module's calls the other one, which is ours once the module is adapted. Ours is called with a plain
    module once the adapters have gone.
    """

    __call__ = _noting("__call__")
    _call_impl = _noting("_call_impl")


class TrainedModule(_NotesForward):
    """In front of the class of a module trained in full, and of every module in it that owns parameters: whoever reads one in a
    forward, or in a backward that computes a forward again, gets the bank's copy, in the base's dtype.

    Nothing is put in the parameters' place: other threads, FSDP2 and Accelerate read and write there, and everything else sees
    the base's: `state_dict`, optimizers, `tie_weights`. `__dict__[SLOT]` is a `TrainedSlot`.
    """

    def __getattr__(self, name: str) -> Any:
        slot: TrainedSlot | None = self.__dict__.get(SLOT)
        if slot is None or name not in slot.active or not (_running.forward or _in_backward()):
            return super().__getattr__(name)  # type: ignore[misc]
        own = self.__dict__["_parameters"][name]
        if hasattr(own, "device_mesh") and _torch.fsdp_looks():
            return own
        return slot.stand_in(name).to(own.dtype)


def _in_backward() -> bool:
    """Whether a backward pass runs in this thread: one that checkpoints activations computes forwards again."""
    return not torch.compiler.is_compiling() and _torch.backward_number() >= 0


class AdaptedRoot(_NotesForward):
    """In front of the root model's class: its own parameters come before those of its adapters, since the first parameter is
    what `model.dtype` and much user code take for the model's.
    """

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Behind `to`, `to_empty` and the like, which give the root other buffers, sometimes other parameters."""
        applied = super()._apply(*args, **kwargs)  # type: ignore[misc]
        renew(self)  # type: ignore[arg-type]
        return applied

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Behind `load_state_dict`, which gives the root other parameters with `assign`."""
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[misc]
        renew(self)  # type: ignore[arg-type]

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """See `nn.Module.named_parameters`."""
        ours = []
        for name, parameter in super().named_parameters(*args, **kwargs):  # type: ignore[misc]
            if bases.ROOT_PREFIX in name:
                ours.append((name, parameter))
            else:
                yield name, parameter
        yield from ours


class AdaptedGenerator(AdaptedRoot):
    """For a root that generates: explains what is not supported, where transformers would only report an unexpected keyword."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """See the model's own `generate`.

        Raises:
            AdapterError: `adapter_names`, an adapter for each row of the batch, is asked for.
        """
        if kwargs.get("adapter_names") is not None:
            raise AdapterError(
                "generate(adapter_names=...): all rows of a batch go through the same adapters; activate one with "
                "pc.activate(model, name) and generate for its rows, or serve them with a runtime that batches LoRA"
            )
        return super().generate(*args, **kwargs)  # type: ignore[misc]


def train_in_full(module: nn.Module, root: nn.Module) -> TrainedSlot:
    """Make this module of a model one for whose parameters copies can stand in. Returns its slot, which has no adapters yet."""
    specialize(module, TrainedModule)
    slot = module.__dict__[SLOT] = TrainedSlot(root)
    return slot


def adapt_root(model: nn.Module) -> None:
    """Make this model one that carries adapters."""
    if not isinstance(model, AdaptedRoot):
        specialize(model, AdaptedGenerator if hasattr(model, "generate") else AdaptedRoot)
