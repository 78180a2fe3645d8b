"""What authors of methods rely on: tensors that sites share and nobody trains, values that start from the base weight,
methods that are not additive; and their mistakes, told in one line.
"""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file
from torch import Tensor, nn

import peft_core as pc
import peft_export
from peft_core import plugins
from peft_core.testing.checks import randomise, relative, run, same_bits
from peft_core.testing.families import FAMILIES

LLAMA = FAMILIES["llama"]


# Tensors that sites share and nobody trains


@pytest.fixture
def vera(vera_method: None) -> pc.AdapterSpec:
    return pc.AdapterSpec(method="vera", options={"r": 12})


def pairs(adapter: pc.Adapter) -> dict[str, Tensor]:
    """The fixed tensors as the model holds them."""
    held = dict(adapter.model.named_buffers())
    return {name.partition("/pair/")[2]: tensor for name, tensor in held.items() if "/pair/" in name}


def test_one_tensor_for_all_members(vera: pc.AdapterSpec, tmp_path: Path) -> None:
    model = LLAMA.build()
    adapter = randomise(pc.attach(model, vera, seed=3))
    types = {site.type for site in adapter.plan.sites}
    assert len(adapter.plan.sites) > len(types)
    assert set(pairs(adapter)) == {f"{kind}/{name}" for kind in types for name in "AB"}
    bytes_of = sum(tensor.nbytes for tensor in pairs(adapter).values())
    assert adapter.plan.fixed_bytes == bytes_of == adapter.plan.to_json()["fixed_bytes"]
    assert "never trained" in str(adapter.plan)
    adapter.save(tmp_path)
    stored = load_file(tmp_path / "adapter.safetensors")
    assert sum(tensor.nbytes for tensor in stored.values()) == bytes_of + adapter.plan.trainable_bytes


def test_it_follows_the_adapter(vera: pc.AdapterSpec, tmp_path: Path) -> None:
    """Into a file and back, into another adapter of the same layout, into copies."""
    model = LLAMA.build()
    adapter = randomise(pc.attach(model, vera, seed=3))
    adapter.save(tmp_path)
    output = run(LLAMA, model)
    loaded = pc.load(LLAMA.build(), tmp_path)
    assert same_bits(run(LLAMA, loaded.model), output)
    assert all(same_bits(tensor, pairs(adapter)[name]) for name, tensor in pairs(loaded).items())
    other = pc.attach(LLAMA.build(), vera, seed=4)
    assert not any(same_bits(tensor, pairs(adapter)[name]) for name, tensor in pairs(other).items())
    other.restore(tmp_path)
    assert same_bits(run(LLAMA, other.model), output)
    twin = pc.adapters(copy.deepcopy(model))["default"]
    assert same_bits(run(LLAMA, twin.model), output)
    assert not {t.data_ptr() for t in pairs(twin).values()} & {t.data_ptr() for t in pairs(adapter).values()}
    adapter.detach()
    assert not any("pair" in name for name, _ in model.named_buffers())


def test_merging_files_gives_what_merging_in_memory_gives(vera: pc.AdapterSpec, tmp_path: Path) -> None:
    model = LLAMA.build()
    model.save_pretrained(tmp_path / "base")
    adapter = randomise(pc.attach(model, vera))
    adapter.save(tmp_path / "adapter")
    peft_export.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    adapter.merge_and_detach().save_pretrained(tmp_path / "expected")
    expected = load_file(tmp_path / "expected" / "model.safetensors")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(same_bits(found[key], expected[key]) for key in expected)


def test_sites_on_two_devices_share_nothing(vera: pc.AdapterSpec, refused: Any) -> None:
    model = LLAMA.build()
    for number, layer in enumerate(model.model.layers):
        offloaded(layer.self_attn.q_proj, f"cuda:{number % 2}")
    with refused(pc.AdapterError, "layers.0.self_attn.q_proj", "cuda:0", "cuda:1", "vera", "one device"):
        pc.attach(model, pc.AdapterSpec(method="vera", targets=["q_proj"]))
    assert not pc.adapters(model)


def test_fixed_tensors_of_another_shape_are_refused(
    vera: pc.AdapterSpec, monkeypatch: pytest.MonkeyPatch, refused: Any, tmp_path: Path
) -> None:
    import peft_method_vera

    pc.attach(LLAMA.build(), vera).save(tmp_path)
    pair = peft_method_vera._pair

    def wider(name: str, sites: Any) -> pc.SharingGroup:
        made = pair(name, sites)
        return dataclasses.replace(made, fixed={**made.fixed, "A": pc.TensorSpec((99, sites[0].in_features))})

    monkeypatch.setattr(peft_method_vera, "_pair", wider)
    with refused(pc.CheckpointError, "pair.", ".A'", "has another layout", "vera"):
        pc.load(LLAMA.build(), tmp_path)


