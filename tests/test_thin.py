"""Thin products are computed in the dtype that the processor is fast in, whichever this one is: nothing else may change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import peft_core as pc
from peft_core import thin
from peft_core.testing.checks import assert_near, gradients, randomise, weighted
from peft_core.testing.families import FAMILIES

METHODS = [(name, dict(info.trials[0])) for name, info in sorted(pc.methods().items()) if info.trials]
TOKENS = {"few": thin.FEW, "many": thin.FEW + 8}


@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("instructions", [True, False], ids=["16 bits", "float32 only"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("method", "options"), METHODS, ids=[name for name, _ in METHODS])
def test_on_every_processor(
    method: str, options: dict[str, object], dtype: torch.dtype, instructions: bool, tokens: int, monkeypatch
) -> None:
    monkeypatch.setattr(thin, "cpu_multiplies", lambda dtype: instructions)
    torch.manual_seed(0)
    model = FAMILIES["odd"].build().to(dtype)
    adapter = randomise(pc.attach(model, pc.AdapterSpec(method=method, options=options), seed=0))
    x = torch.randn(tokens, 63).to(dtype)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = model(x)
    assert y.dtype == dtype
    wide = [
        tensor.shape
        for tensor in kept
        if tensor.dtype == torch.float32 and tensor.shape in [(tokens, 63), (tokens, 60)]
    ]
    assert not wide, "an input is kept in float32 beside the one in 16 bits"
    found = gradients(adapter, weighted(y))
    with pc.kernels("naive"):
        expected = gradients(adapter, weighted(model(x)))
        assert_near(y, model(x), 3e-2, "output")
        with torch.no_grad():
            assert_near(model(x), y, 3e-2, "without gradients")
    with torch.no_grad():
        assert_near(model(x), y, 1e-2, "without gradients, fused")
    for key in expected:
        assert_near(found[key], expected[key], 4e-2, f"gradient of '{key}'")


@pytest.mark.parametrize(("method", "options"), METHODS, ids=[name for name, _ in METHODS])
def test_compiled(method: str, options: dict[str, object], monkeypatch) -> None:
    monkeypatch.setattr(thin, "cpu_multiplies", lambda dtype: False)
    torch.manual_seed(0)
    model = FAMILIES["odd"].build().bfloat16()
    randomise(pc.attach(model, pc.AdapterSpec(method=method, options=options), seed=0))
    compiled = torch.compile(model, backend="eager", dynamic=True)
    for tokens in TOKENS.values():
        x = torch.randn(tokens, 63).bfloat16()
        assert_near(compiled(x), model(x), 2e-2, f"{tokens} tokens")


def test_a_wider_product_is_rounded_once() -> None:
    torch.manual_seed(0)
    y, a, b = torch.randn(5, 9).bfloat16(), torch.randn(5, 3), torch.randn(3, 9)
    expected = (y.double() + 0.5 * (a.double() @ b.double())).bfloat16()
    thin.add_(y, a, b, 0.5)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)


def test_what_is_fast_as_it_is_stays_itself(monkeypatch) -> None:
    monkeypatch.setattr(thin, "cpu_multiplies", lambda dtype: True)
    for x in (torch.ones(99, 2, dtype=torch.bfloat16), torch.ones(2, 2), torch.ones(2, 2, dtype=torch.float64)):
        assert thin.widened(x) is x
    assert thin.widened(torch.ones(2, 2, dtype=torch.float16)).dtype == torch.float32
