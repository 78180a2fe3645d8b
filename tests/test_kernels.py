"""Which kernels run, and what the kernels of all methods share."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import peft_core as pc
from peft_core import launching
from peft_core.kernels import _Choice, _obstacle, obstacle, use_triton
from peft_core.launching import launch, operator, recorded

ROOT = Path(__file__).resolve().parent.parent
X = torch.zeros(2, 3)


def python(program: str, **environment: str) -> str:
    """What a program prints in a process of its own, without Triton's interpreter."""
    own = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PEFT_CORE_KERNELS")}
    done = subprocess.run([sys.executable, "-c", program], env=own | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def forgotten():
    """What is known of devices is looked up anew, here and afterwards."""
    _obstacle.cache_clear()
    yield
    _obstacle.cache_clear()


def test_auto_takes_torch_on_a_cpu_and_triton_where_it_is_asked_for() -> None:
    assert not use_triton(X)
    for name, expected in [("triton", True), ("torch", False), ("naive", False), ("auto", False)]:
        with pc.kernels(name):
            assert use_triton(X) is expected


@pytest.mark.parametrize("name", ["tritn", "", None, ["auto"]], ids=str)
def test_an_unknown_choice_is_named(name, refused) -> None:
    with refused(pc.PeftCoreError, f"'{name}'", "auto, triton, torch, naive"), pc.kernels(name):
        pass


def test_the_environment_chooses_when_an_adapter_is_attached_and_a_context_overrules_it(monkeypatch) -> None:
    monkeypatch.setattr(_Choice, "environment", "")
    monkeypatch.setenv("PEFT_CORE_KERNELS", "triton")
    assert use_triton(X)
    with pc.kernels("torch"):
        assert not use_triton(X)
    monkeypatch.setenv("PEFT_CORE_KERNELS", "torch")
    pc.attach(nn.Sequential(nn.Linear(3, 3)), pc.AdapterSpec(method="miss", options={"r": 1}))
    assert not use_triton(X)


def test_unknown_kernels_in_the_environment_are_refused_before_anything_is_attached(monkeypatch, refused) -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    monkeypatch.setattr(_Choice, "environment", "")
    monkeypatch.setenv("PEFT_CORE_KERNELS", "trition")
    with refused(pc.PeftCoreError, "PEFT_CORE_KERNELS", "'triton'"):
        pc.attach(model, pc.AdapterSpec(method="miss", options={"r": 1}))
    assert not pc.adapters(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_other_dtypes_are_refused(dtype, refused) -> None:
    with pc.kernels("triton"), refused(pc.PeftCoreError, "triton", str(dtype)[6:], "float32"):
        use_triton(X.to(dtype))


def test_triton_that_is_not_installed_says_so(monkeypatch, refused, forgotten) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pc.kernels("triton"), refused(pc.PeftCoreError, "pip install triton"):
        use_triton(X)


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch, refused, forgotten) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pc.kernels("triton"), refused(pc.PeftCoreError, "CUDA", "cpu", "TRITON_INTERPRET=1"):
        use_triton(X)


def test_an_interpreter_that_is_asked_for_too_late_is_refused() -> None:
    program = (
        "import os, triton.language, torch; os.environ['TRITON_INTERPRET'] = '1'; from peft_core.kernels import obstacle; "
        "print(obstacle('cpu', torch.float32))"
    )
    assert "before" in python(program)


def test_a_gpu_must_be_one_of_cuda_s_and_not_too_old(monkeypatch, forgotten) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "CUDA" in obstacle("cuda:0", torch.float32)
    _obstacle.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "7.5" in obstacle("cuda:0", torch.float32)
    _obstacle.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert obstacle("cuda:0", torch.float32) == ""


class OnGPU:
    """What is asked of a tensor on a GPU."""

    is_cuda, device, dtype = True, torch.device("cuda:0"), torch.bfloat16


def test_auto_takes_triton_on_a_gpu_that_it_knows(monkeypatch, forgotten, refused) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert use_triton(OnGPU())
    with pc.kernels("torch"):
        assert not use_triton(OnGPU())
    _obstacle.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert not use_triton(OnGPU())
    with pc.kernels("triton"), refused(pc.PeftCoreError, "cuda:0", "8.0", "7.0"):
        use_triton(OnGPU())


def test_no_kernel_is_imported_unless_it_is_chosen() -> None:
    program = """
import sys, peft_core as pc
from peft_core.testing.families import FAMILIES
for method, info in pc.methods().items():
    model = FAMILIES["odd"].build()
    pc.attach(model, pc.AdapterSpec(method=method, options=dict(info.trials[0])))
    FAMILIES["odd"].forward(model, FAMILIES["odd"].inputs()).sum().backward()
print([name for name in sys.modules if name.endswith("triton_kernels")])
"""
    assert python(program) == "[]"


@triton.jit
def _add_one(x, count, BLOCK: tl.constexpr):
    where = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + where, tl.load(x + where, mask=where < count) + 1, mask=where < count)


