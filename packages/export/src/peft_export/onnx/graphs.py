"""What is traced: a model as modules with flat, named tensors in and out, caches taken apart into keys and values.

A model that generates has its cache as inputs `past_key_values.N.key/value` and outputs `present.N.key/value`, each
[batch, heads, length, head size]; any other has the inputs and outputs that it has. Encoder-decoders are two graphs: the
encoder also computes the keys and values that the decoder's cross-attention reads, once per text.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_core import ModelError

from ..running import check_text, run

Tensors = dict[str, Tensor]

MODEL, ENCODER, DECODER = "model", "encoder", "decoder"
# Sizes of the traced example: all different, and none of them 1, which would be taken for a constant.
_BATCH, _SEQUENCE, _PAST, _SOURCE = 2, 3, 4, 5
_TEXT = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class Graph:
    """One ONNX file to be.

    Attributes:
        name: of the file. module: maps a dict of tensors to a list of tensors. inputs: an example. outputs: their names.
        axes: input → {axis: name of its size}.
    """

    name: str
    module: nn.Module
    inputs: Tensors
    outputs: tuple[str, ...]
    axes: Mapping[str, Mapping[int, str]]


def graphs(model: nn.Module) -> list[Graph]:
    """The graphs of a transformers model: one, or an encoder and a decoder.

    Raises:
        ModelError: it takes no token ids, or keeps a state other than keys and values.
    """
    config: Any = model.config
    check_text(model, "only models of text are exported to ONNX")
    with torch.no_grad():
        if getattr(config, "is_encoder_decoder", False) and _generates(model):
            return _two_sided(model)
        return [_causal(model) if _generates(model) else _plain(model)]


class Causal(nn.Module):
    """A decoder with its cache: [logits, present.0.key, present.0.value, ...]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensors) -> list[Tensor]:
        cache = _cache(inputs, "past_key_values.{}.{}")
        rest = {name: tensor for name, tensor in inputs.items() if not name.startswith("past_key_values.")}
        answer = self.model(**rest, past_key_values=cache, use_cache=True)
        return [answer.logits, *_states(answer.past_key_values)]


