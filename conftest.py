"""For all tests: Triton's kernels interpreted, so that they run without a GPU; one thread; the program, run in this process.

Triton reads its setting once, when it is imported (bitsandbytes imports it, too), so it is made before anything else. It changes
nothing but what kernels of Triton do. `TRITON_INTERPRET=0` runs the tests of kernels on a GPU.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from peft_core.testing.conftest import one_thread  # noqa: F401 - for all tests, as in the conformance suite


class Ran(NamedTuple):
    """What a command ended with, and printed."""

    status: int
    out: str
    err: str


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """`program("plan", "--model", ...)` runs the command `peft-core` in this process."""
    from peft_core import cli

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["peft-core", *map(str, arguments)])
        capsys.readouterr()
        status = 0
        try:
            cli.main()
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        return Ran(status, *capsys.readouterr())

    return run


@pytest.fixture
def quiet() -> Iterator[None]:
    """Trainers set the level of transformers' log for the whole process; here it shows errors only."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


@pytest.fixture(autouse=True)
def new_accelerate() -> Iterator[None]:
    """Accelerate keeps the dtype and the data loaders of a process's first trainer for later ones; each test begins anew."""
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()
    yield


@pytest.fixture
def in_triton() -> Iterator[None]:
    """Every method's Triton kernels, the same random numbers in every test, no gradients."""
    import torch

    import peft_core as pc

    torch.manual_seed(0)
    with pc.kernels("triton"), torch.no_grad():
        yield


@pytest.fixture
def called_when_compiled(in_triton: None) -> Callable[..., list[str]]:
    """`called_when_compiled(model, adapter, x)` sees that the compiled model answers and learns as it does by itself, and
    returns the operators that its forward calls.
    """
    import torch
    from torch._dynamo.backends.debugging import aot_eager

    from peft_core.testing.checks import assert_near, gradients, weighted

    def check(model: torch.nn.Module, adapter: Any, x: torch.Tensor) -> list[str]:
        called: list[str] = []

        def backend(graph: Any, inputs: Any) -> Any:
            called.extend(str(node.target) for node in graph.graph.nodes)
            return aot_eager(graph, inputs)

        def learnt(run: Callable[..., torch.Tensor]) -> dict[str, Any]:
            x.grad = None
            y = run(x)
            return {**gradients(adapter, weighted(y)), "input": x.grad, "output": y}

        torch._dynamo.reset()
        with torch.enable_grad():
            expected, found = learnt(model), learnt(torch.compile(model, fullgraph=True, backend=backend))
        torch._dynamo.reset()
        for name in expected:
            assert_near(found[name], expected[name], 1e-5, name)
        return called

    return check
