"""A site: one base layer to adapt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Site:
    """One base layer to adapt: y = W x, with W [out_features, in_features].

    Attributes:
        path: module path. type: its last component (`q_proj`). layer: the first number in the path, if any.
        transposed: the base stores its weight in × out. dtype: the base weight's.
        options: the method's options that hold here (the spec's, with its overrides applied).
    """

    path: str
    in_features: int
    out_features: int
    transposed: bool
    dtype: torch.dtype
    options: Any = None

    @property
    def type(self) -> str:
        """Last component of the path."""
        return module_type(self.path)

    @property
    def layer(self) -> int | None:
        """First number in the path: the layer's index."""
        return layer_index(self.path)


def options_key(options: Any) -> str:
    """Equal where all of a method's options are, those too that it leaves out of what it prints."""
    return "" if options is None else str(options.model_dump_json())


def module_type(path: str) -> str:
    """Last component of a module path: `q_proj`."""
    return path.rpartition(".")[2]


def count_types(paths: Iterable[str]) -> list[str]:
    """`q_proj (32)` for every module type, in order of appearance."""
    return [f"{name} ({count})" for name, count in Counter(map(module_type, paths)).items()]


def layer_index(path: str) -> int | None:
    """The first component of a module path that is a number."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)