def offloaded(layer: nn.Module, device: str) -> None:
    """As Accelerate's hooks leave a layer that they load for each forward: its weights are elsewhere."""
    layer.weight = nn.Parameter(layer.weight.to("meta"), requires_grad=False)
    layer._hf_hook = SimpleNamespace(execution_device=device)


# Methods that depend on the base weight


@pytest.fixture
def dora(dora_method: None) -> pc.AdapterSpec:
    return pc.AdapterSpec(method="dora", options={"r": 3})


def test_a_start_from_the_base_weight_needs_the_weight(dora: pc.AdapterSpec, refused: Any) -> None:
    with torch.device("meta"):
        pc.attach(LLAMA.build_meta(), dora).detach()  # shapes only: nothing is computed
    model = LLAMA.build()
    offloaded(model.model.layers[0].self_attn.q_proj, "cpu")
    with refused(pc.AdapterError, "q_proj", "offloaded", "dora"):
        pc.attach(model, dora)
    assert not pc.adapters(model)


def test_a_start_from_a_weight_that_is_quantized_and_merged_into(dora: pc.AdapterSpec, lora_method: None) -> None:
    import bitsandbytes

    torch.manual_seed(0)
    model = nn.Sequential(bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4").to("cpu"))
    randomise(pc.attach(model, pc.AdapterSpec(method="lora", targets=["0"]), name="first"), std=0.5).merge()
    x = torch.randn(4, 64)
    before = model(x)
    pc.attach(model, pc.AdapterSpec(method="dora", targets=["0"]), name="second")
    assert relative(model(x), before) < 1e-6, "attaching changed the output"


def test_unmerging_beside_an_adapter_that_stands_alone(dora: pc.AdapterSpec, lora_method: None, refused: Any) -> None:
    model = LLAMA.build()
    first = randomise(pc.attach(model, pc.AdapterSpec(method="lora"), name="first"))
    first.merge()
    second = randomise(pc.attach(model, dora, name="second"))
    output = run(LLAMA, model)
    with refused(pc.AdapterError, "'first'", "'second'", "detach"):
        first.unmerge()
    assert first.merged and same_bits(run(LLAMA, model), output), "the refusal changed something"
    second.detach()
    first.unmerge()
    assert first.active and not first.merged


def test_what_is_not_additive_merges_at_its_scale(dora: pc.AdapterSpec) -> None:
    model = LLAMA.build()
    adapter = randomise(pc.attach(model, dora))
    base = run(LLAMA, LLAMA.build())
    pc.activate(model, {"default": 0.5})
    half = run(LLAMA, model)
    adapter.merge()
    assert relative(run(LLAMA, model), half, half - base) < 1e-4
    adapter.unmerge()
    assert same_bits(run(LLAMA, model), half)


# Authors' mistakes


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")


def naive(x: Tensor, tensors: pc.Tensors, binding: pc.Tensors) -> Tensor:
    return pc.lowrank.naive(x, tensors["A"], tensors["B"], 1.0)


def add_(x: Tensor, y: Tensor, tensors: pc.Tensors, binding: pc.Tensors) -> Any:
    return x, pc.lowrank.add_(x, y, tensors["A"], tensors["B"], 1.0)


def grad_(dy: Tensor, dx: Tensor | None, saved: Any, tensors: pc.Tensors, binding: pc.Tensors) -> Any:
    dA, dB = pc.lowrank.grad_(dy, dx, *saved, tensors["A"], tensors["B"], 1.0)
    return {"A": dA, "B": dB}


class Plugin:
    """LoRA; one part of it can be another."""

    def __init__(self, **parts: Any) -> None:
        self.parts = parts

    @pc.hookimpl
    def peft_method(self) -> pc.MethodInfo:
        return pc.MethodInfo(name="mine", options=self.parts.get("options", Options))

    @pc.hookimpl
    def peft_init(self, sites: Any) -> pc.Layout:
        groups = tuple(pc.SharingGroup.private(site, self.tensors(site)) for site in sites)
        return pc.Layout(self.parts.get("groups", lambda groups: groups)(groups), self.parts.get("bindings", {}))

    def tensors(self, site: pc.Site) -> Mapping[str, Any]:
        made = {"A": pc.TensorSpec((2, site.in_features), pc.Normal(0.1)), "B": pc.TensorSpec((site.out_features, 2))}
        return {**made, **self.parts.get("tensors", {})}

    @pc.hookimpl
    def peft_forward(self, site: pc.Site) -> pc.Forward:
        return pc.Forward(*self.parts.get("forward", (naive, add_, grad_)))

    @pc.hookimpl
    def peft_merge(self, site: pc.Site, weight: Tensor, tensors: pc.Tensors, binding: pc.Tensors) -> Tensor:
        return pc.lowrank.merged(weight, tensors["A"], tensors["B"], 1.0)


@pytest.fixture
def unregistered() -> Iterator[None]:
    yield
    plugins.unregister("mine")


class Loose(BaseModel):
    pass


class Demanding(BaseModel):
    model_config = ConfigDict(extra="forbid")
    r: int


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (Loose, ("'mine'", "misspelt", "extra='forbid'")),
        (Demanding, ("'mine'", "'r'", "default")),
        (dict, ("'mine'", "pydantic")),
        (Options(), ("'mine'", "a class")),
    ],
)
def test_options_that_cannot_be_checked(options: Any, words: tuple[str, ...], refused: Any) -> None:
    with refused(pc.PluginError, *words):
        plugins.register(Plugin(options=options), "mine")
    assert "mine" not in pc.methods()


