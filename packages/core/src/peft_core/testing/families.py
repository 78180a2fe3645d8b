"""Tiny random models, one per family of architectures, for the conformance suite and a method's own tests.

What a method's `trials` may count on: every layer to adapt has in and out sizes that are multiples of 3 (and
not all of anything larger) and at least 24, and every module type occurs at least twice.
"""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 60
HIDDEN = 48
INNER = 72
LAYERS = 2
HEADS = 4
BATCH, LENGTH = 2, 7


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        name: of the family. make: a new model with whatever weights.
        draw: its keyword arguments from a generator; floating-point ones are cast to the model's dtype.
        output: what of the model's answer is compared. train_modules: trained in full beside the adapter.
    """

    name: str
    make: Callable[[], nn.Module]
    draw: Callable[[torch.Generator], dict[str, Tensor]]
    output: Callable[[Any], Tensor] = lambda answer: answer.logits
    train_modules: tuple[str, ...] = ()

    def build(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A new model in evaluation mode: the same weights for the same seed, rounded to `dtype`."""
        return copy.deepcopy(_built(self.name, seed, dtype))

    def build_meta(self) -> nn.Module:
        """The model's shapes, on the meta device."""
        with torch.device("meta"):
            return self.make().eval()

    def inputs(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Keyword arguments of the model."""
        drawn = self.draw(torch.Generator().manual_seed(seed))
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in drawn.items()}

    def forward(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """The model's output tensor for what `inputs` gave."""
        return self.output(model(**inputs))


@functools.cache
def _built(name: str, seed: int, dtype: torch.dtype) -> nn.Module:
    family = FAMILIES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = family.make()
        # transformers' weights start so small that hardly anything but the residual stream would be tested.
        with torch.no_grad():
            for module in model.modules():
                weight = getattr(module, "weight", None)
                if isinstance(weight, nn.Parameter) and weight.dim() == 2:
                    weight.normal_(0.0, 0.12)
                    bias = getattr(module, "bias", None)
                    if isinstance(bias, nn.Parameter):
                        bias.normal_(0.0, 0.05)
    # One frozen parameter: whoever restores the flags must not simply set them all.
    next(model.parameters()).requires_grad_(False)
    return model.to(dtype).eval()


class OddBlocks(nn.Sequential):
    """Two blocks of 63 → 60 → 63: sizes that no kernel's block divides, under an nn.Sequential as root."""

    def __init__(self) -> None:
        def block() -> nn.Module:
            return nn.Sequential(OrderedDict(up=nn.Linear(63, 60), act=nn.Tanh(), down=nn.Linear(60, 63, bias=False)))

        super().__init__(block(), block())


class Experts(nn.Module):
    """A mixture of Linear experts. Tokens are routed by id, so that rounding cannot send one elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, HEADS * 6)
        self.experts = nn.ModuleList(
            nn.Sequential(OrderedDict(up=nn.Linear(HIDDEN, INNER), act=nn.SiLU(), down=nn.Linear(INNER, HIDDEN)))
            for _ in range(4)
        )

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        flat, chosen = x.reshape(-1, HIDDEN), ids.reshape(-1) % len(self.experts)
        gates = self.router(flat).sigmoid()
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            mine = (chosen == number).nonzero().squeeze(1)  # some experts get no token
            out = out.index_add(0, mine, expert(flat[mine]) * gates[mine, number, None])
        return x + out.view_as(x)


class MixtureModel(nn.Module):
    """Embedding, two mixture-of-experts layers, an output head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(Experts() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, input_ids)
        return self.norm(x)


def _tokens(generator: torch.Generator) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=generator)}


def _even_tokens(generator: torch.Generator) -> dict[str, Tensor]:
    # Of the four experts, only the first three see tokens.
    return {
        "input_ids": torch.randint(0, VOCABULARY // 4, (BATCH, LENGTH), generator=generator) * 4
        + torch.arange(LENGTH) % 3
    }


def _padded_tokens(generator: torch.Generator) -> dict[str, Tensor]:
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[0, LENGTH - 2 :] = 0
    return {**_tokens(generator), "attention_mask": mask}


def _two_sided_tokens(generator: torch.Generator) -> dict[str, Tensor]:
    decoder = torch.randint(3, VOCABULARY, (BATCH, 5), generator=generator)
    return {**_tokens(generator), "decoder_input_ids": decoder}


def _image(generator: torch.Generator) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(BATCH, 3, 16, 16, generator=generator)}


