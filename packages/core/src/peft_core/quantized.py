"""Quantized models as wholes: made trainable while they carry adapters, and described anew when layers have become dense."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import bases

# Where this is true of a 4-bit layer, its forward in evaluation mode on a CPU packs the weight for a kernel without a backward.
_PACKS = "support_avx512bf16_for_cpu"


def make_trainable(model: nn.Module) -> list[str]:
    """Let gradients pass through a model's quantized layers, and its quantizer say so.

    bitsandbytes packs a 4-bit weight when it evaluates on a CPU, and leaves it packed: from then on gradients through any such
    layer, adapted or not, would be wrong without a word. So it does not pack while there are adapters.

    Returns:
        The paths of the layers that would pack, for `restore`.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        kind: Any = type(quantizer)
        quantizer.__class__ = _trainable(kind)
    packing = {path: module for path, module in model.named_modules() if getattr(module, _PACKS, False)}
    for module in packing.values():
        bases.unpack(module)
        setattr(module, _PACKS, False)
    return list(packing)


def restore(model: nn.Module, packing: Iterable[str]) -> None:
    """Undo `make_trainable`, where layers have not been replaced by dense ones, or taken away."""
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.__class__ = type(quantizer).__bases__[0]
    packed = set(packing)
    for path, module in model.named_modules():
        if path in packed and hasattr(module, _PACKS):
            setattr(module, _PACKS, True)


def make_dense(model: Any, weights: Mapping[str, Tensor]) -> None:
    """Replace quantized layers by what stood there before they were quantized, with these weights (path → out × in), and note it
    on the model and in its configuration, so that what it saves can be loaded.
    """
    for path, weight in weights.items():
        parent, _, child = path.rpartition(".")
        packed: Any = model.get_submodule(path)
        with torch.device("meta"):
            if transposed := getattr(packed, "source_cls", nn.Linear).__name__ == "Conv1D":
                plain = packed.source_cls(packed.out_features, packed.in_features)
            else:
                plain = nn.Linear(packed.in_features, packed.out_features, bias=packed.bias is not None)
        plain.weight = nn.Parameter(weight.T.contiguous() if transposed else weight, requires_grad=False)
        if packed.bias is not None:  # bitsandbytes computes with it, and keeps it, in another dtype
            plain.bias = nn.Parameter(packed.bias.to(weight.dtype), requires_grad=False)
        setattr(model.get_submodule(parent), child, plain.train(packed.training))
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return
    if any(map(bases.is_quantized, model.modules())):
        settings = copy.deepcopy(quantizer.quantization_config)  # several models may have been loaded with it
        settings.llm_int8_skip_modules = sorted({*quantizer.modules_to_not_convert, *weights})
        quantizer.modules_to_not_convert = settings.llm_int8_skip_modules
        quantizer.quantization_config = model.config.quantization_config = settings
        return
    from transformers import PreTrainedModel

    for name in ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        model.__dict__.pop(name, None)
    for part in [module for module in model.modules() if isinstance(module, PreTrainedModel)]:
        for name in ("quantization_config", "_is_quantized"):
            part.config.__dict__.pop(name, None)


@functools.cache
def _trainable(kind: Any) -> Any:
    """The subclass of a quantizer's class that tells transformers' Trainer that the model can be trained.

    The Trainer refuses a quantized model that neither carries Hugging Face PEFT's mark nor has such a quantizer. The mark would
    make the model's `load_adapter`, its checkpointing and some models' forward look for PEFT's adapters; `is_qat_trainable` is
    read nowhere else.
    """
    namespace = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__reduce__": lambda self: (_new_trainable, (kind,), self.__dict__),
        "is_qat_trainable": True,
    }
    return type(kind.__name__, (kind,), namespace)


def _new_trainable(kind: Any) -> Any:
    cls = _trainable(kind)
    return cls.__new__(cls)
