"""Merge equals forward, undoing a merge restores every bit, factors are exact."""

import pytest
import torch

import peft_core as pc
from peft_core import plugins

from .checks import (
    TOLERANCE,
    Snapshot,
    Trial,
    adapted,
    assert_near,
    base_weight,
    borrowed,
    doubled,
    merged,
    naive,
    relative,
    run,
    same_bits,
)
from .families import Family

CYCLES = 100
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)


def test_merged_weight_computes_what_forward_computes(trial: Trial, family: Family) -> None:
    """Per site and in float64, where nothing hides behind rounding."""
    model, adapter = adapted(family, trial)
    for site in adapter.plan.sites:
        tensors, binding = borrowed(adapter, site.path)
        tensors64 = {name: tensor.detach() for name, tensor in doubled(tensors).items()}
        weight = base_weight(model, site).double()
        x = torch.randn(9, site.in_features, dtype=torch.float64)
        delta = naive(trial, site, x, tensors64, binding, weight)
        kept = {"weight": weight.clone(), **{name: tensor.clone() for name, tensor in tensors64.items()}}
        result = merged(trial, site, weight, tensors64, binding)
        assert result.shape == weight.shape and result.dtype == torch.float64
        assert_near(x @ (result - weight).T, delta, TOLERANCE[torch.float64], f"merged '{site.path}'")
        for name, now in {"weight": weight, **tensors64}.items():
            assert same_bits(now, kept[name]), f"merging '{site.path}' changed '{name}' in place"


@DTYPES
def test_merged_model_computes_what_the_adapted_model_computes(
    trial: Trial, family: Family, dtype: torch.dtype
) -> None:
    model, adapter = adapted(family, trial, dtype)
    on = run(family, model)
    with adapter.disabled():
        off = run(family, model)
    adapter.merge()
    distance = relative(run(family, model), on, on.double() - off.double())
    # Rounding of weights and activations, against what the adapter contributes: little, or what it does to the base by itself.
    base = family.build(dtype=dtype).double()
    rounding = relative(off, run(family, base), on.double() - off.double())
    allowed = max({torch.float32: 1e-4, torch.bfloat16: 8e-2, torch.float16: 1e-2}[dtype], 2 * rounding)
    assert allowed < 0.6, (
        f"the trial contributes too little to be told from rounding ({rounding:.1e} of it): let its options add more, such as a "
        "larger alpha"
    )
    assert distance <= allowed, f"merged output is off by {distance:.1e} of what the adapter contributes"


@DTYPES
@pytest.mark.families("odd", "gpt2")
def test_merged_weight_is_rounded_once(trial: Trial, family: Family, dtype: torch.dtype) -> None:
    model, adapter = adapted(family, trial, dtype)
    expected = {}
    for site in adapter.plan.sites:
        tensors, binding = borrowed(adapter, site.path)
        tensors64 = {name: tensor.detach() for name, tensor in doubled(tensors).items()}
        expected[site.path] = merged(trial, site, base_weight(model, site).double(), tensors64, binding)
    adapter.merge()
    for site in adapter.plan.sites:
        found, exact = base_weight(model, site), expected[site.path]
        assert found.dtype == dtype
        rounding = 4 * torch.finfo(dtype).eps if dtype == torch.float32 else torch.finfo(dtype).eps / 2
        assert_near(found, exact, rounding, f"merged weight of '{site.path}'")


@DTYPES
@pytest.mark.families("odd", "gpt2", "bert")
def test_unmerge_restores_the_base_after_many_cycles(trial: Trial, family: Family, dtype: torch.dtype) -> None:
    model, adapter = adapted(family, trial, dtype)
    before, on = Snapshot.of(model), run(family, model)
    for _ in range(CYCLES if family.name == "odd" and dtype == torch.bfloat16 else 3):
        adapter.merge()
        adapter.unmerge()
    before.assert_restored(model)
    assert same_bits(run(family, model), on)


