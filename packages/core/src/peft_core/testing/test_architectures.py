"""One walk through an adapter's life on every other architecture."""

import pytest
import torch

import peft_core as pc

from .checks import Snapshot, Trial, adapted, gradients, randomise, relative, run, same_bits, weighted
from .families import CORE, FAMILIES, Family

OTHERS = [name for name in FAMILIES if name not in CORE]


@pytest.mark.families(*OTHERS)
def test_life_of_an_adapter(trial: Trial, family: Family, tmp_path) -> None:
    model = family.build()
    before = Snapshot.of(model)
    # Frozen, as an adapter freezes it: torch arranges some products by requires_grad, with other last bits.
    base = run(family, family.build().requires_grad_(False))
    assert pc.plan(family.build_meta(), trial.spec(family)) == pc.plan(model, trial.spec(family))

    adapter = pc.attach(model, trial.spec(family), seed=3)
    if trial.can.starts_at_zero:
        assert same_bits(run(family, model), base), "attaching changed the output"
    added = [key for key in model.state_dict() if key not in before.state]
    assert len(added) == len(list(adapter.plan.tensors()))
    randomise(adapter)
    on = run(family, model)
    assert relative(on, base) > 1e-3

    adapter.save(tmp_path / "adapter")
    fresh = family.build()
    pc.load(fresh, tmp_path / "adapter", trainable=True)
    assert same_bits(run(family, fresh), on), "the loaded adapter computes something else"

    found = gradients(adapter, weighted(family.forward(model, family.inputs())))
    with pc.kernels("naive"):
        expected = gradients(adapter, weighted(family.forward(model, family.inputs())))
    for key in expected:
        assert relative(found[key], expected[key]) <= 1e-4, f"gradient of '{key}'"

    adapter.merge()
    assert relative(run(family, model), on, on - base) <= 1e-3, "merged is not adapted"
    adapter.unmerge()
    with adapter.disabled():
        assert same_bits(run(family, model), base)
    adapter.detach()
    before.assert_restored(model)


@pytest.mark.families(*OTHERS)
def test_model_in_bfloat16(trial: Trial, family: Family) -> None:
    model, adapter = adapted(family, trial, torch.bfloat16)
    found = gradients(adapter, weighted(family.forward(model, family.inputs(dtype=torch.bfloat16))))
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
    assert any(gradient.any() for gradient in found.values())
