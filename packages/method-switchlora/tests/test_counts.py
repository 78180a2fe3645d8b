"""The paper's count: what the gradients of a 1.3B model come to, at its rank, on the meta device."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import peft_core as pc

IN_FULL = ["embed_tokens", "input_layernorm", "post_attention_layernorm", "norm", "lm_head"]


def test_gradients_of_llama_1_3b_are_54_percent_smaller():
    """Attention and MLP at r = 512, embeddings, norms and head in full: 609.7 M of 1 339.5 M parameters."""
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5461, num_hidden_layers=24, num_attention_heads=32, vocab_size=32100
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    spec = pc.AdapterSpec(method="switchlora", options={"r": 512}, train_modules=IN_FULL)
    plan = pc.plan(model, spec)
    full = sum(parameter.numel() for parameter in model.parameters())
    layers = 24 * 512 * (4 * (2048 + 2048) + 3 * (2048 + 5461))
    kept = 2 * 32100 * 2048 + (2 * 24 + 1) * 2048
    assert plan.num_trainable == layers + kept == 609_720_320
    assert full == pytest.approx(1339.5e6, rel=1e-4)
    gradients = sum(tensor.nbytes(torch.float32) for group in plan.groups for tensor in group.tensors.values())
    assert gradients / (4 * full) - 1 == pytest.approx(-0.545, abs=0.001)
    candidates = 24 * (4 * 2 * 2048 * 2048 + 3 * 2048 * (2048 + 5461))
    assert plan.state_bytes == pytest.approx(4 * candidates, rel=1e-3)  # beside them, the books
