"""Attaching adds the bank's tensors and nothing else, detaching leaves no trace, copies are independent."""

import copy
import io
import pickle

import pytest
import torch

import peft_core as pc

from .checks import (
    Snapshot,
    Trial,
    adapted,
    assert_near,
    gradients,
    randomise,
    relative,
    rounded_copy,
    run,
    same_bits,
    weighted,
)
from .families import Family

CYCLES = 100


def test_attach_keeps_the_function(trial: Trial, family: Family) -> None:
    model = family.build()
    before = run(family, model)
    pc.attach(model, trial.spec(family))
    if trial.can.starts_at_zero:
        assert same_bits(run(family, model), before), "attaching changed the output"
    elif trial.can.owns_base_weight:  # moving weight into the base rounds it once
        assert_near(run(family, model), before, 1e-5, "output after attaching")


def test_attach_keeps_the_function_in_bfloat16(trial: Trial, family: Family) -> None:
    model = family.build(dtype=torch.bfloat16)
    before = run(family, model)
    pc.attach(model, trial.spec(family))
    if trial.can.starts_at_zero:
        assert same_bits(run(family, model), before), "attaching changed the output"
    elif trial.can.owns_base_weight:
        assert_near(run(family, model), before, 5e-2, "output after attaching")


def test_trained_values_change_the_output(trial: Trial, family: Family) -> None:
    model = family.build()
    before = run(family, model)
    adapter = pc.attach(model, trial.spec(family))
    start = run(family, model)
    randomise(adapter)
    # More than float32 rounds; methods that scale a frozen projection, as VeRA does, change little.
    assert relative(run(family, model), before) > 1e-4
    assert relative(run(family, model), start) > 1e-4


def test_each_site_is_adapted(trial: Trial, family: Family) -> None:
    model, adapter = adapted(family, trial)
    seen = {site.path: 0 for site in adapter.plan.sites}
    for site in adapter.plan.sites:
        model.get_submodule(site.path).register_forward_hook(
            lambda module, args, output, path=site.path: seen.update({path: seen[path] + 1})
        )
    run(family, model)
    called = [path for path, count in seen.items() if count]
    assert called, "no adapted layer is ever called"
    x = {site.path: torch.randn(3, site.in_features) for site in adapter.plan.sites}
    with torch.no_grad():
        on = {path: model.get_submodule(path)(value) for path, value in x.items()}
        with adapter.disabled():
            off = {path: model.get_submodule(path)(value) for path, value in x.items()}
    for path in x:
        assert relative(on[path], off[path]) > 1e-3, f"'{path}' is not adapted"


def test_attach_adds_one_key_per_tensor_and_changes_no_other(trial: Trial, family: Family) -> None:
    model = family.build()
    before = Snapshot.of(model)
    adapter = pc.attach(model, trial.spec(family))
    state = model.state_dict(keep_vars=True)
    added = [key for key in state if key not in before.state]
    assert len(added) == len(list(adapter.plan.tensors())), f"keys added: {added}"
    assert [key for key in state if key in before.state] == list(before.state), "the order of the old keys has changed"
    own = {id(parameter) for parameter in adapter.parameters()}
    assert {id(state[key]) for key in added} == own, "an added key is not a tensor of the bank"
    if not trial.can.owns_base_weight:
        before.assert_same_values(model)
    assert len(list(model.named_parameters(remove_duplicate=False))) == len(own) + len(
        list(family.build().named_parameters(remove_duplicate=False))
    ), "a parameter is registered twice"


