"""A plan is pure data: deterministic, made without weights, and what attach then does."""

import torch
from torch import Tensor

import peft_core as pc
from peft_core.sharing import FromBase, TensorSpec

from .checks import Trial, borrowed, same_bits
from .families import Family


def test_plan_is_deterministic(trial: Trial, family: Family) -> None:
    one, two = (pc.plan(family.build(), trial.spec(family)) for _ in range(2))
    assert one == two
    assert str(one) == str(two)


def test_plan_needs_no_weights(trial: Trial, family: Family) -> None:
    assert pc.plan(family.build_meta(), trial.spec(family)) == pc.plan(family.build(), trial.spec(family))


def test_plan_survives_writing_the_spec_down(trial: Trial, family: Family) -> None:
    spec, model = trial.spec(family), family.build()
    assert pc.AdapterSpec.from_json(spec.to_json()) == spec
    assert pc.AdapterSpec.from_yaml(spec.to_yaml()) == spec
    assert pc.plan(model, pc.AdapterSpec.from_yaml(spec.to_yaml())) == pc.plan(model, spec)


def test_plan_counts_what_attach_registers(trial: Trial, family: Family) -> None:
    adapter = pc.attach(family.build(), trial.spec(family))
    shapes = {key: tuple(parameter.shape) for key, parameter in adapter.named_parameters()}
    assert shapes == {key: tensor.shape for key, tensor in adapter.plan.tensors()}
    assert adapter.num_trainable == adapter.plan.num_trainable == sum(p.numel() for p in adapter.parameters())
    size = sum(p.numel() * p.element_size() for p in adapter.parameters())
    assert adapter.plan.trainable_bytes == size


def test_every_site_borrows_what_the_groups_say(trial: Trial, family: Family) -> None:
    adapter = pc.attach(family.build(), trial.spec(family))
    named = dict(_values(adapter))
    for group in adapter.plan.groups:
        for path in set(group.members) & {site.path for site in adapter.plan.sites}:
            tensors, binding = borrowed(adapter, path)
            for name, found in [*((n, tensors[n]) for n in group.tensors), *((n, binding[n]) for n in group.fixed)]:
                assert same_bits(found, named[f"{group.name}.{name}"]), f"'{path}' borrows another '{name}'"


def test_same_seed_gives_the_same_values(trial: Trial, family: Family) -> None:
    first = pc.attach(family.build(), trial.spec(family), seed=3)
    torch.manual_seed(12345)  # the global random state must not matter
    second = pc.attach(family.build(), trial.spec(family), seed=3)
    for (key, one), (_, two) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert same_bits(one, two), f"'{key}' differs between two attachments of one seed"
    for site in first.plan.sites:
        was, now = borrowed(first, site.path)[1], borrowed(second, site.path)[1]
        assert all(same_bits(was[name], now[name]) for name in was), f"binding of '{site.path}' differs"


def test_other_seed_gives_other_values(trial: Trial, family: Family) -> None:
    first = pc.attach(family.build(), trial.spec(family), seed=3)
    second = pc.attach(family.build(), trial.spec(family), seed=4)
    others = dict(_values(second))
    specs = dict([*first.plan.tensors(), *first.plan.fixed()])
    for key, value in _values(first):
        if _random(specs[key]):
            assert not torch.equal(value, others[key]), f"'{key}' does not depend on the seed"
    drawn = [value for key, value in _values(first) if _random(specs[key]) and value.is_floating_point()]
    for number, one in enumerate(drawn):
        for two in drawn[:number]:
            assert one.shape != two.shape or not torch.equal(one, two), "two tensors start with the same random values"


def _values(adapter: pc.Adapter) -> list[tuple[str, Tensor]]:
    """What is trained and what is fixed, by key."""
    return [*adapter.named_parameters(), *adapter.bank.named_fixed()]


def _random(spec: TensorSpec) -> bool:
    """Whether the initialiser draws: two generators give two results."""
    if isinstance(spec.init, (FromBase, pc.FromWeight)):
        return False
    one, two = (spec.init.draw(spec.shape, torch.Generator().manual_seed(seed)) for seed in (1, 2))
    return not torch.equal(one, two)