@operator("peft_core_tests::add_one_", mutates=("x",))
def add_one_(x: Tensor) -> None:
    launch(_add_one, (launching.blocks(x.numel(), 16),), x, x.numel(), BLOCK=16)


@operator("peft_core_tests::plus_one", lambda x: torch.empty_like(x))
def plus_one(x: Tensor) -> Tensor:
    y = x.clone()
    add_one_(y)
    return y


def test_an_operator_is_traced_and_a_plain_call_goes_straight_through() -> None:
    seen = []
    compiled = torch.compile(
        lambda x: plus_one(x) * 2,
        fullgraph=True,
        backend=lambda graph, inputs: seen.extend(str(node.target) for node in graph.graph.nodes) or graph,
    )
    torch.testing.assert_close(compiled(X), 2 * (X + 1))
    assert "peft_core_tests.plus_one.default" in seen
    for gradients, dispatched in ((torch.no_grad(), False), (torch.enable_grad(), True)):
        with gradients, _Dispatched() as calls:
            assert torch.equal(plus_one(X), X + 1)
        assert ("peft_core_tests.plus_one.default" in calls.names) == dispatched


class _Dispatched(TorchDispatchMode):
    """Notes the operators that torch dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_change_in_place_is_seen_by_autograd() -> None:
    for gradients in (torch.enable_grad(), torch.no_grad()):
        x = X.clone()
        with gradients:
            before = x._version
            add_one_(x)
        assert x._version > before and torch.equal(x, X + 1)


def test_inference_mode_is_no_obstacle() -> None:
    with torch.inference_mode():
        x = torch.zeros(2, 3)
        add_one_(x)
        assert torch.equal(x, X + 1)


def test_fake_tensors_are_not_launched_on() -> None:
    with torch._subclasses.FakeTensorMode(), torch.no_grad():
        assert plus_one(torch.empty(5, 4)).shape == (5, 4)


def test_launches_can_be_recorded_instead_of_made() -> None:
    with recorded() as launches:
        add_one_(torch.empty(100, device="meta"))
        add_one_(torch.empty(0, device="meta"))
    assert [(one.grid, one.constants) for one in launches] == [((7,), {"BLOCK": 16}), ((0,), {"BLOCK": 16})]
    x = torch.empty(0)
    add_one_(x)  # an empty grid, which a GPU would refuse


class _Kernel:
    """In the place of a `triton.jit` function, or of what Triton compiles it to, which is launched with the constants, too."""

    def __init__(self, said: list[Any], code: _Kernel | None, *names: str) -> None:
        self.said, self.code, self.arg_names = said, code, names

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def run(*arguments: Any, **constants: Any) -> Any:
            self.said.append((grid, *arguments, constants) if self.code else (grid, *arguments))
            return self.code

        return run


def test_what_was_compiled_is_launched_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_compiled", {})
    monkeypatch.setattr(launching, "_takes_constants", lambda: True)
    said: list[Any] = []
    kernel = _Kernel(said, _Kernel(said, None), "x", "count", "FIRST", "SECOND")
    x, y = torch.zeros(64), torch.zeros(64)
    launch(kernel, (3,), x, 5, SECOND=2, FIRST=7, num_warps=4)
    launch(kernel, (9, 2), y, 7, SECOND=2, FIRST=7, num_warps=4)
    assert said == [((3,), x, 5, dict(SECOND=2, FIRST=7, num_warps=4)), ((9, 2, 1), y, 7, 7, 2)]
    for anew in [
        dict(SECOND=2, FIRST=8, num_warps=4),
        dict(SECOND=7, FIRST=2, num_warps=4),
        dict(SECOND=2, FIRST=7, num_warps=8),
    ]:
        said.clear()
        launch(kernel, (3,), x, 5, **anew)
        assert said == [((3,), x, 5, anew)]
    said.clear()
    for argument, count in ((x[1:], 5), (x.double(), 5), (x, 16), (x, 1), (x, 2**40), (x, 2**63)):
        launch(kernel, (3,), argument, count, SECOND=2, FIRST=7, num_warps=4)
    assert all(isinstance(one[-1], dict) for one in said) and len(said) == 6
    launch(
        _Kernel(said, _Kernel(said, None), "x", "count", "FIRST", "SECOND"), (3,), x, 5, SECOND=2, FIRST=7, num_warps=4
    )
    assert isinstance(said[-1][-1], dict)


KINDS = """
import itertools, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from peft_core.launching import _kind

