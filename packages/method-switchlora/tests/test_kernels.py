"""SwitchLoRA's Triton kernel against the readable reference: interpreted, or on a GPU with TRITON_INTERPRET=0."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from torch import Tensor, nn

import peft_core as pc
from peft_core.testing.checks import TOLERANCE, assert_near, far_apart, poisoned_memory, same_bits
from peft_method_switchlora import kernels, naive, triton_kernels

pytestmark = pytest.mark.usefixtures("in_triton")
DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"


def exchange(outs: int, ins: int, count: int) -> tuple[Tensor, Tensor]:
    return torch.randn(outs, count, device=DEVICE), torch.randn(count, ins, device=DEVICE)


def updated(weight: Tensor, columns: Tensor, rows: Tensor, scale: float) -> Tensor:
    expected = weight.double()
    naive.switch_update_(expected, columns.double(), rows.double(), scale)
    return expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("outs", "ins", "count"), [(63, 60, 6), (60, 300, 1), (17, 257, 3), (1, 1, 2)])
def test_update_is_the_reference(outs: int, ins: int, count: int, dtype: torch.dtype) -> None:
    columns, rows = exchange(outs, ins, count)
    weight = torch.randn(outs, ins, device=DEVICE).to(dtype)
    wide = torch.zeros(outs + 2, 2 * ins + 1, dtype=dtype, device=DEVICE)
    for what, given in {
        "contiguous": weight.clone(),
        "transposed": weight.T.contiguous().T,
        "part of a larger one": wide[1:-1, 1::2].copy_(weight),
    }.items():
        expected = updated(given, columns, rows, 0.3)
        version = given._version
        kernels.switch_update_(given, columns, rows, 0.3)
        assert given._version > version
        # One rounding: what float64 rounds to, but for ties that float32 sees differently.
        assert_near(given, expected, TOLERANCE[dtype] / 5, what)
    assert not wide[0].any() and not wide[-1].any() and not wide[:, ::2].any()


def test_factors_may_have_any_strides() -> None:
    columns, rows = exchange(30, 40, 4)
    weight = torch.randn(30, 40, device=DEVICE)
    again = weight.clone()
    kernels.switch_update_(weight, columns, rows, 1.0)
    kernels.switch_update_(again, columns.T.contiguous().T, rows.repeat(1, 2)[:, :40], 1.0)
    assert same_bits(weight, again)


@pytest.mark.parametrize(("outs", "ins", "count"), [(4, 4, 0), (0, 4, 2), (4, 0, 2)])
def test_nothing_to_do(outs: int, ins: int, count: int) -> None:
    weight = torch.randn(outs, ins, device=DEVICE)
    before = weight.clone()
    with poisoned_memory():
        kernels.switch_update_(weight, *exchange(outs, ins, count), 1.0)
    assert same_bits(weight, before)


@pytest.mark.parametrize("transposed", [False, True])
def test_offsets_beyond_32_bits(transposed: bool) -> None:
    columns, rows = exchange(2, 32, 3)
    weight = torch.randn(2, 32, device=DEVICE).bfloat16()
    far = far_apart(weight)
    kernels.switch_update_(weight, columns, rows, 0.5)
    if transposed:
        kernels.switch_update_(far.T, rows.T, columns.T, 0.5)
    else:
        kernels.switch_update_(far, columns, rows, 0.5)
    assert same_bits(far.contiguous(), weight)


def test_training_steps_are_those_of_torch_s_kernels() -> None:
    """Switching in a bf16 model with a float32 master: the same weights and outputs after some steps."""
    base = nn.Sequential(nn.Linear(24, 20), nn.Linear(20, 24)).to(DEVICE, torch.bfloat16)
    options = {"r": 4, "interval": 2, "freeze_steps": 1, "total_steps": 50}
    x = torch.randn(8, 24, device=DEVICE, dtype=torch.bfloat16)
    after = {}
    for name in ("triton", "torch"):
        model = copy.deepcopy(base)
        with torch.enable_grad(), pc.kernels(name):
            adapter = pc.attach(model, pc.AdapterSpec(method="switchlora", options=options))
            before = model[0].weight.clone()
            optimizer = torch.optim.SGD(adapter.parameters(), lr=1e-3)
            for _ in range(4):
                model(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        after[name] = {**model.state_dict(), "output": model(x)}
        assert not same_bits(model[0].weight, before), "nothing was switched"
    for key, expected in after["torch"].items():
        assert_near(after["triton"][key], expected, TOLERANCE[expected.dtype], key)


def test_operator_keeps_torch_s_rules() -> None:
    columns, rows = exchange(5, 6, 2)
    weight = torch.randn(5, 6, device=DEVICE)
    torch.library.opcheck(triton_kernels.switch_update_.operator, (weight, columns, rows, 0.5))
