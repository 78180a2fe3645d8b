"""Models of published sizes with random weights, and our methods on them."""

from __future__ import annotations

from typing import Any

import torch
from gpu_parts.bench import Bench
from runs import TYPES, Run, ours
from shapes import LLAMA_1_3B, LLAMA_3_1_8B, LLAMA_3_2_3B
from torch import Tensor, nn

import peft_core as pc

# Options beside r, by r: what MoS composes from must suffice for its rank.
METHODS: dict[str, dict[int, dict[str, Any]]] = {
    "miss": {},
    "sharelora": {},
    "mos": {64: {"equivalent_rank": 4}},
    "switchlora": {},
}

SHAPES: dict[str, dict[str, Any]] = {
    "8B": LLAMA_3_1_8B,
    "3B": LLAMA_3_2_3B,
    "1.3B": LLAMA_1_3B,
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
    },
}


def base_model(name: str, device: torch.device) -> nn.Module:
    """Random weights in bf16, frozen, in training mode."""
    from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig

    # torch's attention without transformers' masks, which wait for the device in every step to see whether sequences are packed.
    AttentionInterface.register("causal_sdpa", AttentionInterface()["sdpa"])
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[name], max_position_embeddings=8192)
    with device:
        model: nn.Module = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="causal_sdpa"
        )
    return model.to(device).requires_grad_(False).train()


def with_method(base: nn.Module, method: str, r: int, kernels: str = "auto", **more: Any) -> Run:
    """A run of one of our methods. `more`: of the spec."""
    spec = pc.AdapterSpec(method=method, targets=TYPES, options={"r": r, **METHODS[method].get(r, {})}, **more)
    return ours(base, spec, kernels)


def tokens(model: nn.Module, rows: int, length: int, bench: Bench) -> Tensor:
    """Random token ids."""
    return torch.randint(0, model.config.vocab_size, (rows, length), device=bench.device)  # type: ignore[union-attr]
