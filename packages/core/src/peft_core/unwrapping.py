"""The model inside the wrappers of torch.compile and of data parallelism."""

from __future__ import annotations

from torch import nn

from .errors import AdapterError
from .sharded import divided

# Wrapper → the name under which it holds the model.
_WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
}


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside all wrappers.

    Raises:
        AdapterError: it is no model.
    """
    if not isinstance(model, nn.Module):
        raise AdapterError(f"expected a loaded model (a torch.nn.Module), got {model!r:.80}")
    return _nested(model)[-1]


def unwrap_to_attach(model: nn.Module) -> nn.Module:
    """The model inside all wrappers, for a new adapter.

    Raises:
        AdapterError: it is not a loaded model, or is wrapped or divided for parallel training: what does that has its list of
            parameters already, and would leave new ones alone.
    """
    if not isinstance(model, nn.Module):
        raise AdapterError(f"attach and load need a loaded model (a torch.nn.Module), they were given {model!r:.80}")
    *wrappers, inner = _nested(model)
    if parallel := [kind for wrapper in wrappers if (kind := type(wrapper).__name__) != "OptimizedModule"]:
        raise AdapterError(
            f"the model is wrapped in {parallel[0]}, which would not synchronise the adapter's gradients; attach or load first, "
            "then wrap"
        )
    if place := divided(inner):
        raise AdapterError(
            f"{place} is divided between processes, which would not synchronise the adapter's gradients; attach or load first, "
            "then fully_shard (tensor parallelism is not supported)"
        )
    return inner


def _nested(model: nn.Module) -> list[nn.Module]:
    """The model and what it wraps, from the outside in."""
    nested = [model]
    while (name := _WRAPPERS.get(type(nested[-1]).__name__, "")) in nested[-1]._modules:
        nested.append(nested[-1].get_submodule(name))
    return nested
