"""Inputs of any shape and layout, autocast, dropout."""

import pytest
import torch
from torch import nn

import peft_core as pc

from .checks import (
    KERNELS,
    TOLERANCE,
    Trial,
    adapted,
    assert_near,
    base_weight,
    borrowed,
    gradients,
    naive,
    randomise,
    relative,
    same_bits,
    weighted,
)
from .families import Family
from .reference import Reference


@KERNELS
@pytest.mark.parametrize("shape", [(63,), (5, 63), (2, 3, 63), (2, 1, 3, 63)], ids=["1-D", "2-D", "3-D", "4-D"])
@pytest.mark.families("odd")
def test_inputs_of_any_rank(trial: Trial, family: Family, shape: tuple[int, ...], kernels: str) -> None:
    model, adapter = adapted(family, trial)
    x = torch.randn(shape)
    with pc.kernels(kernels):
        y = model(x)
        assert y.shape == shape
        flat = model(x.reshape(-1, 63))
        assert_near(y.reshape(-1, 63), flat, 1e-6, "output")
        found = gradients(adapter, weighted(y.reshape(-1, 63)))
        expected = gradients(adapter, weighted(flat))
    for key in expected:
        assert_near(found[key], expected[key], 1e-6, f"gradient of '{key}'")


@KERNELS
@pytest.mark.parametrize("shape", [(0, 63), (2, 0, 63)], ids=["2-D", "3-D"])
@pytest.mark.families("odd")
def test_batch_without_tokens(trial: Trial, family: Family, shape: tuple[int, ...], kernels: str) -> None:
    model, adapter = adapted(family, trial)
    x = torch.randn(shape, requires_grad=True)
    with pc.kernels(kernels):
        y = model(x)
        assert y.shape == shape
        found = gradients(adapter, y.sum())
    assert x.grad is not None and x.grad.shape == shape
    assert not any(gradient.any() for gradient in found.values())


@KERNELS
@pytest.mark.families("odd")
def test_inputs_and_gradients_that_are_not_contiguous(trial: Trial, family: Family, kernels: str) -> None:
    model, adapter = adapted(family, trial)
    whole = torch.randn(63, 4, 6)
    views = {"transposed": whole.permute(2, 1, 0), "strided": torch.randn(6, 4, 126)[..., ::2]}
    views["expanded"] = torch.randn(1, 4, 63).expand(6, 4, 63)
    for what, x in views.items():
        assert not x.is_contiguous()
        with pc.kernels(kernels):
            y, expected_y = model(x), model(x.contiguous())
            # Reading the output transposed makes its gradient non-contiguous, too.
            found = gradients(adapter, weighted(y.transpose(0, 2)))
            expected = gradients(adapter, weighted(expected_y.transpose(0, 2).contiguous()))
        assert_near(y, expected_y, 1e-6, what)
        for key in expected:
            assert_near(found[key], expected[key], 1e-6, f"{what}: gradient of '{key}'")


@KERNELS
@pytest.mark.families("odd")
def test_input_is_left_alone(trial: Trial, family: Family, kernels: str) -> None:
    model, _ = adapted(family, trial)
    x = torch.randn(4, 63, requires_grad=True)
    before = x.detach().clone()
    with pc.kernels(kernels):
        y = model(x)
        y.mul(2.0).sum().backward()
    assert same_bits(x.detach(), before)


@KERNELS
@pytest.mark.families("odd", "llama")
def test_autocast_rounds_but_does_not_change_the_mathematics(trial: Trial, family: Family, kernels: str) -> None:
    model, adapter = adapted(family, trial)
    exact = family.forward(model, family.inputs())
    expected = Reference(model, [adapter], trial)
    with pc.kernels(kernels), torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = family.forward(model, family.inputs())
    found = gradients(adapter, weighted(rounded.float()))
    assert relative(rounded, exact) <= 5e-2
    expected.assert_near(found, torch.bfloat16)


