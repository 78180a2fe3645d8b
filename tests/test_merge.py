"""Where the originals wait while an adapter is merged, and what is refused."""

import copy

import pytest
import torch

import peft_core as pc
from peft_core import AdapterSpec
from peft_core.testing.checks import Snapshot, randomise, relative, run, same_bits
from peft_core.testing.families import FAMILIES
from peft_core.testing.methods import Sound

ODD = FAMILIES["odd"]


@pytest.fixture
def adapter(blocks, spec) -> pc.Adapter:
    return randomise(pc.attach(blocks, spec))


def test_originals_in_a_directory(blocks, adapter, tmp_path) -> None:
    before, on = Snapshot.of(blocks), run(ODD, blocks)
    adapter.merge(keep=tmp_path / "kept")
    assert len(list((tmp_path / "kept").iterdir())) == 4
    adapter.unmerge()
    before.assert_restored(blocks)
    assert same_bits(run(ODD, blocks), on)


@pytest.mark.parametrize("keep", ["host", "none"])
@pytest.mark.parametrize("value, why", [(100.0, "too large for float16"), (float("nan"), "infinite values or NaN")])
def test_a_weight_that_would_be_no_number_is_not_written(spec, keep, value, why, refused) -> None:
    model = ODD.build(dtype=torch.float16)
    adapter = randomise(pc.attach(model, spec))
    with torch.no_grad():
        for parameter in list(adapter.parameters())[-2:]:  # of the last type of layer: others are merged by then
            parameter.fill_(value)
    before = Snapshot.of(model)
    with refused(pc.MergeError, ".down'", why, "leave the adapter unmerged"):
        adapter.merge(keep)
    before.assert_restored(model)
    assert adapter.active and not adapter.merged


