"""The base model: its structure without weights, and what is recorded of it to recognize it later."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import bases
from .errors import ModelError, first_line
from .loading import MISCONFIGURED


@dataclass(frozen=True)
class BaseInfo:
    """What is recorded of a base model: enough to recognize it later, and to name the first difference.

    Attributes:
        name: as recorded by the spec or the model's configuration. model_type, architecture: as transformers has them.
        num_parameters: of the base, embeddings and heads included, shared ones once.
        shapes: layer or parameter path → logical shape. fingerprint: a hash of them.
        quantization: in what its layers were packed, as "4-bit (nf4)"; nothing for a dense base.
        classes: names of a classifier's classes, by number; nothing where they have none of their own.
        pad_token_id: by which a classifier finds a text's last token.
    """

    name: str
    architecture: str
    model_type: str
    num_parameters: int
    shapes: Mapping[str, tuple[int, ...]]
    quantization: str = ""
    classes: tuple[str, ...] = ()
    pad_token_id: int | None = None

    @property
    def fingerprint(self) -> str:
        """Hash of all paths and shapes."""
        return hashlib.sha256(json.dumps(self.shapes, sort_keys=True).encode()).hexdigest()[:32]


def is_hub_id(name: str) -> bool:
    """Whether this can be the name of a model on a hub: `owner/name`, and nothing on this disk."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None and not Path(name).exists()


def meta_model(source: str | Path) -> nn.Module:
    """The model that a checkpoint directory, or a name on a hub, describes, on the meta device: shapes without weights.

    Raises:
        ModelError: there is no configuration, or it names a class that transformers does not have.
    """
    import transformers

    if not (Path(source) / "config.json").is_file() and not is_hub_id(str(source)):
        raise ModelError(
            f"'{source}' is neither a checkpoint directory (it has no config.json) nor a name on a hub ('owner/name')"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(source)
    except MISCONFIGURED as error:
        raise ModelError(
            f"'{source}': config.json cannot be read: {first_line(error).partition('. ')[0][:200]}"
        ) from None
    architecture = (config.architectures or [None])[0]
    cls = getattr(transformers, architecture or "", None)
    if cls is None:
        raise ModelError(f"'{source}': config.json names the architecture '{architecture}', which transformers lacks")
    with torch.device("meta"):
        model: nn.Module = cls._from_config(config, dtype=getattr(config, "dtype", None) or torch.float32)
    return model


def base_info(model: nn.Module, name: str | None = None) -> BaseInfo:
    """What to record of a base model. What adapters have registered on it is not part of it."""
    shapes: dict[str, tuple[int, ...]] = {}
    sizes: dict[int, int] = {}  # of each parameter once, by id
    packed: set[str] = set()
    for path, module in model.named_modules():
        if bases.is_quantized(module):
            packed.add(bases.packing(module))
        base = bases.describe(module)
        if base:  # by its sizes: the weight may be transposed, or packed
            shapes[path] = (base.out_features, base.in_features)
        for local, parameter in bases.own_parameters(module):
            if base and local == "weight":
                sizes.setdefault(id(parameter), base.in_features * base.out_features)
            else:
                sizes.setdefault(id(parameter), parameter.numel())
                shapes[f"{path}.{local}" if path else local] = tuple(parameter.shape)
    config: Any = getattr(model, "config", None)
    classifies = config is not None and "Classification" in type(model).__name__
    return BaseInfo(
        name=name or getattr(config, "_name_or_path", "") or "",
        architecture=type(model).__name__,
        model_type=getattr(config, "model_type", ""),
        num_parameters=sum(sizes.values()),
        shapes=shapes,
        quantization=", ".join(sorted(packed)),
        classes=_classes(config) if classifies else (),
        pad_token_id=getattr(config.get_text_config(), "pad_token_id", None) if classifies else None,
    )


def _classes(config: Any) -> tuple[str, ...]:
    """Names of the classes, unless transformers has made them up."""
    names = getattr(config, "id2label", None) or {}
    found = tuple(str(names[number]) for number in sorted(names))
    return () if found == tuple(f"LABEL_{number}" for number in range(len(found))) else found