@pytest.mark.parametrize("adapter_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.families("odd")
def test_adapter_and_base_may_differ_in_dtype(
    trial: Trial, family: Family, base_dtype: torch.dtype, adapter_dtype: str
) -> None:
    model, adapter = adapted(family, trial, base_dtype, dtype=adapter_dtype)
    wanted = {key: spec.dtype or getattr(torch, adapter_dtype) for key, spec in adapter.plan.tensors()}
    assert {key: parameter.dtype for key, parameter in adapter.named_parameters()} == wanted
    output = family.forward(model, family.inputs(dtype=base_dtype))
    assert output.dtype == base_dtype
    for key, gradient in gradients(adapter, weighted(output)).items():
        assert gradient.dtype == wanted[key], f"gradient of '{key}' came back as {gradient.dtype}"
        assert torch.isfinite(gradient).all(), f"gradient of '{key}'"


@pytest.mark.parametrize("tokens", [1, 40], ids=["one token", "many tokens"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.families("odd")
def test_without_gradients_the_same_comes_out(trial: Trial, family: Family, dtype: torch.dtype, tokens: int) -> None:
    model, _ = adapted(family, trial, dtype)
    x = torch.randn(tokens, 63, dtype=dtype)
    trained = model(x).detach()
    with torch.no_grad():
        assert_near(model(x), trained, TOLERANCE[dtype], "under no_grad")
    with torch.inference_mode():
        assert_near(model(x), trained, TOLERANCE[dtype], "in inference_mode")


@KERNELS
@pytest.mark.families("odd")
def test_dropout_keeps_the_mean_and_stops_in_evaluation(trial: Trial, family: Family, kernels: str) -> None:
    if not trial.can.dropout:
        with pytest.raises(pc.SpecError, match="dropout"):
            trial.spec(family, dropout=0.5)
        return
    model, adapter = adapted(family, trial, dropout=0.5)
    site = adapter.plan.sites[0]
    module = model.get_submodule(site.path)
    row = torch.randn(1, site.in_features)
    rows = row.expand(100 if kernels == "triton" else 20_000, -1)  # an interpreter is slow
    with torch.no_grad(), pc.kernels(kernels):
        weight = base_weight(model, site)
        base = nn.functional.linear(row, weight, module.bias)  # type: ignore[arg-type]
        delta = naive(trial, site, row, *borrowed(adapter, site.path), weight)
        assert_near(module.eval()(row) - base, delta, 1e-4, "Δ in evaluation")
        module.train()
        torch.manual_seed(1)
        samples = module(rows) - base
        torch.manual_seed(1)
        assert same_bits(module(rows) - base, samples), "not reproducible from torch's seed"
    assert relative(samples[0], samples[1]) > 0.1, "all rows are dropped alike"
    spread = samples.std(0).mean().expand_as(delta[0])
    assert relative(samples.mean(0), delta[0], spread) < 4 * len(rows) ** -0.5, "dropout shifts the mean"


@pytest.mark.methods(dropout=True)
@pytest.mark.families("odd")
def test_dropout_has_the_gradient_of_what_forward_dropped(trial: Trial, family: Family) -> None:
    model, adapter = adapted(family, trial, torch.float64, dropout=0.3, dtype="float64")
    model.train()
    outputs, found = [], []
    for kernels in ("torch", "naive"):  # the same seed drops the same
        x = family.inputs(dtype=torch.float64)["input"].requires_grad_()
        torch.manual_seed(7)
        with pc.kernels(kernels):
            outputs.append(model(x))
            found.append({**gradients(adapter, weighted(outputs[-1])), "input": x.grad})
    assert_near(outputs[0], outputs[1], TOLERANCE[torch.float64], "output under the same dropout")
    for name, reference in found[1].items():
        gradient = found[0][name]
        assert gradient is not None and reference is not None
        assert_near(gradient, reference, TOLERANCE[torch.float64], f"gradient of '{name}'")


@pytest.mark.methods(exclusive=False)
@pytest.mark.families("odd")
def test_run_time_scale_multiplies_what_the_adapter_adds(trial: Trial, family: Family) -> None:
    model, adapter = adapted(family, trial)
    site = adapter.plan.sites[0]
    module, x = model.get_submodule(site.path), torch.randn(4, site.in_features)
    with torch.no_grad():
        with adapter.disabled():
            base = module(x)
        delta = module(x) - base
        pc.activate(model, {"default": 0.3})
        assert_near(module(x) - base, 0.3 * delta, 1e-4, "Δ at a scale of 0.3")
    randomise(adapter, seed=2)
    pc.activate(model, "default")
    plain = gradients(adapter, weighted(module(x)).sum() + 0 * weighted(model(family.inputs()["input"])))
    pc.activate(model, {"default": 0.3})
    scaled = gradients(adapter, weighted(module(x)).sum() + 0 * weighted(model(family.inputs()["input"])))
    for key in plain:
        assert_near(scaled[key], 0.3 * plain[key], 1e-5, f"gradient of '{key}' at a scale of 0.3")
