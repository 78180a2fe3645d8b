"""Whether a merged export holds the weights of the merged model, rounded once. In 16 bits logits show less than that.

Only one of the two models is in memory at a time: what is kept of each parameter is its product with a few random vectors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from peft_core import bases
from peft_core.merge import merged_weight

from .adapter_files import open_adapters
from .checkpoint_files import Reader
from .merge_plan import Change, collect_changes
from .reports import Difference

LIMIT = 1 / 40
"""Of a dtype's precision, at least 1e-5: the relative difference of a parameter beyond which it is another one.

A right one differs where a sum of float32 lies between two numbers of the dtype: by 1e-3 of its precision. Merged with weight
0.99, a weight whose Δ is a twentieth of it differs by a fifth of bfloat16's.
"""
_PROBES = 4


Products: TypeAlias = Mapping[str, Mapping[torch.dtype, Tensor]]
"""Parameter → by the dtype that it is rounded to → its product [rows, 4] with the random vectors."""


@torch.no_grad()
def expected(model: nn.Module, adapters: Mapping[str, float], dtypes: Sequence[torch.dtype]) -> Products:
    """What an export of this model with these adapters, by their weights, must hold.

    Args:
        model: the base, loaded without loss; adapters may be attached to it, and are passed over.

    Raises:
        MergeError: the adapters cannot be merged together. CheckpointError: one cannot be read.
    """
    changes = collect_changes(open_adapters(adapters))
    out = {}
    with Reader() as reader:
        for name, module, parameter in _parameters(model):
            value = _changed(module, parameter, changes.get(name, Change()), reader)
            out[name] = {dtype: _product(value.to(dtype)) for dtype in dtypes}
    return out


@torch.no_grad()
def farthest(model: nn.Module, wanted: Products) -> Difference:
    """The parameter of an export, loaded without loss, that is farthest from what `expected` gave."""
    found = (
        min(
            (
                Difference(name, _apart(_product(parameter), product), max(1e-5, LIMIT * torch.finfo(dtype).eps))
                for dtype, product in wanted[name].items()
            ),
            key=_excess,
        )
        for name, _, parameter in _parameters(model)
        if name in wanted
    )
    return max(found, key=_excess)


def _excess(found: Difference) -> float:
    return found.relative / found.limit


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """(name, module, parameter); a tied one under each of its names."""
    for path, module in model.named_modules():
        for local, parameter in bases.own_parameters(module):
            yield f"{path}.{local}".lstrip("."), module, parameter


def _changed(module: nn.Module, parameter: Tensor, change: Change, reader: Reader) -> Tensor:
    """A parameter as it is once the adapters are merged."""
    if change.trained is not None:
        adapter, key = change.trained
        return adapter.tensor(key, reader)
    if not change.adapters:
        return parameter
    merged = merged_weight(
        bases.dense_weight(module), [adapter.contribution(change.path, reader) for adapter in change.adapters]
    )
    return merged.T if change.adapters[0].sites[change.path].transposed else merged


def _product(parameter: Tensor) -> Tensor:
    """The parameter times random vectors: [rows, _PROBES] in float32."""
    rows = torch.atleast_1d(parameter)[:, None].flatten(1)
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(rows.shape[1], _PROBES, generator=generator, device="cpu")
    return rows.float() @ probes


def _apart(found: Tensor, wanted: Tensor) -> float:
    """‖found − wanted‖ / ‖wanted‖; infinite where they cannot be compared."""
    if found.shape != wanted.shape:
        return float("inf")
    difference, size = float((found - wanted).norm()), float(wanted.norm())
    relative = difference / size if size else float(difference > 0)
    return relative if relative == relative else float("inf")
