"""A plan's numbers, how it prints, and layouts that cannot work."""

import dataclasses
import json

import pytest
import torch
from torch import nn

import peft_core as pc
from peft_core import AdapterSpec, plugins
from peft_core.testing.methods import Sound


@pytest.fixture(scope="session")
def llama2_7b() -> nn.Module:
    """LLaMA-2-7B on the meta device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=4096,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


@pytest.mark.parametrize("rank, count", [(2, 4_997_120), (8, 19_988_480), (64, 159_907_840)])
def test_lora_parameters_of_llama_2_7b(llama2_7b, lora_method, rank, count) -> None:
    assert pc.plan(llama2_7b, AdapterSpec(method="lora", options={"r": rank})).num_trainable == count


@pytest.mark.parametrize("rank", [16, 32, 64, 128])
def test_miss_parameters_of_llama_2_7b(llama2_7b, rank) -> None:
    assert pc.plan(llama2_7b, AdapterSpec(method="miss", options={"r": rank})).num_trainable == rank * 42_496 * 32


def test_base_parameters_of_llama_2_7b(llama2_7b, spec) -> None:
    plan = pc.plan(llama2_7b, spec)
    assert plan.base.num_parameters == 6_738_415_616
    assert len(plan.sites) == 224


def test_shared_tensors_are_counted_once(blocks, spec) -> None:
    plan = pc.plan(blocks, spec)
    pools = 8 * (63 + 60)
    private = 2 * 4 * (60 + 63)
    assert plan.num_trainable == pools + private
    assert plan.trainable_bytes == 4 * plan.num_trainable
    assert pc.plan(blocks, AdapterSpec(method="sound", dtype="bfloat16")).trainable_bytes == 2 * plan.num_trainable


def test_trained_modules_are_counted(bert) -> None:
    without = pc.plan(bert, AdapterSpec(method="sound"))
    with_head = pc.plan(bert, AdapterSpec(method="sound", train_modules=["classifier"]))
    assert with_head.num_trainable - without.num_trainable == 3 * 48 + 3
    assert dict(with_head.trained) == {"classifier": {"weight": "classifier.weight", "bias": "classifier.bias"}}


def test_tied_trained_modules_stay_tied(gpt2) -> None:
    plan = pc.plan(gpt2, AdapterSpec(method="sound", train_modules=["wte", "lm_head"]))
    assert plan.num_trainable - pc.plan(gpt2, AdapterSpec(method="sound")).num_trainable == 60 * 48
    assert any("stay tied" in note for note in plan.notes)


def test_merging_costs_are_known(blocks, spec) -> None:
    plan = pc.plan(blocks, spec)
    assert plan.merge_bytes == 4 * 4 * 63 * 60
    assert plan.disable_bytes == 0


def test_table_says_it_all(llama) -> None:
    plan = pc.plan(llama, AdapterSpec(method="sound", targets=["q_proj", "down_proj"], train_modules=["lm_head"]))
    text = str(plan)
    for word in (
        "sound",
        "LlamaForCausalLM",
        "q_proj",
        "down_proj",
        "lm_head (in full)",
        "48×4",
        "8×48",
        "1 × 2",
        "merging keeps",
    ):
        assert word in text, f"'{word}' is not in:\n{text}"
    assert f"{plan.num_trainable:,}" in text
    assert max(map(len, text.splitlines())) <= 120


def test_figures_are_json(llama, spec) -> None:
    plan = pc.plan(llama, spec)
    figures = json.loads(json.dumps(plan.to_json()))
    assert figures["trainable_parameters"] == plan.num_trainable
    assert figures["sites"] == 14 and len(figures["groups"]) == len(plan.groups)


def test_plan_is_frozen(blocks, spec) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        pc.plan(blocks, spec).sites = ()


def test_plan_of_a_checkpoint_directory_needs_no_weights(llama, spec, tmp_path) -> None:
    llama.config.architectures = ["LlamaForCausalLM"]
    llama.config.save_pretrained(tmp_path)
    from_directory, from_model = pc.plan(tmp_path, spec), pc.plan(llama, spec)
    assert from_directory.sites == from_model.sites
    assert from_directory.groups == from_model.groups
    assert from_directory.base.fingerprint == from_model.base.fingerprint


@pytest.mark.parametrize(
    "content, words",
    [
        (None, ["config.json"]),
        ("{", ["config.json"]),
        ('{"model_type": "nothing"}', ["config.json"]),
        ('{"model_type": "llama", "architectures": ["Nothing"]}', ["Nothing"]),
        ('{"model_type": "llama"}', ["architecture"]),
    ],
)
def test_directory_that_is_no_model(content, words, spec, refused, tmp_path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with refused(pc.ModelError, *words):
        pc.plan(tmp_path, spec)


def test_rank_larger_than_the_layer(blocks, refused) -> None:
    with refused(pc.PlanError, "61", "'0.up'"):
        pc.plan(blocks, AdapterSpec(method="sound", options={"r": 61}))


def _group(path: str, *names: str, group: str = "") -> pc.SharingGroup:
    return pc.SharingGroup(group or path, (path,), {name: pc.TensorSpec((2, 2)) for name in names})


@pytest.mark.parametrize(
    "groups, words",
    [
        (lambda paths: [_group(path, "A") for path in paths[1:]], ["no tensor", "0.up"]),
        (lambda paths: [_group(path, "A", group="g") for path in paths], ["two groups named 'g'"]),
        (
            lambda paths: [*(_group(path, "A") for path in paths), _group("elsewhere", "A")],
            ["'elsewhere'", "not a site"],
        ),
        (
            lambda paths: [*(_group(path, "A") for path in paths), _group(paths[0], "A", group="g")],
            ["two tensors named 'A'"],
        ),
        (
            lambda paths: [*(_group(path, "A") for path in paths), _group(paths[0], group="g")],
            ["'g' has no tensors"],
        ),
        (lambda paths: None, ["peft_init"]),
        (lambda paths: 3, ["peft_init", "Layout"]),
    ],
)
def test_layouts_that_cannot_work_are_named(blocks, groups, words, refused) -> None:
    class Broken(Sound):
        name = "broken"

        @pc.hookimpl
        def peft_init(self, sites):
            made = groups([site.path for site in sites])
            return pc.Layout(tuple(made)) if isinstance(made, list) else made

    plugins.register(Broken(), "broken")
    try:
        with refused(pc.PeftCoreError, "'broken'", *words):
            pc.plan(blocks, AdapterSpec(method="broken"))
    finally:
        plugins.unregister("broken")
