"""Giving a module a subclass of its own class, and its own class back.

The module stays what it was: the same object in the same place, with its parameters, state-dict keys and `isinstance` answers.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn


class Mixin:
    """What we put in front of a module's own class: the base of all such classes."""

    _peft_mixin: type[Mixin]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As the module's own class says, `__getstate__` and all, with our class put in front again."""
        cls = type(self)
        reduced: Any = super().__reduce_ex__(protocol)
        make, args, *state = reduced
        make, *args = (plain_class(cls) if part is cls else part for part in (make, *args))
        return _rebuild, (self._peft_mixin, make, args), *state


def specialize(module: nn.Module, mixin: type[Mixin]) -> None:
    """Put a mixin in front of the module's class."""
    module.__class__ = specialized_class(type(module), mixin)  # type: ignore[arg-type]


def restore_class(module: nn.Module) -> None:
    """Take the mixin out again, whatever others have put in front of or behind it."""
    if not isinstance(module, Mixin):
        return
    ours = getattr(module._peft_mixin, "forward", None)
    plain = plain_class(type(module))
    module.__class__ = plain
    # A hook that came after us (Accelerate's) remembers our forward as the original, on the instance.
    held = module.__dict__
    if ours is not None and getattr(held.get("_old_forward"), "__func__", None) is ours:
        held["_old_forward"] = plain.forward.__get__(module)
    if ours is not None and getattr(held.get("forward"), "__func__", None) is ours:
        del held["forward"]


def class_names(module: nn.Module) -> list[str]:
    """Names of the module's class and of all that it derives from: to know classes by that are not imported."""
    return [cls.__name__ for cls in type(module).__mro__]


@functools.cache
def specialized_class(base: Any, mixin: Any) -> Any:
    """The subclass of `base` with this mixin: one per pair, so that models pickle, and with the base's name."""
    namespace = {
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        "__qualname__": base.__qualname__,
        "_peft_mixin": mixin,
    }
    return type(base.__name__, (mixin, base), namespace)


def plain_class(cls: type) -> Any:
    """The class without our mixin; a class that others derived from ours (FSDP2's) is derived anew from the base."""
    if "_peft_mixin" in cls.__dict__:
        return cls.__bases__[1]
    parents = tuple(plain_class(base) if issubclass(base, Mixin) else base for base in cls.__bases__)
    return cls if parents == cls.__bases__ else type(cls.__name__, parents, dict(cls.__dict__))


def _rebuild(mixin: Any, make: Any, args: Any) -> Any:
    module = make(*args)
    specialize(module, mixin)
    return module