@pytest.mark.families("odd", "gpt2", "bert")
def test_merge_then_detach_restores_the_base(trial: Trial, family: Family) -> None:
    model = family.build(dtype=torch.bfloat16)
    before, output = Snapshot.of(model), run(family, model)
    adapter = pc.attach(model, trial.spec(family))
    adapter.merge()
    with pytest.raises(pc.PeftCoreError, match="merged"):
        adapter.detach()
    with adapter.disabled():
        assert same_bits(run(family, model), output), "disabling a merged adapter does not give the base's output"
    adapter.unmerge()
    adapter.detach()
    before.assert_restored(model)
    assert same_bits(run(family, model), output)


def test_merge_and_detach_leaves_a_plain_model(trial: Trial, family: Family) -> None:
    model, adapter = adapted(family, trial)
    plain, on = Snapshot.of(family.build()), run(family, model)
    adapter.merge_and_detach()
    left = Snapshot.of(model)
    assert list(left.state) == list(plain.state)
    assert left.classes == plain.classes and left.attributes == plain.attributes and left.flags == plain.flags
    assert not pc.adapters(model)
    assert relative(run(family, model), on) <= 1e-4


def test_saving_while_merged_keeps_the_adapter(trial: Trial, family: Family, tmp_path) -> None:
    model, adapter = adapted(family, trial)
    on = run(family, model)
    adapter.merge()
    adapter.save(tmp_path / "adapter")
    fresh = family.build()
    pc.load(fresh, tmp_path / "adapter", trainable=True)
    assert same_bits(run(family, fresh), on)


@pytest.mark.families("odd", "gpt2", "bert")
@pytest.mark.parametrize("keep", ["host", "directory", "none"])
@pytest.mark.parametrize("active", [True, False], ids=["active", "inactive"])
def test_a_merge_is_undone_and_saved_from_wherever_it_began(
    trial: Trial, family: Family, active: bool, keep: str, tmp_path
) -> None:
    """Also by an inactive adapter, whose method may own a weight that the base does not hold then."""
    model, adapter = adapted(family, trial)
    on = run(family, model)
    if not active:
        pc.activate(model, [])
    adapter.merge(tmp_path / "originals" if keep == "directory" else keep)
    assert relative(run(family, model), on) <= 1e-4
    fresh = family.build()
    try:
        adapter.save(tmp_path / "adapter")
    except pc.AdapterError as error:
        assert trial.can.owns_base_weight and keep == "none" and "not kept" in str(error)
    else:
        pc.load(fresh, tmp_path / "adapter", trainable=True)
        assert same_bits(run(family, fresh), on)
    if keep == "none":
        with pytest.raises(pc.MergeError, match="not kept"):
            adapter.unmerge()
        return
    with adapter.disabled():
        assert same_bits(run(family, model), run(family, family.build()))
    adapter.unmerge()
    assert same_bits(run(family, model), on)
    adapter.detach()
    assert not [*tmp_path.glob("originals/*")]


def test_factors_reproduce_the_merged_weight(trial: Trial, family: Family) -> None:
    """ΔW = B·A exactly, for methods that have factors, and from 16-bit parameters too; an error of ours for the others."""
    model, adapter = adapted(family, trial)
    for site in adapter.plan.sites:
        tensors, binding = borrowed(adapter, site.path)
        if not trial.can.lowrank:
            with pytest.raises(pc.PeftCoreError):
                plugins.call(trial.method, "peft_lowrank", site=site, tensors=tensors, binding=binding)
            continue
        for dtype in (torch.float64, torch.bfloat16):
            given = {name: tensor.to(dtype) for name, tensor in tensors.items()}
            factors = plugins.call(trial.method, "peft_lowrank", site=site, tensors=given, binding=binding)
            rank = factors.A.shape[0]
            assert factors.A.shape == (rank, site.in_features) and factors.B.shape == (site.out_features, rank)
            weight = base_weight(model, site).double()
            tensors64 = {name: tensor.double() for name, tensor in given.items()}
            change = merged(trial, site, weight, tensors64, binding) - weight
            product = factors.B.double() @ factors.A.double()
            assert_near(product, change, 1e-6, f"B·A of '{site.path}' from {dtype}")