class Wrong(pc.Initializer):
    """Draws another shape."""

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.zeros(3)


@pytest.mark.parametrize(
    ("parts", "error", "words"),
    [
        ({"groups": list}, pc.PlanError, ("'mine'", "tuple of groups")),
        ({"tensors": {"A": torch.zeros(2)}}, pc.PlanError, ("A'", "TensorSpec")),
        ({"tensors": {"A": pc.TensorSpec(4)}}, pc.PlanError, ("A'", "tuple of positive integers", "4")),
        ({"tensors": {"A": pc.TensorSpec((0, 4))}}, pc.PlanError, ("A'", "positive")),
        ({"tensors": {"A": pc.TensorSpec((4,), torch.zeros)}}, pc.PlanError, ("A'", "Initializer")),
        ({"tensors": {"A": pc.TensorSpec((4,), pc.Zeros)}}, pc.PlanError, ("A'", "Initializer")),
        ({"tensors": {"A": pc.TensorSpec((4,), dtype=torch.int64)}}, pc.PlanError, ("A'", "an integer dtype", "fixed")),
        ({"tensors": {"base_weight": pc.TensorSpec((4,))}}, pc.PlanError, ("base_weight",)),
        ({"bindings": {"nowhere": {"index": pc.TensorSpec((4,))}}}, pc.PlanError, ("'nowhere'", "not a site")),
        ({"tensors": {"C": pc.TensorSpec((4,), Wrong())}}, pc.PluginError, ("Wrong", "[3]", "[4]")),
        (
            {"tensors": {"C": pc.TensorSpec((4,), pc.FromWeight("nowhere", torch.sum))}},
            pc.PlanError,
            ("'nowhere'", "not a site"),
        ),
        ({"forward": (None,)}, pc.PluginError, ("naive", "function")),
        ({"forward": (naive, add_)}, pc.PluginError, ("add_", "grad_")),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_layout_or_forward_that_cannot_work(
    parts: dict[str, Any], error: type[pc.PeftCoreError], words: tuple[str, ...], refused: Any, unregistered: None
) -> None:
    plugins.register(Plugin(**parts), "mine")
    model = FAMILIES["odd"].build()
    before = io.StringIO()
    print(model, file=before)
    with refused(error, *words):
        pc.attach(model, pc.AdapterSpec(method="mine"))
    after = io.StringIO()
    print(model, file=after)
    assert after.getvalue() == before.getvalue() and not pc.adapters(model)


@pytest.mark.parametrize(
    ("forward", "words"),
    [
        ((naive, lambda *given: None, grad_), ("'0.up'", "'mine'", "add_", "tuple")),
        ((naive, add_, lambda *given: None), ("'mine'", "grad_", "'A'", "none")),
        ((naive, add_, lambda *given: {"A": grad_(*given)["A"]}), ("'mine'", "grad_", "'B'", "none")),
        ((naive, add_, lambda *given: {**grad_(*given), "B": None}), ("'mine'", "grad_", "'B'", "none")),
        ((naive, add_, lambda *given: {**grad_(*given), "A": torch.zeros(3)}), ("'mine'", "grad_", "'A'", "[3]")),
    ],
)
def test_a_pair_that_breaks_its_contract(
    forward: Any, words: tuple[str, ...], refused: Any, unregistered: None
) -> None:
    plugins.register(Plugin(forward=forward), "mine")
    family = FAMILIES["odd"]
    model = family.build()
    randomise(pc.attach(model, pc.AdapterSpec(method="mine")))
    with refused(pc.PluginError, *words):
        family.forward(model, family.inputs()).sum().backward()