class Plain(nn.Module):
    """An encoder or classifier: the named outputs."""

    def __init__(self, model: nn.Module, outputs: Sequence[str], settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.outputs, self.settings = tuple(outputs), dict(settings)

    def forward(self, inputs: Tensors) -> list[Tensor]:
        answer = self.model(**inputs, **self.settings)
        return [answer[name] for name in self.outputs]


class Encoder(nn.Module):
    """An encoder: its hidden states, and the keys and values that the decoder's cross-attention makes of them."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensors) -> list[Tensor]:
        from transformers import DynamicCache, EncoderDecoderCache

        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        encoder: Any = self.model.get_encoder()  # type: ignore[operator]
        hidden = encoder(input_ids=ids, attention_mask=mask)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        # One step of the decoder fills the cache; all else that it computes is unused, and leaves the graph.
        self.model(
            encoder_outputs=hidden,
            attention_mask=mask,
            decoder_input_ids=torch.zeros_like(ids[:, :1]),
            past_key_values=cache,
            use_cache=True,
        )
        return [hidden[0], *_states(cache.cross_attention_cache)]


class Decoder(nn.Module):
    """A decoder with both its caches: [logits, present.0.decoder.key, present.0.decoder.value, ...]."""

    def __init__(self, model: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.model, self.hidden_size = model, hidden_size

    def forward(self, inputs: Tensors) -> list[Tensor]:
        from transformers import EncoderDecoderCache
        from transformers.modeling_outputs import BaseModelOutput

        own, cross = (_cache(inputs, f"past_key_values.{{}}.{side}.{{}}") for side in ("decoder", "encoder"))
        cache = EncoderDecoderCache(own, cross)
        # Of the encoder's hidden states only the shape is read: cross-attention takes its keys and values from the cache.
        keys = cross.layers[0].keys
        hidden = keys.new_zeros(keys.shape[0], keys.shape[2], self.hidden_size)
        answer = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
            attention_mask=inputs["encoder_attention_mask"],
            decoder_input_ids=inputs["input_ids"],
            past_key_values=cache,
            use_cache=True,
        )
        return [answer.logits, *_states(cache.self_attention_cache)]


def _causal(model: nn.Module) -> Graph:
    from transformers import DynamicCache

    ids = _tokens(model, _BATCH, _SEQUENCE)
    cache = DynamicCache()
    _check_caches(model)
    _run(model, {"input_ids": ids, "past_key_values": cache, "use_cache": True}, "a cache of keys and values alone")
    past = _example(_checked(model, cache), "past_key_values.{}.{}", _PAST)
    mask = torch.ones(_BATCH, _PAST + _SEQUENCE, dtype=torch.long)
    inputs: Tensors = {"input_ids": ids, "attention_mask": mask}
    axes: dict[str, Mapping[int, str]] = {
        "input_ids": {0: "batch", 1: "sequence"},
        "attention_mask": {0: "batch", 1: "total"},
    }
    if _accepts(model, "position_ids"):
        inputs["position_ids"] = torch.arange(_PAST, _PAST + _SEQUENCE)[None].repeat(_BATCH, 1)
        axes["position_ids"] = axes["input_ids"]
    axes |= {key: {0: "batch", 2: "past"} for key in past}
    outputs = ("logits", *(name.replace("past_key_values", "present") for name in past))
    return Graph(MODEL, Causal(model), {**inputs, **past}, outputs, axes)


def _plain(model: nn.Module) -> Graph:
    types = getattr(model.config, "type_vocab_size", 0) > 1
    names = [name for name in _TEXT if _accepts(model, name) and (name != "token_type_ids" or types)]
    inputs = {name: torch.zeros(_BATCH, _SOURCE, dtype=torch.long) for name in names}
    inputs["input_ids"] = _tokens(model, _BATCH, _SOURCE)
    if "attention_mask" in inputs:
        inputs["attention_mask"] += 1
    settings = {"use_cache": False} if _accepts(model, "use_cache") else {}
    answer = _run(model, {**inputs, **settings}, "token ids alone")
    outputs = [name for name, value in answer.items() if isinstance(value, Tensor)]
    axes = {key: {0: "batch", 1: "sequence"} for key in names}
    return Graph(MODEL, Plain(model, outputs, settings), inputs, tuple(outputs), axes)


def _two_sided(model: nn.Module) -> list[Graph]:
    from transformers import DynamicCache, EncoderDecoderCache

    _check_caches(model)
    source = _tokens(model, _BATCH, _SOURCE)
    mask = torch.ones_like(source)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    ids = _tokens(model, _BATCH, _SEQUENCE)
    example = {"input_ids": source, "decoder_input_ids": ids, "past_key_values": cache, "use_cache": True}
    answer = _run(model, example, "a cache of keys and values alone")
    hidden_size = answer.encoder_last_hidden_state.shape[-1]
    own = _example(_checked(model, cache.self_attention_cache), "past_key_values.{}.decoder.{}", _PAST)
    cross = _example(_checked(model, cache.cross_attention_cache), "past_key_values.{}.encoder.{}", _SOURCE)
    encoder_axes = {key: {0: "batch", 1: "source"} for key in ("input_ids", "attention_mask")}
    encoder_outputs = ("last_hidden_state", *(name.replace("past_key_values", "present") for name in cross))
    decoder_axes = {
        "input_ids": {0: "batch", 1: "sequence"},
        "encoder_attention_mask": {0: "batch", 1: "source"},
        **{key: {0: "batch", 2: "past"} for key in own},
        **{key: {0: "batch", 2: "source"} for key in cross},
    }
    decoder_outputs = ("logits", *(name.replace("past_key_values", "present") for name in own))
    return [
        Graph(ENCODER, Encoder(model), {"input_ids": source, "attention_mask": mask}, encoder_outputs, encoder_axes),
        Graph(
            DECODER,
            Decoder(model, hidden_size),
            {"input_ids": ids, "encoder_attention_mask": mask, **own, **cross},
            decoder_outputs,
            decoder_axes,
        ),
    ]


def _cache(inputs: Tensors, pattern: str) -> Any:
    """A cache of these keys and values; one without windows, so that every length is the text's."""
    from transformers import DynamicCache

    cache = DynamicCache()
    layer = 0
    while (key := pattern.format(layer, "key")) in inputs:
        cache.update(inputs[key], inputs[pattern.format(layer, "value")], layer)
        layer += 1
    return cache


def _states(cache: Any) -> Iterator[Tensor]:
    for layer in cache.layers:
        yield from (layer.keys, layer.values)


def _example(cache: Any, pattern: str, length: int) -> Tensors:
    """Keys and values of the same heads, with another length."""
    drawn = torch.Generator().manual_seed(0)
    found: Tensors = {}
    for number, layer in enumerate(cache.layers):
        for name, state in (("key", layer.keys), ("value", layer.values)):
            shape = (state.shape[0], state.shape[1], length, state.shape[3])
            found[pattern.format(number, name)] = torch.randn(shape, generator=drawn).to(state.dtype)
    return found


def _checked(model: nn.Module, cache: Any) -> Any:
    """The cache, if it holds keys and values for every layer."""
    layers = getattr(cache, "layers", [])
    plain = all(isinstance(state, Tensor) and state.dim() == 4 for state in _states(cache)) if layers else False
    if not plain:
        raise ModelError(
            f"{type(model).__name__} keeps another state between tokens than keys and values; its ONNX export is not supported"
        )
    return cache


def _check_caches(model: nn.Module) -> None:
    if not _accepts(model, "past_key_values"):
        raise ModelError(
            f"{type(model).__name__} has no cache of keys and values (past_key_values); its ONNX export is not supported"
        )


def _run(model: nn.Module, inputs: Mapping[str, Any], kind: str) -> Any:
    return run(model, inputs, kind, "its ONNX export is not supported")


def _generates(model: nn.Module) -> bool:
    can = getattr(model, "can_generate", None)
    return bool(can is not None and can())


def _accepts(model: nn.Module, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


def _tokens(model: nn.Module, *shape: int) -> Tensor:
    config: Any = model.config
    size = getattr(config.get_text_config(), "vocab_size", 2)
    return torch.randint(0, size, shape, generator=torch.Generator().manual_seed(0))
