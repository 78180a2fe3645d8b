"""What is particular to this method. Everything else is `pytest --pyargs peft_core.testing --method dora`."""

import torch
from torch import nn

import peft_core as pc


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(63, 60), nn.Tanh(), nn.Linear(60, 63))


def test_magnitudes_start_as_the_norms_of_the_base() -> None:
    base = model()
    adapter = pc.attach(base, pc.AdapterSpec(method="dora", targets=["0"]), seed=0)
    assert torch.equal(dict(adapter.named_parameters())["0.m"], base[0].weight.norm(dim=1))


def test_attaching_changes_no_bit_in_float64() -> None:
    base, x = model().double(), torch.randn(5, 63, dtype=torch.float64)
    before = base(x)
    pc.attach(base, pc.AdapterSpec(method="dora"))
    assert torch.equal(base(x), before)


def test_output_is_the_papers_formula() -> None:
    base, x = model(), torch.randn(5, 63)
    adapter = pc.attach(base, pc.AdapterSpec(method="dora", targets=["0"], options={"r": 4, "alpha": 8}), seed=0)
    A, B, m = (dict(adapter.named_parameters())[f"0.{name}"] for name in "ABm")
    with torch.no_grad():
        B.normal_()
        m.mul_(1.5)
        direction = base[0].weight + (8 / 4) * B @ A
        weight = m[:, None] * direction / direction.norm(dim=1, keepdim=True)
        torch.testing.assert_close(base[0](x), x @ weight.T + base[0].bias)


def test_the_norm_is_a_constant_of_the_gradient_unless_asked() -> None:
    gradients = {}
    for detach in (True, False):
        base = model()
        adapter = pc.attach(base, pc.AdapterSpec(method="dora", targets=["0"], options={"detach_norm": detach}), seed=0)
        held = dict(adapter.named_parameters())
        with torch.no_grad():
            held["0.B"].normal_()
        base(torch.randn(5, 63, generator=torch.Generator().manual_seed(1))).square().sum().backward()
        gradients[detach] = held["0.B"].grad
    assert not torch.allclose(gradients[True], gradients[False], rtol=1e-2)


def test_a_base_weight_that_is_trained_as_well_gets_its_whole_gradient() -> None:
    base, x = model().double()[:1], torch.randn(5, 63, dtype=torch.float64)
    options = {"r": 4, "detach_norm": False}
    adapter = pc.attach(base, pc.AdapterSpec(method="dora", options=options, dtype="float64"))
    held = dict(adapter.named_parameters())
    with torch.no_grad():
        held["0.B"].normal_()
    weight = base[0].weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda *_: base(x).sum(), (weight, held["0.A"], held["0.B"], held["0.m"]))
