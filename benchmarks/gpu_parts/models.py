"""Models of published sizes with random weights, and what trains on them: the floor, our methods, the field's library."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from gpu_parts.bench import Bench
from shapes import LLAMA_1_3B, LLAMA_3_1_8B, LLAMA_3_2_3B
from torch import Tensor, nn

import peft_core as pc

TYPES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
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


@dataclass
class Run:
    """One model that takes training steps."""

    model: nn.Module
    parameters: list[nn.Parameter] = field(default_factory=list)
    optimizer: torch.optim.Optimizer | None = None
    compiled: Any = None
    kernels: str = "auto"

    def backward(self, ids: Tensor) -> None:
        """Forward, loss and backward. Gradients flow to the embedded inputs, through every layer, in every run alike."""
        embedded = self.model.get_input_embeddings()(ids)  # type: ignore[operator]
        if not embedded.requires_grad:
            embedded.requires_grad_()
        called: Any = self.model if self.compiled is None else self.compiled
        with pc.kernels(self.kernels):
            called(inputs_embeds=embedded, labels=ids, use_cache=False).loss.backward()

    def step(self, ids: Tensor) -> None:
        """A whole training step."""
        self.backward(ids)
        if self.optimizer is not None:
            self.optimizer.step()
        self.forget()

    def forget(self) -> None:
        """No gradients are left."""
        for parameter in self.model.parameters():
            parameter.grad = None


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


def copy_of(base: nn.Module) -> nn.Module:
    """A model of its own on the same weights."""
    shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    return copy.deepcopy(base, shared)


def ours(base: nn.Module, method: str, r: int, kernels: str = "auto", **more: Any) -> Run:
    """A run of one of our methods. `more`: of the spec."""
    spec = pc.AdapterSpec(method=method, targets=TYPES, options={"r": r, **METHODS[method].get(r, {})}, **more)
    model = copy.deepcopy(base) if spec.capabilities.owns_base_weight else copy_of(base)
    adapter = pc.attach(model, spec, keep="none")
    adapter.total_steps = 1000
    make = spec.info.optimizer
    parameters = list(adapter.parameters())
    optimizer = make(parameters, lr=1e-4) if make else torch.optim.AdamW(parameters, lr=1e-4)
    return Run(model, parameters, optimizer, kernels=kernels)


def theirs(base: nn.Module, kind: str, r: int, wide: bool = True) -> Run:
    """A run of the PEFT library. `wide`: with float32 parameters, its default, through which all that they meet is cast."""
    import peft

    settings = {"lora_alpha": r} if kind == "LoraConfig" else {}
    config = getattr(peft, kind)(r=r, target_modules=TYPES, **settings)
    model = peft.get_peft_model(copy_of(base), config, autocast_adapter_dtype=wide).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Run(model, parameters, torch.optim.AdamW(parameters, lr=1e-4))


def tokens(model: nn.Module, rows: int, length: int, bench: Bench) -> Tensor:
    """Random token ids."""
    return torch.randint(0, model.config.vocab_size, (rows, length), device=bench.device)  # type: ignore[union-attr]
