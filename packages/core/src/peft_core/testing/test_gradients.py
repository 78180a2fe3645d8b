"""Gradients by tensor name, against float64 autograd of the naive reference."""

from typing import Any

import pytest
import torch
from torch import Tensor

import peft_core as pc

from .checks import (
    KERNELS,
    TOLERANCE,
    Trial,
    adapted,
    assert_near,
    base_weight,
    borrowed,
    dense,
    doubled,
    functions,
    gradients,
    naive,
    randomise,
    same_bits,
    weighted,
)
from .families import Family
from .reference import Reference, keep_call

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@DTYPES
@KERNELS
def test_gradients_equal_the_reference_in_float64(
    trial: Trial, family: Family, kernels: str, dtype: torch.dtype
) -> None:
    model, adapter = adapted(family, trial, dtype)
    expected = Reference(model, [adapter], trial)
    with pc.kernels(kernels):
        found = gradients(adapter, weighted(family.forward(model, family.inputs(dtype=dtype))))
    expected.assert_near(found, dtype)


@DTYPES
@KERNELS
@pytest.mark.families("odd", "gpt2")
def test_input_gradients_equal_the_reference_in_float64(
    trial: Trial, family: Family, kernels: str, dtype: torch.dtype
) -> None:
    model, adapter = adapted(family, trial, dtype)
    for site in adapter.plan.sites:
        module: Any = model.get_submodule(site.path)
        x = torch.randn(5, site.in_features).to(dtype).requires_grad_()
        with pc.kernels(kernels):
            y = module(x)
            dy = torch.randn_like(y)
            y.backward(dy)
        x64 = x.detach().double().requires_grad_()
        weight = base_weight(model, site).double()
        bias = 0 if module.bias is None else module.bias.detach().double()
        tensors, binding = borrowed(adapter, site.path)
        y64 = x64 @ weight.T + bias + naive(trial, site, x64, doubled(tensors), binding, weight)
        y64.backward(dy.double())
        assert x.grad is not None and x64.grad is not None
        assert_near(y, y64, TOLERANCE[dtype], f"output of '{site.path}'")
        assert_near(x.grad, x64.grad, TOLERANCE[dtype], f"input gradient of '{site.path}'")


@DTYPES
@pytest.mark.parametrize("tokens", [0, 1, 17])
@pytest.mark.families("odd")
def test_accumulating_pair_equals_the_reference(
    trial: Trial, family: Family, tokens: int, dtype: torch.dtype, poisoned_memory: None
) -> None:
    """`add_` and `grad_` called directly: they add, and they leave alone what they are only given to read."""
    _, adapter = adapted(family, trial)
    for site in adapter.plan.sites[:2]:
        pair = functions(trial, site)
        assert (pair.add_ is None) == (pair.grad_ is None), "add_ and grad_ come together"
        if pair.add_ is None or pair.grad_ is None or not trial.can.additive:
            continue  # core then runs `naive`
        tensors, binding = borrowed(adapter, site.path)
        x = torch.randn(tokens, site.in_features).to(dtype)
        y, dy = (torch.randn(tokens, site.out_features).to(dtype) for _ in range(2))
        dx = torch.randn(tokens, site.in_features).to(dtype)
        x64, tensors64 = x.double().requires_grad_(), doubled(tensors)
        delta = pair.naive(x64, tensors64, binding)
        delta.backward(dy.double())
        assert x64.grad is not None
        y_expected, dx_expected = y.double() + delta, dx.double() + x64.grad
        kept = {"x": x, "dy": dy, **tensors, **{f"binding {name}": value for name, value in binding.items()}}
        before = {name: value.clone() for name, value in kept.items()}

        with torch.no_grad():
            saved = pair.add_(x, y, tensors, binding)
            assert isinstance(saved, tuple) and all(isinstance(tensor, Tensor) for tensor in saved)
            y_after = y.clone()
            found = pair.grad_(dy, dx, saved, tensors, binding)
            without_dx = pair.grad_(dy, None, saved, tensors, binding)

        assert_near(y, y_expected, TOLERANCE[dtype], "y after add_")
        assert same_bits(y, y_after), "grad_ changed y"
        assert_near(dx, dx_expected, TOLERANCE[dtype], "dx after grad_")
        assert set(found) == set(tensors), f"grad_ returned {sorted(found)}, the site borrows {sorted(tensors)}"
        for name, tensor in tensors64.items():
            assert tensor.grad is not None
            gradient = dense(found[name], tensor)
            assert_near(gradient, tensor.grad, TOLERANCE[dtype], f"gradient of '{name}'")
            assert same_bits(dense(without_dx[name], tensor), gradient), f"'{name}' differs where dx is not wanted"
        for name, value in kept.items():
            assert same_bits(value, before[name]), f"'{name}' was changed"


