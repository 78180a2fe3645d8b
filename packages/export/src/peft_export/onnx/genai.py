"""`genai_config.json`: what ONNX Runtime GenAI reads to generate with a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .graphs import MODEL, Graph

CONFIG = "genai_config.json"
_SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")


def genai_config(graph: Graph, config: Any, generation: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The configuration of a decoder with a cache, or why there is none.

    Args:
        config: the model's. generation: its `generation_config.json`, if it has one.
    """
    states = [tensor.shape for name, tensor in graph.inputs.items() if name.startswith("past_key_values.")]
    if len({(shape[1], shape[3]) for shape in states}) != 1:
        return {}, f"no {CONFIG}: ONNX Runtime GenAI wants keys and values of one size in all layers"
    text = config.get_text_config()
    # Some configurations lack what they do not use, instead of saying None.
    begin, end, pad = (
        generation.get(name, getattr(text, name, None)) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    )
    length = getattr(text, "max_position_embeddings", None)
    if end in (None, []) or length is None:
        lacking = "eos_token_id" if length is not None else "max_position_embeddings"
        return {}, f"no {CONFIG}: the model's configuration has no {lacking}"
    first = end if isinstance(end, int) else end[0]
    names = {name: name for name in graph.inputs if not name.startswith("past_key_values.")}
    return {
        "model": {
            "type": "decoder",  # any decoder with these inputs, whatever the architecture
            "bos_token_id": first if begin is None else begin,
            "eos_token_id": end,
            "pad_token_id": first if pad is None else pad,
            "vocab_size": text.vocab_size,
            "context_length": length,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": f"{MODEL}.onnx",
                "head_size": states[0][3],
                "hidden_size": text.hidden_size,
                "num_attention_heads": text.num_attention_heads,
                "num_hidden_layers": len(states) // 2,
                "num_key_value_heads": states[0][1],
                "inputs": {
                    **names,
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "max_length": length,
            # The graph joins the past and the new tokens itself; a shared buffer is for operators that do not.
            "past_present_share_buffer": False,
            **{name: generation[name] for name in _SAMPLING if generation.get(name) is not None},
        },
    }, ""
