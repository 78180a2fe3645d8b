"""Optimizer steps: what is trained is what is saved, a resumed run never stopped, options reach their layers."""

import copy

import pytest
import torch
from torch import nn

import peft_core as pc

from .checks import Trial, adapted, randomise, relative, run, same_bits, trials, weighted
from .families import Family

STEPS, HALF = 12, 5


def _train(family: Family, model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    dtype = next(model.parameters()).dtype
    for number in steps:
        optimizer.zero_grad()
        loss = weighted(family.forward(model, family.inputs(number, dtype))) * 1e-2
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def _prepared(adapter: pc.Adapter, lr: float = 1e-2) -> torch.optim.Optimizer:
    """The optimizer that trainers would take: the method's own, if it has one."""
    adapter.total_steps = STEPS
    optimizer = adapter.plan.spec.info.optimizer or torch.optim.AdamW
    return optimizer(adapter.parameters(), lr=lr, weight_decay=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.families("odd")
def test_resuming_goes_on_as_if_nothing_had_happened(
    trial: Trial, family: Family, dtype: torch.dtype, tmp_path
) -> None:
    model = family.build(dtype=dtype)
    adapter = pc.attach(model, trial.spec(family), seed=3)
    optimizer = _prepared(adapter)
    _train(family, model, optimizer, range(HALF))
    adapter.save(tmp_path / "adapter")
    state, output = copy.deepcopy(optimizer.state_dict()), run(family, model)
    _train(family, model, optimizer, range(HALF, STEPS))

    # Another process remembers nothing of this one: neither the random state, nor what a module has kept.
    torch.manual_seed(99)
    other = family.build(dtype=dtype)
    _train(family, other, _prepared(pc.attach(other, trial.spec(family), seed=8)), range(20, 23))
    resumed = family.build(dtype=dtype)
    loaded = pc.load(resumed, tmp_path / "adapter", trainable=True)
    assert same_bits(run(family, resumed), output), "what was saved is not what was trained"
    optimizer = _prepared(loaded)
    optimizer.load_state_dict(state)
    _train(family, resumed, optimizer, range(HALF, STEPS))
    for (key, one), (_, two) in zip(adapter.named_parameters(), loaded.named_parameters(), strict=True):
        assert same_bits(one, two), f"'{key}' went another way after resuming"
    assert same_bits(run(family, resumed), run(family, model)), "the resumed run computes something else"


@pytest.mark.methods(owns_base_weight=True, optimizer_step=True)
@pytest.mark.families("odd", "llama")
def test_moving_weight_keeps_the_function(trial: Trial, family: Family) -> None:
    model, adapter = adapted(family, trial)
    before = run(family, model)
    _train(family, model, _prepared(adapter, lr=0.0), range(STEPS))
    assert relative(run(family, model), before) < 1e-4, "steps of length zero changed what the model computes"


@pytest.mark.families("odd")
def test_overrides_reach_their_sites(trial: Trial, family: Family) -> None:
    """Layers with options of their own get what an adapter on them alone would."""
    model = family.build()
    type_ = pc.plan(model, trial.spec(family)).sites[-1].type
    for other in trials([trial.method]):
        try:
            mixed = trial.spec(family, overrides={type_: dict(other.spec(family).options)})
            made = pc.plan(model, mixed)
        except (pc.SpecError, pc.PlanError):  # options that have to be the same everywhere
            continue
        apart = pc.plan(model, trial.spec(family, exclude=[type_])), pc.plan(model, other.spec(family, targets=[type_]))
        assert _shapes(made) == {**_shapes(apart[0]), **_shapes(apart[1])}
        adapter = randomise(pc.attach(model, mixed))
        output = run(family, model)
        adapter.merge()
        assert relative(run(family, model), output) < 1e-4, "merged is not adapted"
        adapter.unmerge()
        adapter.detach()


def _shapes(plan: pc.Plan) -> dict[str, dict[str, tuple[int, ...]]]:
    """Site → tensor name → shape of what it borrows."""
    tensors = dict(plan.tensors())
    return {path: {name: tensors[key].shape for name, key in keys.items()} for path, keys in plan.borrowed().items()}