@triton.jit
def kernel(argument):
    pass

bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
memory = torch.zeros(256)
tensors = [memory[start:].to(dtype) if start == 0 else memory.to(dtype)[start:] for start in (0, 1, 4, 8) for dtype in (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int64, torch.uint8, torch.bool)]
numbers = [0, 1, 2, 15, 16, 17, -1, -16, 2**31 - 1, 2**31, 2**31 + 1, -(2**31), -(2**31) - 1, 2**40, 2**40 + 1, 2**63 - 1, 2**63]
values = [*tensors, *numbers, None, True, False, 0.0, 1.0, 0.5]
pairs = list(itertools.combinations(values, 2))
told = [bind(one)[1] != bind(other)[1] for one, other in pairs]
lost = [pair for pair, apart in zip(pairs, told) if apart and _kind(pair[0]) == _kind(pair[1])]
print(sum(told) > 1000, lost)
"""


def test_launches_are_told_apart_as_triton_tells_them_apart(tmp_path: Path) -> None:
    """Else what was compiled for one would be run on another."""
    path = tmp_path / "program.py"
    path.write_text(KINDS)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(path)], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "True []", done.stderr


@pytest.mark.parametrize(("least", "expected"), [(0, 1), (1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_power_of_two(least, expected) -> None:
    assert launching.power_of_two(least) == expected


PROGRAM = """
import runpy, sys, torch, triton, triton.language as tl
from peft_core.launching import launch

@triton.jit
def sound(x, i, j, scale, nothing, N: tl.constexpr):
    tl.store(x + tl.arange(0, N) + i + j, scale)

@triton.jit
def broken(x, N: tl.constexpr):
    tl.store(x + tl.arange(0, N), nowhere)

def examples():
    x = torch.empty(64, device="meta")
    for _ in range(2):
        launch(sound, (1,), x, 3, 2**40, 1.5, None, N=64)
    launch(broken, (1,), x, N=64)

tool = runpy.run_path("tools/compile_kernels.py")
tool["main"].__globals__["modules"] = lambda: ["kernels_of_a_test"]
sys.modules["kernels_of_a_test"] = sys.modules["__main__"]
sys.argv[1:] = ["--target", "sm_90"]
try:
    tool["main"]()
except SystemExit as stop:
    print("exit", stop.code)
"""


def test_compiling_ahead_of_time_reports_registers_and_fails_where_a_kernel_does(tmp_path) -> None:
    path = tmp_path / "program.py"  # Triton reads a kernel's source from its file
    path.write_text(PROGRAM)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    done = subprocess.run([sys.executable, str(path)], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    of_sound, of_broken, stop = done.stdout.splitlines()[-3:]
    assert re.search(r"sm_90 +\d+ / 0 +sound \(float32, n 64\)", of_sound)
    assert "fails" in of_broken and "broken" in of_broken
    assert stop == "exit 1" and "1 kernels do not compile" in done.stderr


def test_compiling_ahead_of_time_refuses_the_interpreter(monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(sys, "argv", ["compile_kernels.py"])
    with pytest.raises(SystemExit, match="TRITON_INTERPRET"):
        runpy.run_path(str(ROOT / "tools" / "compile_kernels.py"), run_name="__main__")
