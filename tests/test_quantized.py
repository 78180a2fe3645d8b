"""bitsandbytes bases: adapters train beside packed weights, and merging puts a dense layer in their place."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import peft_core as pc
from peft_core.testing.checks import assert_near, randomise

IDS = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(0))
CONFIGS = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}
OPTIONS = {
    name: info.trials[0]
    for name, info in pc.methods().items()
    if not info.can(info.options(**info.trials[0])).exclusive
}


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    # bitsandbytes' CPU kernels want multiples of 64, the methods' trial options multiples of 3.
    config = LlamaConfig(
        vocab_size=60, hidden_size=192, intermediate_size=384, num_hidden_layers=2, num_attention_heads=3
    )
    path = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(params=CONFIGS)
def quantized(request: pytest.FixtureRequest, directory: Path) -> nn.Module:
    model = LlamaForCausalLM.from_pretrained(
        directory, quantization_config=CONFIGS[request.param], dtype=torch.bfloat16
    )
    # In evaluation mode bitsandbytes repacks 4-bit weights for its CPU kernel, which has no backward.
    return model.train()


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
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.05, generator=generator)
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


def test_another_adapter_stays_on_a_layer_that_one_is_merged_into_for_good(quantized: nn.Module) -> None:
    method = next(iter(OPTIONS))
    spec = pc.AdapterSpec(method=method, options=dict(OPTIONS[method]), targets=["q_proj"])
    first, second = (
        randomise(pc.attach(quantized, spec, name=name), seed) for seed, name in enumerate(("first", "second"))
    )
    first.merge()
    both = logits(quantized)
    with second.disabled():
        merged = logits(quantized)
    first.merge_and_detach()
    assert_near(logits(quantized), both, 1e-6, "both")
    second.detach()
    assert torch.equal(logits(quantized), merged)
    assert {type(quantized.get_submodule(site.path)) for site in second.plan.sites} == {nn.Linear}


def test_one_of_two_merged_adapters_is_settled_for_good(quantized: nn.Module) -> None:
    method = next(iter(OPTIONS))
    spec = pc.AdapterSpec(method=method, options=dict(OPTIONS[method]), targets=["q_proj"])
    first, second = (pc.attach(quantized, spec, name=name) for name in ("first", "second"))
    for adapter in (first, second):
        adapter.merge()
    merged = logits(quantized)
    first.merge_and_detach()
    assert torch.equal(logits(quantized), merged)
    with pytest.raises(pc.MergeError, match="not kept"):
        second.unmerge()
    second.merge_and_detach()
    assert torch.equal(logits(quantized), merged) and not pc.adapters(quantized)
