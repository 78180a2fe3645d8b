"""Several adapters on one model: each alone, together, switched, and refused where they cannot be."""

import pytest
import torch

import peft_core as pc

from .checks import Snapshot, Trial, adapted, assert_near, randomise, relative, run, same_bits
from .families import Family


def _second(model, family: Family, partner: Trial, **fields) -> pc.Adapter:
    return randomise(pc.attach(model, partner.spec(family, **fields), name="second"), seed=1)


def test_two_adapters_on_one_site_add_up_or_are_refused(trial: Trial, family: Family, partner: Trial) -> None:
    model, first = adapted(family, trial)
    x = {site.path: torch.randn(4, site.in_features) for site in first.plan.sites}
    if trial.can.exclusive:
        with pytest.raises(pc.AdapterError) as refused:
            _second(model, family, partner)
            pc.activate(model, ["default", "second"])
        message = str(refused.value)
        assert any(f"'{site.path}'" in message for site in first.plan.sites), f"no site is named: {message}"
        assert trial.method in message and "\n" not in message
        return
    _second(model, family, partner)

    def outputs(*names: str) -> dict[str, torch.Tensor]:
        pc.activate(model, names)
        with torch.no_grad():
            return {path: model.get_submodule(path)(value) for path, value in x.items()}

    none, one, two, both = outputs(), outputs("default"), outputs("second"), outputs("default", "second")
    for path in x:
        delta = (one[path] - none[path]) + (two[path] - none[path])
        assert_near(both[path] - none[path], delta, 1e-5, f"'{path}' with both adapters")


@pytest.mark.methods(owns_base_weight=False)
def test_attach_activates_only_the_new_one(trial: Trial, family: Family, partner: Trial) -> None:
    model, first = adapted(family, trial)
    alone = run(family, model)
    second = _second(model, family, partner)
    assert (first.active, second.active) == (False, True)
    assert list(pc.adapters(model)) == ["default", "second"]
    with second.disabled():
        base = run(family, model)
    pc.activate(model, "default")
    assert same_bits(run(family, model), alone), "the first adapter alone is not what it was"
    pc.activate(model, [])
    assert same_bits(run(family, model), base)


@pytest.mark.methods(owns_base_weight=False)
def test_detaching_one_leaves_the_other(trial: Trial, family: Family, partner: Trial) -> None:
    model = family.build()
    before = Snapshot.of(model)
    first = randomise(pc.attach(model, trial.spec(family)))
    alone = run(family, model)
    second = _second(model, family, partner)
    second.detach()
    pc.activate(model, "default")
    assert same_bits(run(family, model), alone)
    assert [key for key in model.state_dict() if key not in before.state] == [
        key for key, value in model.state_dict(keep_vars=True).items() if any(value is p for p in first.parameters())
    ]
    first.detach()
    before.assert_restored(model)


def test_a_name_is_given_once(trial: Trial, family: Family) -> None:
    model, _ = adapted(family, trial)
    before = Snapshot.of(model)
    with pytest.raises(pc.AdapterError, match="'default'"):
        pc.attach(model, trial.spec(family))
    before.assert_restored(model)


@pytest.mark.families("odd", "llama")
def test_adapters_on_different_layers(trial: Trial, family: Family, partner: Trial) -> None:
    model = family.build()
    base = run(family, model)
    types = sorted({site.type for site in pc.plan(model, trial.spec(family)).sites})
    half = len(types) // 2
    randomise(pc.attach(model, trial.spec(family, targets=types[:half])))
    one = run(family, model)
    second = randomise(pc.attach(model, partner.spec(family, targets=types[half:]), name="second"), seed=1)
    pc.activate(model, ["default", "second"])
    both = run(family, model)
    assert relative(one, base) > 1e-3 and relative(both, one) > 1e-3
    second.detach()
    assert same_bits(run(family, model), one)


@pytest.mark.methods(exclusive=False)
@pytest.mark.families("odd", "gpt2", "bert")
def test_merging_one_beside_an_active_one(trial: Trial, family: Family, partner: Trial) -> None:
    model, first = adapted(family, trial)
    _second(model, family, partner, train_modules=())
    pc.activate(model, ["default", "second"])
    both, before = run(family, model), Snapshot.of(model)
    first.merge()
    assert relative(run(family, model), both) <= 1e-4
    first.unmerge()
    before.assert_same_values(model)
    assert relative(run(family, model), both) <= 1e-5