@pytest.mark.parametrize("keep", ["hots", "nnone", "", "memory", " none", None, True])
def test_a_misspelt_place_is_no_directory(blocks, spec, keep, refused, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    words = (f"keep={str(keep)!r}", "'host'", "'none'", "'./originals'")
    with refused(pc.MergeError, *words):
        pc.attach(blocks, spec, keep=keep)
    assert not pc.adapters(blocks)
    adapter = pc.attach(blocks, spec)
    with refused(pc.MergeError, *words):
        adapter.merge(keep)
    assert not adapter.merged and not any(tmp_path.iterdir())
    adapter.merge("./originals")
    assert len([*tmp_path.glob("originals/*")]) == 4
    monkeypatch.chdir("/")
    adapter.unmerge()


def test_one_place_serves_several_models_and_copies(blocks, adapter, spec, tmp_path) -> None:
    other = ODD.build()
    second = randomise(pc.attach(other, spec))
    on = run(ODD, blocks)
    adapter.merge(tmp_path)
    second.merge(tmp_path)
    copied = copy.deepcopy(blocks)
    adapter.unmerge()
    assert same_bits(run(ODD, blocks), on)
    for handle, model in ((pc.adapters(copied)["default"], copied), (second, other)):
        handle.unmerge()
        assert same_bits(run(ODD, model), on)
    assert not any(tmp_path.iterdir())


def test_originals_that_are_gone(blocks, adapter, tmp_path, refused) -> None:
    adapter.merge(tmp_path)
    merged = run(ODD, blocks)
    file = sorted(tmp_path.iterdir())[-1]
    held = file.read_bytes()
    for damage in (file.unlink, lambda: file.write_bytes(held[:-8])):
        damage()
        with refused(pc.MergeError, file.name, "cannot be read"):
            adapter.unmerge()
        assert adapter.merged and same_bits(run(ODD, blocks), merged)
    file.write_bytes(held)
    adapter.unmerge()


def test_a_place_that_cannot_be_written(blocks, adapter, tmp_path, refused) -> None:
    before = Snapshot.of(blocks)
    (tmp_path / "file").touch()
    with refused(pc.MergeError, "file", "directory"):
        adapter.merge(tmp_path / "file")
    with refused(pc.MergeError, "cannot be written"):
        adapter.merge(tmp_path / "file" / "below")
    before.assert_restored(blocks)


def test_a_disk_that_fills_up_on_the_way(blocks, tmp_path, monkeypatch, refused) -> None:
    import safetensors.torch

    spec = AdapterSpec(method="sound", options={"r": 4}, targets=["up"], train_modules=["down"])
    adapter = randomise(pc.attach(blocks, spec))
    before, on = Snapshot.of(blocks), run(ODD, blocks)
    save, left = safetensors.torch.save_file, [3]  # of four

    def save_file(*arguments, **named) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        save(*arguments, **named)

    monkeypatch.setattr(safetensors.torch, "save_file", save_file)
    with refused(pc.MergeError, "cannot be written", "No space"):
        adapter.merge(tmp_path / "originals")
    before.assert_restored(blocks)
    assert adapter.active and not adapter.merged and same_bits(run(ODD, blocks), on)


def test_originals_not_kept(blocks, adapter, refused) -> None:
    adapter.merge(keep="none")
    merged = run(ODD, blocks)
    for undo in (adapter.unmerge, lambda: adapter.disabled().__enter__()):
        with refused(pc.MergeError, "'0.up'", "not kept"):
            undo()
        assert same_bits(run(ODD, blocks), merged), "a refused undo has changed the model"


def test_merging_twice_and_unmerging_what_is_not_merged(adapter, refused) -> None:
    with refused(pc.AdapterError, "'default'", "not merged"):
        adapter.unmerge()
    adapter.merge()
    with refused(pc.AdapterError, "'default'", "merged already"):
        adapter.merge()
    with refused(pc.AdapterError, "'default'", "merged", "unmerge"):
        adapter.detach()


def test_activating_a_merged_adapter(blocks, adapter, refused) -> None:
    adapter.merge()
    with refused(pc.AdapterError, "'default'", "merged"):
        pc.activate(blocks, "default")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({"default": float("nan")}, ["'default'", "finite number", "nan"]),
        ({"default": float("inf")}, ["'default'", "finite number"]),
        ({"default": "x"}, ["'default'", "finite number", "'x'"]),
        ({"default": None}, ["'default'", "finite number"]),
        (7, ["a name, several, or a map", "7"]),
        (None, ["a name, several, or a map"]),
        (["default", "default"], ["'default' is named twice"]),
        ([3], ["3 is not an adapter's name"]),
    ],
)
def test_what_cannot_be_activated(blocks, adapter, refused, names, words) -> None:
    with refused(pc.AdapterError, *words):
        pc.activate(blocks, names)
    assert adapter.active


def test_unknown_adapter(blocks, adapter, refused) -> None:
    with refused(pc.AdapterError, "'defalt'", "did you mean 'default'?"):
        pc.activate(blocks, "defalt")


def test_detached_handle(adapter, refused) -> None:
    adapter.detach()
    for use in (adapter.merge, adapter.detach, adapter.parameters, lambda: adapter.save("x")):
        with refused(pc.AdapterError, "'default'", "detached"):
            use()


def test_a_detached_handle_says_so_beside_a_new_adapter_of_its_name(blocks, spec, adapter) -> None:
    adapter.detach()
    again = pc.attach(blocks, spec)
    assert repr(adapter) == "Adapter('default', detached)"
    assert "active" in repr(again)


def test_merging_into_a_tied_weight_is_refused(gpt2, refused) -> None:
    adapter = pc.attach(gpt2, AdapterSpec(method="sound", targets=["lm_head"]))
    before = Snapshot.of(gpt2)
    with refused(pc.MergeError, "'lm_head.weight'", "wte.weight", "same tensor"):
        adapter.merge()
    before.assert_restored(gpt2)


