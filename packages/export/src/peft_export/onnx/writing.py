"""Graphs as files: `NAME.onnx`, which hold the operators, and one file of weights that all of them read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

WEIGHTS = "model.onnx.data"
# Smaller tensors are numbers of the graph rather than weights, and stay in it.
_SMALL = 1024


def write_graphs(models: Mapping[str, Any], directory: Path) -> list[str]:
    """Write graphs by name, their weights outside them, each once whichever graphs it occurs in. Returns the files' names."""
    from onnxscript import ir

    known: dict[str, Any] = {}
    users: list[tuple[Any, Any]] = []
    for model in models.values():
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor.nbytes >= _SMALL:
                first = known.setdefault(value.name, tensor)
                users.append((value, first if _same(first, tensor) else tensor))
    distinct = list({id(tensor): tensor for _, tensor in users}.values())
    stored = ir.external_data.convert_tensors_to_external(distinct, directory, WEIGHTS)
    places = {id(tensor): place for tensor, place in zip(distinct, stored, strict=True)}
    for value, tensor in users:
        value.const_value = places[id(tensor)]
    for name, model in models.items():
        ir.save(model, directory / f"{name}.onnx")
    return [*(f"{name}.onnx" for name in models), WEIGHTS]


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    alike = one.dtype == other.dtype and tuple(one.shape) == tuple(other.shape)
    return alike and np.array_equal(one.numpy(), other.numpy())
