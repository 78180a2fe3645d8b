"""bitsandbytes bases: adapters train beside packed weights, with every trainer; merging puts a dense layer in their place."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import dispatch_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoTokenizer,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import peft_core as pc
from peft_core.bases import dense_weight
from peft_core.testing.checks import assert_near, randomise

pytestmark = pytest.mark.usefixtures("quiet")

IDS = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(0))
CONFIGS = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16),
    "nested": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}
OPTIONS = {
    name: info.trials[0]
    for name, info in pc.methods().items()
    if not info.can(info.options(**info.trials[0])).exclusive
}


@pytest.fixture(scope="session")
def directory(llama_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    # bitsandbytes' CPU kernels want multiples of 64, the methods' trial options multiples of 3.
    config = LlamaConfig(
        vocab_size=60, hidden_size=192, intermediate_size=384, num_hidden_layers=2, num_attention_heads=3
    )
    path = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    AutoTokenizer.from_pretrained(llama_directory).save_pretrained(path)
    return path


@pytest.fixture(params=CONFIGS)
def quantized(request: pytest.FixtureRequest, directory: Path) -> nn.Module:
    model = LlamaForCausalLM.from_pretrained(
        directory, quantization_config=CONFIGS[request.param], dtype=torch.bfloat16
    )
    # In evaluation mode, and without adapters, bitsandbytes computes with another kernel on some CPUs.
    return model.train()


def loss_falls(trainer: Trainer) -> bool:
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return sum(losses[-2:]) < sum(losses[:2])


def spec(**changed: Any) -> pc.AdapterSpec:
    method = next(iter(OPTIONS))
    return pc.AdapterSpec(method=method, options=dict(OPTIONS[method]), **changed)


def drawn(adapter: pc.Adapter) -> pc.Adapter:
    """The adapter with other values than those that it begins with."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.05, generator=generator)
    return adapter


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("method", OPTIONS)
def test_a_quantized_base_trains_merges_and_comes_back(method: str, quantized: nn.Module) -> None:
    base = logits(quantized)
    adapter = pc.attach(quantized, pc.AdapterSpec(method=method, options=dict(OPTIONS[method])))
    assert torch.equal(logits(quantized), base)
    drawn(adapter)
    quantized(IDS).logits.float().square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in adapter.parameters())
    adapted = logits(quantized)
    effect = distance(adapted, base)
    assert effect > 0.1

    adapter.merge()
    assert distance(logits(quantized), adapted) < 0.1 * effect
    twin = copy.deepcopy(quantized)
    adapter.unmerge()
    assert torch.equal(logits(quantized), adapted)
    with adapter.disabled():
        assert torch.equal(logits(quantized), base)

    merged = logits(twin)
    pc.adapters(twin)["default"].merge_and_detach()
    assert torch.equal(logits(twin), merged)
    assert type(twin.model.layers[0].self_attn.q_proj) is nn.Linear
    adapter.detach()
    assert torch.equal(logits(quantized), base)


def test_layers_that_accelerate_has_hooked_are_merged_into(quantized: nn.Module) -> None:
    dispatch_model(quantized, {"": "cpu"}, force_hooks=True)
    base = logits(quantized)
    adapter, other = (pc.attach(quantized, spec(), name=name) for name in ("default", "other"))
    for seed, one in enumerate((adapter, other)):
        randomise(one, seed)
    pc.activate(quantized, {"default": 1.0, "other": 1.0})
    adapted = logits(quantized)
    effect = distance(adapted, base)
    assert effect > 0.1
    for one in (adapter, other):  # one of them merged, the other beside it; then both
        one.merge()
        assert distance(logits(quantized), adapted) < 0.1 * effect
    for one in (adapter, other):
        one.unmerge()
    assert torch.equal(logits(quantized), adapted)
    adapter.merge_and_detach()
    assert distance(logits(quantized), adapted) < 0.1 * effect


def test_another_adapter_stays_on_a_layer_that_one_is_merged_into_for_good(quantized: nn.Module) -> None:
    names = enumerate(("first", "second"))
    first, second = (randomise(pc.attach(quantized, spec(targets=["q_proj"]), name=name), seed) for seed, name in names)
    first.merge()
    both = logits(quantized)
    with second.disabled():
        merged = logits(quantized)
    first.merge_and_detach()
    assert_near(logits(quantized), both, 1e-6, "both")
    second.detach()
    assert torch.equal(logits(quantized), merged)
    assert {type(quantized.get_submodule(site.path)) for site in second.plan.sites} == {nn.Linear}


