"""Weights that cannot be given another value, or not without more being changed: refused before anything is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from . import bases
from .errors import MergeError
from .sharded import divided
from .subclassing import plain_class


def refuse_divided(root: nn.Module) -> None:
    """Refuse weights of which every process has a part: what is written while they are gathered is lost with the next step.

    Raises:
        MergeError: names the module and the remedy.
    """
    if place := divided(root):
        raise MergeError(
            f"{place} is divided between processes (FSDP or tensor parallelism), so its weights "
            "cannot be changed for good; save the adapter and merge it into the checkpoint's files (peft-core merge), or load "
            "both in one process"
        )


def refuse_unwritable(root: nn.Module, paths: Sequence[str]) -> None:
    """Refuse layers whose weight cannot be given another value without more being changed.

    Raises:
        MergeError: names the layer, and the other holder of its weight.
    """
    for path in paths:
        module = root.get_submodule(path)
        if module._parameters.get("weight") is None:
            raise MergeError(
                f"'{path}': its weight is recomputed at every forward (weight_norm, pruning or another parametrization), so "
                "nothing can be merged into it; make it a plain parameter first, or exclude the layer"
            )
        if not is_product(module):
            raise MergeError(
                f"'{path}' is a {plain_class(type(module)).__name__}, whose own forward gives something else than x Wᵀ + b, so "
                "nothing can be merged into its weight; leave the adapter unmerged, or exclude the layer"
            )
    refuse_ties(root, [f"{path}.weight" for path in paths], (), "exclude the tied layer")


def refuse_ties(root: nn.Module, names: Sequence[str], within: Iterable[str], remedy: str) -> None:
    """Refuse to change a parameter that another module holds, too, beside those that lie `within` one of these.

    Raises:
        MergeError: names both holders and the remedy.
    """
    for name, other in bases.tied(root, names, within).items():
        raise MergeError(f"'{name}' is the same tensor as '{other}': merging would change both; {remedy}")


@torch.no_grad()
def is_product(module: nn.Module) -> bool:
    """Whether a layer gives x Wᵀ + b: known of most, tried on a few inputs where it has a forward of its own."""
    base = bases.describe(module)
    assert base is not None
    if base.fused:
        return True
    weight, bias, training = bases.dense_weight(module), getattr(module, "bias", None), module.training
    x = torch.randn(4, base.in_features, generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(weight)
    module.training = False
    try:
        expected = nn.functional.linear(x, weight, bias)
        found = plain_class(type(module)).forward(module, x)
        return bool((found - expected).norm() <= torch.finfo(weight.dtype).eps ** 0.5 * expected.norm())
    except Exception:  # whatever a forward raises that takes something else than x
        return False
    finally:
        module.training = training