@KERNELS
@pytest.mark.families("odd", "bert")
def test_gradients_accumulate_over_backwards(trial: Trial, family: Family, kernels: str) -> None:
    model, adapter = adapted(family, trial)
    with pc.kernels(kernels):
        parts = [gradients(adapter, weighted(family.forward(model, family.inputs(seed)))) for seed in (1, 2)]
        for seed in (1, 2):
            weighted(family.forward(model, family.inputs(seed))).backward()  # type: ignore[no-untyped-call]
    for key, parameter in adapter.named_parameters():
        assert parameter.grad is not None
        assert_near(parameter.grad, parts[0][key] + parts[1][key], 1e-5, f"accumulated gradient of '{key}'")


@KERNELS
@pytest.mark.families("odd")
def test_gradients_accumulate_over_double_use_of_a_layer(trial: Trial, family: Family, kernels: str) -> None:
    model, adapter = adapted(family, trial)
    expected = Reference(model, [adapter], trial)
    x = family.inputs()["input"]
    with pc.kernels(kernels):
        found = gradients(adapter, weighted(model(model(x))))
    for key, reference in expected.sums("default").items():
        assert_near(found[key], reference, 1e-5, f"gradient of '{key}'")


@pytest.mark.families("odd", "llama")
def test_backward_twice_through_one_graph(trial: Trial, family: Family) -> None:
    model, adapter = adapted(family, trial)
    loss = weighted(family.forward(model, family.inputs()))
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    once = [parameter.grad.clone() for parameter in adapter.parameters() if parameter.grad is not None]
    loss.backward()  # type: ignore[no-untyped-call]
    for (key, parameter), first in zip(adapter.named_parameters(), once, strict=True):
        assert parameter.grad is not None
        assert_near(parameter.grad, 2 * first, 1e-6, f"gradient of '{key}' after two backwards")


@pytest.mark.families("odd")
def test_gradients_of_some_tensors_alone(trial: Trial, family: Family) -> None:
    """`torch.autograd.grad` with respect to one tensor, to the input, and to a frozen rest."""
    model, adapter = adapted(family, trial)
    x = family.inputs()["input"].requires_grad_()
    named = dict(adapter.named_parameters())
    whole = torch.autograd.grad(weighted(model(x)), [x, *named.values()])
    (alone,) = torch.autograd.grad(weighted(model(x)), [x])
    assert_near(alone, whole[0], 1e-6, "input gradient alone")
    for (key, parameter), expected in zip(named.items(), whole[1:], strict=True):
        (alone,) = torch.autograd.grad(weighted(model(x)), [parameter])
        assert_near(alone, expected, 1e-6, f"gradient of '{key}' alone")
    for parameter in named.values():
        parameter.requires_grad_(False)
    (alone,) = torch.autograd.grad(weighted(model(x)), [x])
    assert_near(alone, whole[0], 1e-6, "input gradient of a frozen adapter")


@pytest.mark.families("bert")
def test_trained_module_gets_the_gradient_of_its_copy(trial: Trial, family: Family) -> None:
    model, adapter = adapted(family, trial)
    (path,) = adapter.plan.trained
    module = model.get_submodule(path)
    calls: list[tuple[Tensor, Tensor]] = []
    module.register_forward_hook(lambda module, args, output: keep_call(calls, args[0], output))
    found = gradients(adapter, weighted(family.forward(model, family.inputs())))
    names = adapter.plan.trained[path]
    values = {name: dict(adapter.named_parameters())[key].detach().double() for name, key in names.items()}
    values = {name: value.requires_grad_() for name, value in values.items()}
    plain = family.build().get_submodule(path).double()
    for x, dy in calls:
        torch.func.functional_call(plain, values, x.double()).backward(dy.double())
    for name, key in names.items():
        reference = values[name].grad
        assert reference is not None
        assert_near(found[key], reference, 1e-5, f"gradient of '{key}'")


@pytest.mark.families("llama")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(trial: Trial, family: Family, reentrant: bool) -> None:
    model, adapter = adapted(family, trial)
    model.train()
    expected = gradients(adapter, weighted(family.forward(model, family.inputs())))
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})  # type: ignore[operator]
    model.enable_input_require_grads()  # type: ignore[operator]
    found = gradients(adapter, weighted(family.forward(model, family.inputs())))
    for key in expected:
        assert_near(found[key], expected[key], 1e-6, f"gradient of '{key}'")


@pytest.mark.methods(exclusive=False)
@pytest.mark.families("odd", "gpt2")
def test_two_adapters_get_their_own_gradients(trial: Trial, family: Family, partner: Trial) -> None:
    model, first = adapted(family, trial)
    second = randomise(pc.attach(model, partner.spec(family, train_modules=()), name="second"), seed=1)
    pc.activate(model, ["default", "second"])
    expected = Reference(model, [first, second], trial, partner)
    weighted(family.forward(model, family.inputs())).backward()  # type: ignore[no-untyped-call]
    found = {a.name: {key: parameter.grad for key, parameter in a.named_parameters()} for a in (first, second)}
    for name in found:
        for key, reference in expected.sums(name).items():
            gradient = found[name][key]
            assert gradient is not None, f"'{key}' of adapter '{name}' got no gradient"
            assert_near(gradient, reference, 1e-5, f"gradient of '{key}' of adapter '{name}'")