def test_merging_a_trained_module_that_is_tied_is_refused_or_merges_both(gpt2, refused) -> None:
    spec = AdapterSpec(method="sound", train_modules=["lm_head"])
    adapter = randomise(pc.attach(gpt2, spec))
    with refused(pc.MergeError, "lm_head.weight", "wte.weight", "train_modules"):
        adapter.merge()
    adapter.detach()
    adapter = randomise(pc.attach(gpt2, AdapterSpec(method="sound", train_modules=["lm_head", "wte"])))
    gpt = FAMILIES["gpt2"]
    on = run(gpt, gpt2)
    adapter.merge()
    assert relative(run(gpt, gpt2), on) < 1e-4
    assert gpt2.lm_head.weight is gpt2.transformer.wte.weight


def test_trained_modules_that_are_tied_come_off_to_the_bit(gpt2) -> None:
    """One parameter under two names: of two adapters that name them in either order, each is taken out of it once."""
    before, bare = Snapshot.of(gpt2), run(FAMILIES["gpt2"], gpt2)
    orders = (["lm_head", "wte"], ["wte", "lm_head"])
    adapters = [
        randomise(pc.attach(gpt2, AdapterSpec(method="sound", train_modules=modules), name=f"a{number}"), seed=number)
        for number, modules in enumerate(orders)
    ]
    for adapter in adapters:
        adapter.merge()
    with adapters[0].disabled(), adapters[1].disabled():
        assert same_bits(run(FAMILIES["gpt2"], gpt2), bare)
    for adapter in adapters:
        adapter.unmerge()
    for adapter in adapters:
        adapter.detach()
    before.assert_restored(gpt2)


def test_two_merged_adapters_come_off_in_any_order(blocks, spec) -> None:
    before = Snapshot.of(blocks)
    first = randomise(pc.attach(blocks, spec, name="first"), seed=1)
    second = randomise(pc.attach(blocks, spec, name="second"), seed=2)
    pc.activate(blocks, ["first", "second"])
    both = run(ODD, blocks)
    first.merge()
    second.merge()
    assert relative(run(ODD, blocks), both) < 1e-4
    first.unmerge()
    first.detach()
    pc.activate(blocks, [])
    second.unmerge()
    alone = run(ODD, blocks)
    second.detach()
    before.assert_restored(blocks)
    fresh = ODD.build()
    randomise(pc.attach(fresh, spec), seed=2)
    assert same_bits(run(ODD, fresh), alone)


def test_merging_at_a_run_time_scale(blocks, adapter) -> None:
    pc.activate(blocks, {"default": 0.5})
    before, on = Snapshot.of(blocks), run(ODD, blocks)
    adapter.merge()
    assert relative(run(ODD, blocks), on) < 1e-4
    adapter.unmerge()
    before.assert_restored(blocks)
    assert same_bits(run(ODD, blocks), on), "the scale is forgotten by merge and unmerge"


def test_failing_merge_changes_nothing(blocks, adapter, monkeypatch) -> None:
    from peft_core.testing.methods import Sound

    def fails(self, site, weight, tensors, binding):
        if site.path == "1.down":
            raise pc.MergeError("no")
        return weight + 1

    before = Snapshot.of(blocks)
    monkeypatch.setattr(Sound, "merge", fails)
    with pytest.raises(pc.MergeError):
        adapter.merge()
    before.assert_same_values(blocks)
    assert adapter.active and not adapter.merged


def test_disabled_restores_after_an_exception(blocks, adapter) -> None:
    on = run(ODD, blocks)
    with pytest.raises(ZeroDivisionError), adapter.disabled():
        raise ZeroDivisionError
    assert same_bits(run(ODD, blocks), on)


def test_what_happens_to_adapters_while_one_is_disabled_stays(blocks, adapter, spec) -> None:
    other = randomise(pc.attach(blocks, spec, name="other"))
    pc.activate(blocks, ["default", "other"])
    on = run(ODD, blocks)
    with adapter.disabled():
        other.merge()
    assert not other.active and relative(run(ODD, blocks), on) < 1e-5
    with adapter.disabled():
        adapter.merge()
    assert not adapter.active and relative(run(ODD, blocks), on) < 1e-5
    adapter.unmerge()
    with adapter.disabled():
        other.unmerge()
    assert adapter.active and other.active and relative(run(ODD, blocks), on) < 1e-5
    with adapter.disabled():
        other.detach()
    assert adapter.active and pc.adapters(blocks).keys() == {"default"}
    with adapter.disabled():
        adapter.detach()
    assert not pc.adapters(blocks)


