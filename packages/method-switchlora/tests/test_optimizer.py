"""RowAdamW beside torch's AdamW."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from peft_method_switchlora import RowAdamW
from peft_method_switchlora.optimizer import restart

SHAPES = [(6, 20), (24, 6), (7,), (3, 4, 5)]


def make(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def gradients(parameters, index):
    generator = torch.Generator().manual_seed(1000 + index)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equals_torch_bit_for_bit_while_nothing_is_reset(dtype, weight_decay, kind):
    ours, torchs = make(dtype), make(dtype)
    settings = {
        "lr": 0.01,
        "betas": (0.9, 0.95),
        "eps": 1e-7,
        "weight_decay": weight_decay,
        **kind,
    }
    pair = RowAdamW(ours, **settings), torch.optim.AdamW(torchs, **settings)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10) for optimizer in pair]
    for index in range(30):
        gradients(ours, index)
        gradients(torchs, index)
        if index % 5 == 0:  # a parameter without a gradient is passed over
            ours[2].grad = torchs[2].grad = None
        for optimizer, schedule in zip(pair, schedules, strict=True):
            optimizer.step()
            schedule.step()
        assert same(ours, torchs)
    for mine, theirs in zip(ours, torchs, strict=True):
        assert pair[0].state[mine].keys() == pair[1].state[theirs].keys()
        assert all(torch.equal(value, pair[1].state[theirs][name]) for name, value in pair[0].state[mine].items())


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 1e-6)])
@pytest.mark.parametrize("kind", [{}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("which, dim", [(0, 0), (1, 1)])
def test_a_reset_vector_is_as_one_that_came_later(which, dim, kind, dtype, tolerance):
    """Against torch's AdamW on every vector by itself, started when the vector was reset."""
    parameter = make(dtype)[which]
    other = make(dtype)[3]
    settings = {"lr": 0.01, "weight_decay": 0.1}
    ours = RowAdamW([parameter, other], **settings, **kind)
    resets = {5: [1, 4], 9: [4], 20: [0, 1, 2, 3, 4, 5]}
    alone = [torch.nn.Parameter(vector.detach().clone()) for vector in parameter.unbind(dim)]
    theirs = [torch.optim.AdamW([vector], **settings) for vector in alone]
    counts = [0] * 6
    for index in range(40):
        gradients([parameter, other], index)
        for place in resets.get(index, []):
            theirs[place] = torch.optim.AdamW([alone[place]], **settings)
            counts[place] = 0
        if index in resets:
            restart(ours, parameter, dim, torch.tensor(resets[index]))
        for place, vector in enumerate(alone):
            vector.grad = parameter.grad.select(dim, place).clone()
            theirs[place].step()
            counts[place] += 1
        ours.step()
        torch.testing.assert_close(parameter, torch.stack(list(alone), dim), rtol=tolerance, atol=tolerance)
    assert ours.state[parameter]["step"].flatten().tolist() == counts
    assert ours.state[other]["step"].dim() == 0


def test_steps_are_counted_in_float32_whatever_the_default_dtype():
    """bfloat16 counts no further than 256."""
    parameters = make()
    gradients(parameters, 0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        (optimizer := RowAdamW(parameters)).step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert optimizer.state[parameters[0]]["step"].dtype == torch.float32


def test_a_learning_rate_in_a_tensor_is_that_number():
    trained = []
    for lr in (0.25, torch.tensor(0.25)):
        parameters = make()
        optimizer = RowAdamW(parameters, lr=lr)
        for index in range(2):
            gradients(parameters, index)
            optimizer.step()
            restart(optimizer, parameters[0], 0, torch.tensor([1]))
        trained.append(parameters)
    assert same(*trained)


def test_a_learning_rate_of_zero_moves_nothing():
    parameters = make()
    optimizer = RowAdamW(parameters, lr=0.0)
    gradients(parameters, 0)
    optimizer.step()
    restart(optimizer, parameters[0], 0, torch.tensor([1]))
    before = copy.deepcopy(parameters)
    gradients(parameters, 1)
    optimizer.step()
    assert same(parameters, before)


def test_state_dict_round_trips_with_counts_per_vector():
    first = make()
    optimizer = RowAdamW(first, lr=0.01)

    def go_on(parameters, optimizer, indices):
        for index in indices:
            gradients(parameters, index)
            if index % 4 == 3:
                restart(optimizer, parameters[0], 0, torch.tensor([index % 6]))
                restart(optimizer, parameters[1], 1, torch.tensor([index % 5]))
            optimizer.step()

    go_on(first, optimizer, range(10))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    second = copy.deepcopy(first)
    resumed = RowAdamW(second, lr=0.5)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.state[second[0]]["step"].shape == (6, 1)
    assert resumed.state[second[1]]["step"].shape == (1, 6)
    go_on(first, optimizer, range(10, 20))
    go_on(second, resumed, range(10, 20))
    assert same(first, second)


def test_state_of_torchs_adamw_can_be_taken_over():
    ours, torchs = make(), make()
    theirs = torch.optim.AdamW(torchs, lr=0.01)
    gradients(torchs, 0)
    theirs.step()
    optimizer = RowAdamW(ours, lr=0.01)
    with torch.no_grad():
        for mine, parameter in zip(ours, torchs, strict=True):
            mine.copy_(parameter)
    optimizer.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for parameters, stepped in ((ours, optimizer), (torchs, theirs)):
        gradients(parameters, 1)
        stepped.step()
    assert same(ours, torchs)


def test_a_reset_before_the_first_step_is_no_error():
    parameters = make()
    optimizer = RowAdamW(parameters)
    restart(optimizer, parameters[0], 0, torch.tensor([0]))
    assert parameters[0] not in optimizer.state


def test_a_gradient_scaler_unscales_for_the_fused_kind():
    """torch's fused AdamW is handed scaled gradients and the scale; ours updates some vectors by other means."""
    ends = []
    for scale in (1.0, 2.0**10):
        parameter = make()[0]
        optimizer = RowAdamW([parameter], lr=0.1, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for index in range(4):
            generator = torch.Generator().manual_seed(index)
            loss = (parameter * torch.randn(parameter.shape, generator=generator)).sum()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            restart(optimizer, parameter, 0, torch.tensor([1]))
        ends.append(parameter)
    assert torch.allclose(*ends, rtol=1e-6)
    assert not same(ends[:1], make()[:1])


def test_a_closure_is_evaluated():
    parameters = make()
    optimizer = RowAdamW(parameters, lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = sum((parameter**2).sum() for parameter in parameters)
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first


@pytest.mark.parametrize("variant", ["amsgrad", "maximize", "capturable", "differentiable"])
def test_variants_that_it_does_not_have_are_refused_in_groups_too(variant):
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match=f"RowAdamW has no {variant}"):
        RowAdamW([{"params": [parameter], variant: True}])
