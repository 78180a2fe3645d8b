"""What is particular to this method. Everything else is `pytest --pyargs peft_core.testing --method lora`."""

import pytest
import torch
from torch import nn

import peft_core as pc


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(63, 60), nn.Tanh(), nn.Linear(60, 63))


def test_starts_as_kaiming_and_zero() -> None:
    adapter = pc.attach(model(), pc.AdapterSpec(method="lora", options={"r": 8}), seed=0)
    A, B, *_ = adapter.parameters()
    assert A.shape == (8, 63) and B.shape == (60, 8)
    assert not B.any()
    assert 0.9 / 63**0.5 < A.abs().max() <= 1 / 63**0.5


def test_output_is_the_papers_formula() -> None:
    base, x = model(), torch.randn(5, 63)
    plain = base[0](x)
    adapter = pc.attach(base, pc.AdapterSpec(method="lora", targets=["0"], options={"r": 4, "alpha": 8}), seed=0)
    A, B = adapter.parameters()
    with torch.no_grad():
        B.normal_()
        torch.testing.assert_close(base[0](x), plain + (8 / 4) * x @ A.T @ B.T)


def test_rank_larger_than_the_layer_is_refused_by_name() -> None:
    with pytest.raises(pc.PlanError, match=r"r: 61 is larger than '0' \(60×63\)"):
        pc.plan(model(), pc.AdapterSpec(method="lora", options={"r": 61}))