def test_attach_keeps_the_tree(trial: Trial, family: Family) -> None:
    plain, model = family.build(), family.build()
    kept = dict(model.named_modules())
    pc.attach(model, trial.spec(family))
    assert list(dict(model.named_modules())) == list(kept)
    assert [name for name, _ in model.named_children()] == [name for name, _ in plain.named_children()]
    for path, module in model.named_modules():
        assert module is kept[path], f"'{path}' is another object"
        assert isinstance(module, type(plain.get_submodule(path))), f"'{path}' is no {type(plain.get_submodule(path))}"
    assert isinstance(model, type(plain))
    # It may wear a subclass; what others look at (the name that transformers saves) stays.
    for name in ("__name__", "__qualname__", "__module__"):
        assert getattr(type(model), name) == getattr(type(plain), name)
    if isinstance(model, torch.nn.Sequential):
        assert len(model) == len(plain)  # type: ignore[arg-type]
        assert list(model) == [kept[name] for name, _ in plain.named_children()]


def test_attach_keeps_the_dtype_and_device_that_the_model_reports(trial: Trial, family: Family) -> None:
    model = family.build(dtype=torch.bfloat16)
    before = getattr(model, "dtype", None), getattr(model, "device", None)
    pc.attach(model, trial.spec(family))
    assert (getattr(model, "dtype", None), getattr(model, "device", None)) == before


def test_only_the_adapter_is_trainable(trial: Trial, family: Family) -> None:
    model = family.build()
    adapter = pc.attach(model, trial.spec(family))
    own = {id(parameter) for parameter in adapter.parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == own


def test_disabled_gives_the_base_output_bit_for_bit(trial: Trial, family: Family) -> None:
    model = family.build()
    before = run(family, model)
    adapter = randomise(pc.attach(model, trial.spec(family)))
    on = run(family, model)
    with adapter.disabled():
        assert same_bits(run(family, model), before), "disabling does not give the base's output"
    assert same_bits(run(family, model), on), "enabling again does not give the adapted output"


@pytest.mark.families("odd", "gpt2", "bert")
def test_detach_restores_the_base_after_many_cycles(trial: Trial, family: Family) -> None:
    model = family.build()
    before, output = Snapshot.of(model), run(family, model)
    for cycle in range(CYCLES if family.name == "odd" else 3):
        adapter = randomise(pc.attach(model, trial.spec(family), seed=cycle), seed=cycle)
        if cycle == 0:
            run(family, model)
        adapter.detach()
    before.assert_restored(model)
    assert same_bits(run(family, model), output)
    assert not pc.adapters(model)


def test_detached_adapter_can_be_attached_again(trial: Trial, family: Family) -> None:
    model, adapter = adapted(family, trial)
    first = run(family, model)
    adapter.detach()
    randomise(pc.attach(model, trial.spec(family)))
    assert same_bits(run(family, model), first)


def test_forward_and_backward_leave_the_base_alone(trial: Trial, family: Family) -> None:
    for kernels in ("torch", "naive"):
        model, adapter = adapted(family, trial)
        before = Snapshot.of(model)
        with pc.kernels(kernels):
            for _ in range(2):
                weighted(family.forward(model, family.inputs())).backward()  # type: ignore[no-untyped-call]
        before.assert_same_values(model)
        own = {id(parameter) for parameter in adapter.parameters()}
        for name, parameter in model.named_parameters():
            assert id(parameter) in own or parameter.grad is None, f"'{name}' of the base got a gradient"


@pytest.mark.families("odd", "llama")
def test_the_default_device_does_not_matter(trial: Trial, family: Family, tmp_path) -> None:
    """What is made on the way is made where the model is, not where torch makes tensors by default."""
    model, adapter = adapted(family, trial)
    output, inputs = run(family, model), family.inputs()
    expected = gradients(adapter, family.forward(model, inputs).sum())
    other = family.build()
    with torch.device("meta"):
        pc.attach(other, trial.spec(family), seed=0).save(tmp_path)
        pc.adapters(other)["default"].detach()
        twin = pc.load(other, tmp_path, trainable=True)
    randomise(twin)
    with torch.device("meta"):
        found = gradients(twin, family.forward(other, inputs).sum())
        twin.merge()
        twin.unmerge()
        with torch.no_grad():
            assert same_bits(family.forward(other, inputs), output)
    for key, gradient in expected.items():
        assert same_bits(found[key], gradient), f"gradient of '{key}'"


@pytest.mark.families("odd", "llama")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_does_not_matter(trial: Trial, family: Family, dtype: torch.dtype) -> None:
    """An adapter starts from the same values, whatever dtype torch gives new tensors."""
    expected = pc.attach(family.build(), trial.spec(family), seed=0).bank
    model, before = family.build(), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = pc.attach(model, trial.spec(family), seed=0).bank
    finally:
        torch.set_default_dtype(before)
    named = dict(found.named_parameters()) | dict(found.named_fixed()) | found.state
    for key, value in (dict(expected.named_parameters()) | dict(expected.named_fixed()) | expected.state).items():
        assert same_bits(named[key], value), f"'{key}' starts from other values"


def test_training_lowers_a_loss(trial: Trial, family: Family) -> None:
    for lr in (3e-3, 3e-2):  # some methods start slowly
        model = family.build()
        adapter = pc.attach(model, trial.spec(family))
        adapter.total_steps = 20
        before = Snapshot.of(model)
        target = run(family, model, seed=1) * 0.5
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=lr, weight_decay=0.0)
        losses = []
        for _ in range(20):
            loss = (family.forward(model, family.inputs()) - target).square().mean()
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        if losses[-1] < 0.97 * losses[0]:
            break
    assert losses[-1] < 0.97 * losses[0], f"the loss went from {losses[0]:.4f} to {losses[-1]:.4f}"
    if not trial.can.owns_base_weight:
        own = {id(parameter) for parameter in adapter.parameters()}
        frozen = {name: value for name, value in model.state_dict(keep_vars=True).items() if id(value) not in own}
        for name, value in frozen.items():
            assert same_bits(value, before.state[name]), f"training changed '{name}' of the base"