def test_an_adapter_goes_from_a_model_that_has_lost_layers(quantized: nn.Module) -> None:
    adapter = pc.attach(quantized, spec())
    layers: Any = quantized.model.layers  # type: ignore[union-attr]
    del layers[-1]
    adapter.detach()
    assert not pc.adapters(quantized)


def test_one_of_two_merged_adapters_is_settled_for_good(quantized: nn.Module) -> None:
    first, second = (pc.attach(quantized, spec(targets=["q_proj"]), name=name) for name in ("first", "second"))
    for adapter in (first, second):
        adapter.merge()
    merged = logits(quantized)
    first.merge_and_detach()
    assert torch.equal(logits(quantized), merged)
    with pytest.raises(pc.MergeError, match="not kept"):
        second.unmerge()
    second.merge_and_detach()
    assert torch.equal(logits(quantized), merged) and not pc.adapters(quantized)


def gradients(model: nn.Module, adapter: pc.Adapter) -> list[torch.Tensor]:
    model.train()(IDS).logits.float().square().mean().backward()
    found = [parameter.grad.clone() for parameter in adapter.parameters() if parameter.grad is not None]
    model.zero_grad()
    return found


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]], ids=str)
def test_evaluation_changes_neither_gradients_nor_what_is_merged(targets: Any, quantized: nn.Module) -> None:
    base = logits(copy.deepcopy(quantized).eval())
    adapter = drawn(pc.attach(quantized, spec(targets=targets)))
    before = gradients(quantized, adapter)
    twin = copy.deepcopy(quantized)
    pc.adapters(twin)["default"].merge_and_detach()

    adapted = logits(quantized.eval())
    assert all(map(torch.equal, gradients(quantized, adapter), before))
    adapter.merge()
    assert torch.equal(logits(quantized), logits(twin.train()))
    adapter.unmerge()
    assert torch.equal(logits(quantized.eval()), adapted)
    adapter.detach()
    assert torch.equal(logits(quantized), base)


def test_gradients_are_right_after_the_base_was_evaluated(quantized: nn.Module) -> None:
    never = copy.deepcopy(quantized)
    base = logits(quantized.eval())  # packs 4-bit weights, on some CPUs, with rounded scales
    adapter, expected = (drawn(pc.attach(model, spec())) for model in (quantized, never))
    for found, right in zip(gradients(quantized, adapter), gradients(never, expected), strict=True):
        assert distance(found, right) < 0.1
    for layer, other in zip(quantized.modules(), never.modules(), strict=True):
        if isinstance(layer, nn.Linear):
            assert distance(dense_weight(layer), dense_weight(other)) < 0.01
    adapter.detach()
    assert torch.equal(logits(quantized.eval()), base)


# Training