def test_a_merged_adapter_that_is_disabled_is_not_merged_for_good(adapter, refused) -> None:
    adapter.merge()
    with adapter.disabled(), refused(pc.AdapterError, "'default'", "disabled()"):
        adapter.merge_and_detach()
    assert adapter.merged


@pytest.mark.parametrize("merged", [False, True])
def test_merging_beside_an_adapter_that_lost_a_layer_changes_nothing(blocks, spec, refused, merged: bool) -> None:
    one, other = (
        randomise(pc.attach(blocks, spec.model_copy(update={"targets": rf"{place}\..*"}), name=f"block-{place}"))
        for place in (0, 1)
    )
    if merged:
        one.merge()
    pc.activate(blocks, [adapter.name for adapter in (one, other) if not adapter.merged])
    path = next(iter(other.bank.sites))
    blocks.set_submodule(path, torch.nn.Linear(7, 7))
    before = {name: value.clone() for name, value in blocks.state_dict().items()}
    with refused(pc.AdapterError, path, "replaced"):
        one.unmerge() if merged else one.merge()
    assert one.merged == merged and one.active == (not merged) and other.active
    assert all(same_bits(value, before[name]) for name, value in blocks.state_dict().items())


def test_failing_attach_leaves_no_trace(blocks, monkeypatch) -> None:
    from peft_core.testing.methods import Sound

    def fails(self, site):
        if site.path == "1.down":
            raise RuntimeError("no")
        return Sound.forward(self, site)

    before = Snapshot.of(blocks)

    class Failing(Sound):
        name = "failing"
        forward = fails

    from peft_core import plugins

    plugins.register(Failing(), "failing")
    try:
        with pytest.raises(RuntimeError, match="no"):
            pc.attach(blocks, AdapterSpec(method="failing"))
    finally:
        plugins.unregister("failing")
    before.assert_restored(blocks)
    assert pc.adapters(blocks) == {}


def test_input_of_another_width_is_named(blocks, adapter) -> None:
    with pytest.raises((pc.AdapterError, RuntimeError), match="63"):
        blocks(torch.randn(2, 62))


def test_what_was_merged_for_good_stays_beneath_what_can_be_undone(blocks, spec, refused, monkeypatch) -> None:
    first, second = (randomise(pc.attach(blocks, spec, name=name, seed=n)) for n, name in enumerate("ab"))
    first.merge(keep="none")
    beneath = Snapshot.of(blocks)
    second.merge()
    with refused(pc.MergeError, "'0.up'", "not kept"):
        first.unmerge()
    second.unmerge()
    beneath.assert_same_values(blocks)
    assert first.merged and not second.merged

    merge, calls = Sound.merge, []

    def fails_at_the_second(self, site, *arguments):
        calls.append(site.path)
        if len(calls) > 1:
            raise RuntimeError("no")
        return merge(self, site, *arguments)

    monkeypatch.setattr(Sound, "merge", fails_at_the_second)
    with pytest.raises(RuntimeError, match="no"):
        second.merge()
    beneath.assert_same_values(blocks)
    assert first.merged and not second.merged


def test_disabling_one_of_several_merged_adapters_restores_every_bit(blocks, spec) -> None:
    adapters = [randomise(pc.attach(blocks, spec, name=name, seed=n)) for n, name in enumerate("abc")]
    before = Snapshot.of(blocks)
    for adapter in adapters:
        adapter.merge()
    merged, on = Snapshot.of(blocks), run(ODD, blocks)
    for adapter in adapters:
        with adapter.disabled():
            assert not same_bits(run(ODD, blocks), on)
            with adapter.disabled():
                assert not same_bits(run(ODD, blocks), on)
        merged.assert_same_values(blocks)
    for adapter in adapters:
        with adapter.disabled():
            adapter.unmerge()
    before.assert_same_values(blocks)