def _speech(generator: torch.Generator) -> dict[str, Tensor]:
    decoder = torch.randint(3, VOCABULARY, (BATCH, 5), generator=generator)
    return {"input_features": torch.randn(BATCH, 12, 20, generator=generator), "decoder_input_ids": decoder}


def _vectors(generator: torch.Generator) -> dict[str, Tensor]:
    return {"input": torch.randn(BATCH, LENGTH, 63, generator=generator)}


def _transformer(model: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    """A maker of `transformers.<model>` with `transformers.<config>`."""

    def make() -> nn.Module:
        import transformers

        made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**settings))
        return made

    return make


_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS // 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ENCODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 32,
    "num_labels": 3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

_ALL = (
    Family("odd", OddBlocks, _vectors, output=lambda answer: answer),
    Family("llama", _transformer("LlamaForCausalLM", "LlamaConfig", **_DECODER), _tokens),
    Family(
        "gpt2",
        _transformer(
            "GPT2LMHeadModel",
            "GPT2Config",
            vocab_size=VOCABULARY,
            n_embd=HIDDEN,
            n_inner=INNER,
            n_layer=LAYERS,
            n_head=HEADS,
            n_positions=32,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
            **_IDS,
        ),
        _tokens,
    ),
    Family(
        "bert",
        _transformer("BertForSequenceClassification", "BertConfig", **_ENCODER),
        _padded_tokens,
        train_modules=("classifier",),
    ),
    Family("qwen3", _transformer("Qwen3ForCausalLM", "Qwen3Config", **_DECODER, head_dim=12), _tokens),
    Family(
        "gemma3",
        _transformer("Gemma3ForCausalLM", "Gemma3TextConfig", **_DECODER, head_dim=12, sliding_window=4),
        _tokens,
    ),
    Family("mistral", _transformer("MistralForCausalLM", "MistralConfig", **_DECODER, sliding_window=4), _tokens),
    Family("phi3", _transformer("Phi3ForCausalLM", "Phi3Config", **_DECODER), _tokens),
    Family(
        "gpt_neox",
        _transformer(
            "GPTNeoXForCausalLM",
            "GPTNeoXConfig",
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=INNER,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=32,
            **_IDS,
        ),
        _tokens,
    ),
    Family(
        "roberta",
        _transformer("RobertaForSequenceClassification", "RobertaConfig", **_ENCODER, **_IDS),
        _padded_tokens,
        train_modules=("classifier",),
    ),
    Family(
        "t5",
        _transformer(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=VOCABULARY,
            d_model=HIDDEN,
            d_kv=12,
            d_ff=INNER,
            num_layers=LAYERS,
            num_heads=HEADS,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        ),
        _two_sided_tokens,
    ),
    Family(
        "vit",
        _transformer(
            "ViTForImageClassification",
            "ViTConfig",
            **{name: _ENCODER[name] for name in _ENCODER if name not in ("vocab_size", "max_position_embeddings")},
            image_size=16,
            patch_size=8,
        ),
        _image,
        train_modules=("classifier",),
    ),
    Family(
        "whisper",
        _transformer(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            vocab_size=VOCABULARY,
            num_mel_bins=12,
            d_model=HIDDEN,
            encoder_layers=LAYERS,
            decoder_layers=LAYERS,
            encoder_attention_heads=HEADS,
            decoder_attention_heads=HEADS,
            encoder_ffn_dim=INNER,
            decoder_ffn_dim=INNER,
            max_source_positions=10,
            max_target_positions=16,
            dropout=0.0,
            decoder_start_token_id=1,
            suppress_tokens=None,
            begin_suppress_tokens=None,
            **_IDS,
        ),
        _speech,
    ),
    Family(
        "mamba",
        _transformer(
            "MambaForCausalLM",
            "MambaConfig",
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            state_size=6,
            num_hidden_layers=LAYERS,
            time_step_rank=6,
            **_IDS,
        ),
        _tokens,
    ),
    Family("moe", MixtureModel, _even_tokens, output=lambda answer: answer),
)
FAMILIES: Mapping[str, Family] = {family.name: family for family in _ALL}
"""Every family by name."""
CORE: tuple[str, ...] = ("odd", "llama", "gpt2", "bert")
"""The families on which every check of the suite runs; the others get one walk through an adapter's life."""