@pytest.mark.parametrize("kind", ["Trainer", "AdapterTrainer", "SFTTrainer"])
def test_every_trainer_trains_on_a_quantized_base(kind: str, quantized: nn.Module, tmp_path: Path) -> None:
    import datasets
    import trl

    cls: Any = {
        "Trainer": Trainer,
        "AdapterTrainer": pc.AdapterTrainer,
        "SFTTrainer": type("SFT", (pc.AdapterTrainerMixin, trl.SFTTrainer), {}),
    }[kind]
    model = copy.deepcopy(quantized)
    generator = torch.Generator().manual_seed(1)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 60, (8, 9), generator=generator).tolist()]

    def trained(model: nn.Module, resume: str | None = None) -> Trainer:
        pc.attach(model, spec())
        given: dict[str, Any] = dict(max_steps=6, save_steps=3, learning_rate=1e-2, logging_steps=1, eval_steps=2)
        given |= dict(eval_strategy="steps", use_cpu=True, report_to="none", disable_tqdm=True, log_level="error")
        if kind == "SFTTrainer":
            settings = trl.SFTConfig(str(tmp_path), bf16=False, activation_checkpointing=False, **given)
        else:
            settings = TrainingArguments(str(tmp_path), **given)
        data = datasets.Dataset.from_list(rows)
        trainer: Trainer = cls(model=model, args=settings, train_dataset=data, eval_dataset=data)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    assert loss_falls(trained(quantized))
    expected = dict(pc.adapters(quantized)["default"].named_parameters())
    saved = load_file(tmp_path / "checkpoint-6" / "adapter.safetensors")
    for key, parameter in expected.items():
        assert parameter.dtype == torch.float32
        assert torch.equal(saved[key], parameter)
    if kind != "Trainer":
        trained(model, resume=str(tmp_path / "checkpoint-3"))
        for key, parameter in pc.adapters(model)["default"].named_parameters():
            assert torch.equal(parameter, expected[key])


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_command_line_trains_and_resumes_on_a_quantized_base(
    kind: str, directory: Path, program: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    LlamaForCausalLM.from_pretrained(directory, quantization_config=CONFIGS[kind]).save_pretrained(base)
    AutoTokenizer.from_pretrained(directory).save_pretrained(base)
    rows = [{"prompt": f"w{n} w{n + 1}", "completion": f" w{20 + n % 3} w30"} for n in range(24)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("whole", "broken"):
        config = {
            "model": str(base),
            "data": {"train": "data.jsonl", "hold_out": 0.25},
            "adapter": spec().model_dump(include={"method", "options"}),
            "training": {"steps": 6, "batch_size": 4, "lr": 0.01, "save_every": 3, "evaluate_every": 2},
            "output_dir": name,
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
    assert program("train", tmp_path / "whole.yaml").status == 0
    step = pc.AdapterTrainer.training_step
    losses = []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        losses.append(step(*args, **kwargs))
        if len(losses) == 5:
            raise KeyboardInterrupt
        return losses[-1]

    monkeypatch.setattr(pc.AdapterTrainer, "training_step", interrupted)
    assert program("train", tmp_path / "broken.yaml").status == 130
    monkeypatch.undo()
    assert program("train", tmp_path / "broken.yaml", "--resume").status == 0
    whole, broken = (tmp_path / name / "adapter.safetensors" for name in ("whole", "broken"))
    assert whole.read_bytes() == broken.read_bytes()
    figures = json.loads((tmp_path / "whole" / "metrics.json").read_text())["evaluations"]
    assert figures[-1]["loss"] < figures[0]["loss"]


# Saving what has been merged


def reloaded(model: Any, path: Path) -> Any:
    model.save_pretrained(path)
    return type(model).from_pretrained(path).train()


def test_a_merged_model_is_saved_and_loaded_as_a_plain_one(quantized: Any, tmp_path: Path) -> None:
    merged: Any = drawn(pc.attach(quantized, spec())).merge_and_detach()
    loaded = reloaded(merged, tmp_path)
    assert torch.equal(logits(loaded), logits(merged))
    assert not hasattr(loaded.config, "quantization_config") and type(loaded.model.layers[0].mlp.up_proj) is nn.Linear
    assert merged.to(torch.float32).dtype == torch.float32  # which transformers refuses for a quantized model


def test_a_partly_merged_model_is_saved_and_loaded_as_it_is(quantized: Any, tmp_path: Path) -> None:
    asked = copy.deepcopy(CONFIGS)
    first = drawn(pc.attach(quantized, spec(targets=["q_proj"]), name="first"))
    second = drawn(pc.attach(quantized, spec(targets=["up_proj"]), name="second"))
    before = quantized.config.to_dict()
    second.merge()
    second.unmerge()
    assert quantized.config.to_dict() == before
    for adapter in (first, second):
        adapter.merge_and_detach()
    logits(quantized.eval())
    loaded = reloaded(quantized.train(), tmp_path)
    assert torch.equal(logits(loaded), logits(quantized))
    layer = loaded.model.layers[1]
    assert type(layer.self_attn.q_proj) is type(layer.mlp.up_proj) is nn.Linear is not type(layer.mlp.down_proj)
    for name, config in CONFIGS.items():
        assert config.to_dict() == asked[name].to_dict()  # other models are loaded with it
    trained = pc.attach(loaded, spec(targets=["q_proj", "down_proj"]))
    assert all(gradient.isfinite().all() for gradient in gradients(loaded, trained))


@pytest.mark.parametrize("targets", ["all-linear", ["c_proj"]], ids=str)
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_layer_that_was_a_conv1d_becomes_one_again(kind: str, targets: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=60, n_positions=32, n_embd=192, n_layer=2, n_head=3)).save_pretrained(
        tmp_path / "base"
    )
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "base", quantization_config=CONFIGS[kind]).eval()
    merged = drawn(pc.attach(model, spec(targets=targets))).merge_and_detach()
    loaded = reloaded(merged, tmp_path / "merged")
    assert distance(logits(loaded.eval()), logits(merged)) < 0.01
    assert type(merged.transformer.h[0].mlp.c_proj).__name__ == "Conv1D"