def test_copies_are_whole_and_independent(trial: Trial, family: Family) -> None:
    model, _ = adapted(family, trial)
    output = run(family, model)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    copies = {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "torch.save": torch.load(saved, weights_only=False),
    }
    for how, twin in copies.items():
        assert list(twin.state_dict()) == list(model.state_dict()), how
        assert len(list(twin.parameters())) == len(list(model.parameters())), f"{how}: a shared tensor was doubled"
        assert same_bits(run(family, twin), output), f"{how} computes something else"
        theirs = pc.adapters(twin)["default"]
        randomise(theirs, seed=5)
        assert relative(run(family, twin), output) > 1e-3, f"{how}: the copy does not use its own tensors"
        assert same_bits(run(family, model), output), f"{how}: changing the copy changed the original"
        weighted(family.forward(twin, family.inputs())).backward()  # type: ignore[no-untyped-call]
        assert all(parameter.grad is not None for parameter in theirs.parameters()), f"{how}: no gradient"
        assert all(p.grad is None for p in model.parameters()), f"{how}: gradients went to the original"
        theirs.detach()
        assert "default" in pc.adapters(model), how


def test_moving_keeps_sharing(trial: Trial, family: Family) -> None:
    model, adapter = adapted(family, trial)
    plain = family.build()
    own = len(list(adapter.plan.tensors()))
    exact = run(family, rounded_copy(model, torch.bfloat16))
    model.to(torch.bfloat16)
    assert len(list(model.parameters())) == len(list(plain.parameters())) + own, "a shared tensor was doubled"
    assert {p.dtype for p in adapter.parameters()} == {torch.bfloat16}
    assert relative(run(family, model), exact) < 0.1
    model.to("meta"), plain.to("meta")  # where torch separates the weights that the base itself ties
    assert len(list(model.parameters())) == len(list(plain.parameters())) + own, "a shared tensor was doubled"
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]), "a tensor stayed behind"


def test_state_dict_loads_into_an_attached_model(trial: Trial, family: Family) -> None:
    model, _ = adapted(family, trial, seed=1)
    other = family.build()  # of the same base and seed: what is fixed is in adapter files, and not in state dicts
    pc.attach(other, trial.spec(family), seed=1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    other.load_state_dict(model.state_dict())
    assert same_bits(run(family, other), run(family, model))
