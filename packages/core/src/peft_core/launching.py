"""What the Triton kernels of all methods share: launching, operators that torch.compile sees through, recorded launches.

Imports no Triton. A package keeps its kernels in a module of their own, which is imported when they are chosen:

    @triton.jit
    def _twice(x, y, count, BLOCK: tl.constexpr): ...

    @operator("my_package::twice", fake=lambda x: torch.empty_like(x))
    def twice(x: Tensor) -> Tensor:
        y = torch.empty_like(x)
        launch(_twice, (blocks(x.numel(), 1024),), x, y, x.numel(), BLOCK=1024)
        return y

    def examples() -> None:  # what tools/compile_kernels.py compiles
        twice(torch.empty(4096, device="meta"))
"""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


class Launch(NamedTuple):
    """One launch: the kernel's positional arguments, and its constants by name (`num_warps` and the like included)."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


class _Recorder:
    launches: list[Launch] | None = None


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Record launches instead of making them; their tensors may be on the meta device."""
    launches: list[Launch] = []
    previous, _Recorder.launches = _Recorder.launches, launches
    try:
        yield launches
    finally:
        _Recorder.launches = previous


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launch on the device of the first tensor argument; nothing happens where the grid is empty."""
    if _Recorder.launches is not None:
        _Recorder.launches.append(Launch(kernel, grid, arguments, constants))
    elif 0 not in grid:
        device = next(a.device for a in arguments if isinstance(a, Tensor))
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):  # Triton launches on the current one
                _run(kernel, grid, arguments, constants, device.index)
        else:
            _run(kernel, grid, arguments, constants, device.index)


class _Compiled(NamedTuple):
    """A kernel that Triton has compiled, and the constants that follow a launch's arguments. `kernel`: keeps its id its own."""

    kernel: Any
    code: Any
    constants: tuple[Any, ...]


_compiled: dict[tuple[Any, ...], _Compiled] = {}


def _run(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any], device: int | None
) -> None:
    """`kernel[grid](*arguments, **constants)`, but that what was compiled before is found in half the time on the host."""
    key = (id(kernel), device, *constants.items(), *map(_kind, arguments))
    found = _compiled.get(key)
    if found is not None:
        found.code[(*grid, 1, 1)[:3]](*arguments, *found.constants)
        return
    code = kernel[grid](*arguments, **constants)
    if code is not None and _takes_constants():  # an interpreted kernel is not compiled
        names = kernel.arg_names[len(arguments) :]
        _compiled[key] = _Compiled(kernel, code, tuple(constants[name] for name in names))


def _kind(argument: Any) -> Any:
    """What Triton tells apart as it compiles: a number's size, whether it is 1 or divisible by 16; a tensor's dtype and place."""
    kind = type(argument)
    if kind is int:
        divisible = 1 if argument == 1 else 0 if argument % 16 else 16
        return divisible if -(2**31) <= argument < 2**31 else (divisible, argument < 2**63)
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    return kind


@functools.cache
def _takes_constants() -> bool:
    """Whether this Triton's compiled kernels are launched with their constants, too."""
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 4)


def operator(
    name: str, fake: Callable[..., Any] | None = None, mutates: Sequence[str] = ()
) -> Callable[[Function], Function]:
    """Make a function that launches kernels a torch.library operator as well.

    Tracing and autograd are given the operator; a plain call, as from core's autograd.Function, goes straight to the
    function, since an operator written in Python costs more time on the host than the launch.

    Args:
        name: `package::function`. fake: empty outputs for the same arguments; None: there are no outputs.
        mutates: names of the arguments that are changed in place.

    Returns:
        The function. Its attribute `operator` is the operator, on which a gradient can be registered.
    """

    def decorate(function: Function) -> Function:
        hints = typing.get_type_hints(function)  # torch.library reads types, not their names
        function.__annotations__ = {name: None if hint is type(None) else hint for name, hint in hints.items()}
        made = torch.library.custom_op(name, function, mutates_args=tuple(mutates))
        made.register_fake(fake or _nothing)
        names = list(function.__annotations__)
        changed = [names.index(argument) for argument in mutates]

        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            if _Recorder.launches is None and _traced(arguments):
                return made(*arguments)
            result = function(*arguments)
            for index in changed:
                torch.autograd.graph.increment_version(arguments[index])
            return result

        call.operator = made  # type: ignore[attr-defined]
        return typing.cast(Function, call)

    return decorate


def _nothing(*arguments: Any) -> None:
    return None


def blocks(count: int, size: int) -> int:
    """How many blocks of this size hold `count` elements."""
    return -(-count // size)


def power_of_two(least: int) -> int:
    """The smallest power of two that is not below `least`."""
    return 1 << max(least - 1, 0).bit_length()


def _traced(arguments: Sequence[Any]) -> bool:
    """Whether somebody other than the device must see this call: a compiler, autograd, a subclass of Tensor."""
    return (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or any(isinstance(a, Tensor) and type(a) not in (Tensor, torch.nn.Parameter) for a in arguments)
    )
