"""A saved adapter comes back exactly, from a small directory of tensors."""

import json

import pytest
import torch

import peft_core as pc

from .checks import Trial, adapted, assert_near, borrowed, gradients, randomise, run, same_bits, weighted
from .families import Family

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
# Of a safetensors file: the length, and per tensor its name, dtype, shape and offsets in JSON.
HEADER_BYTES, HEADER_BYTES_PER_TENSOR = 256, 192


@DTYPES
def test_loading_into_a_fresh_model_is_exact(trial: Trial, family: Family, dtype: torch.dtype, tmp_path) -> None:
    # A seed of its own: whoever draws anything again at loading draws something else.
    model, adapter = adapted(family, trial, dtype, seed=4321)
    adapter.save(tmp_path / "adapter")
    fresh = family.build(dtype=dtype)
    loaded = pc.load(fresh, tmp_path / "adapter", trainable=True)
    for (key, one), (other, two) in zip(adapter.named_parameters(), loaded.named_parameters(), strict=True):
        assert key == other and same_bits(one, two), f"'{key}' came back as something else"
    for site in adapter.plan.sites:
        was, now = borrowed(adapter, site.path)[1], borrowed(loaded, site.path)[1]
        assert was.keys() == now.keys()
        assert all(same_bits(was[name], now[name]) for name in was), (
            f"binding of '{site.path}' came back as something else"
        )
    assert same_bits(run(family, fresh), run(family, model)), "the loaded adapter computes something else"
    assert loaded.plan == adapter.plan


def test_loading_depends_on_no_random_state(trial: Trial, family: Family, tmp_path) -> None:
    model, adapter = adapted(family, trial, seed=4321)
    adapter.save(tmp_path / "adapter")
    outputs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        fresh = family.build()
        pc.load(fresh, tmp_path / "adapter", name=f"loaded{seed}", trainable=True)
        outputs.append(run(family, fresh))
    assert same_bits(outputs[0], outputs[1])
    assert same_bits(outputs[0], run(family, model))


def test_loaded_adapter_is_frozen_unless_asked(trial: Trial, family: Family, tmp_path) -> None:
    model, adapter = adapted(family, trial)
    adapter.save(tmp_path / "adapter")
    plain = family.build()
    frozen = pc.load(plain, tmp_path / "adapter")
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    # Not to the bit: torch may multiply in another order where nothing needs a gradient.
    assert_near(run(family, plain), run(family, model), 1e-5, "output of the frozen adapter")
    fresh = family.build()
    trainable = pc.load(fresh, tmp_path / "adapter", trainable=True)
    found = gradients(trainable, weighted(family.forward(fresh, family.inputs())))
    expected = gradients(adapter, weighted(family.forward(model, family.inputs())))
    for key in expected:
        assert same_bits(found[key], expected[key]), f"gradient of '{key}' differs after loading"


def test_saving_again_replaces_the_adapter(trial: Trial, family: Family, tmp_path) -> None:
    model, adapter = adapted(family, trial)
    adapter.save(tmp_path / "adapter")
    randomise(adapter, seed=7)
    adapter.save(tmp_path / "adapter")
    fresh = family.build()
    pc.load(fresh, tmp_path / "adapter", trainable=True)
    assert same_bits(run(family, fresh), run(family, model))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"], "something temporary was left"


def test_saved_again_after_loading_is_the_same_file(trial: Trial, family: Family, tmp_path) -> None:
    _, adapter = adapted(family, trial, seed=5)
    adapter.save(tmp_path / "one")
    pc.load(family.build(), tmp_path / "one", trainable=True).save(tmp_path / "two")
    files = {path.name for path in (tmp_path / "one").iterdir()}
    assert {path.name for path in (tmp_path / "two").iterdir()} == files
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_file_holds_each_tensor_once(trial: Trial, family: Family, tmp_path) -> None:
    model, adapter = adapted(family, trial)
    adapter.save(tmp_path / "adapter")
    held = list(adapter.parameters())
    for site in adapter.plan.sites:
        held += borrowed(adapter, site.path)[1].values()  # type: ignore[arg-type]
        if trial.can.owns_base_weight:
            held.append(model.get_parameter(f"{site.path}.weight"))
    unique = sum(tensor.numel() * tensor.element_size() for tensor in held)
    if trial.can.owns_base_weight:  # a master copy may be wider than the base
        unique *= 2
    allowed = 1.01 * unique + HEADER_BYTES + HEADER_BYTES_PER_TENSOR * len(held)
    size = (tmp_path / "adapter" / "adapter.safetensors").stat().st_size
    assert size <= allowed, f"{size} bytes for {unique} bytes of tensors"


def test_directory_is_plain(trial: Trial, family: Family, tmp_path) -> None:
    _, adapter = adapted(family, trial)
    adapter.save(tmp_path / "adapter")
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    needed = {"adapter.json", "adapter.safetensors", "README.md"}
    assert needed <= names <= {*needed, "state.safetensors"}
    header = json.loads((tmp_path / "adapter" / "adapter.json").read_text())
    assert header["spec"]["method"] == trial.method
    assert trial.method in (tmp_path / "adapter" / "README.md").read_text()
