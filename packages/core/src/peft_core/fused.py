"""The base product and what adapters add to it as one autograd.Function: forward and backward once, for every method.

Where no gradient is asked for, the same is computed without the function around it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import _torch, kernels
from .dropout import add_kept_, drop
from .errors import AdapterError, PluginError
from .gradients import SharedGradient
from .method import Forward, GradInPlace, Rows


class Use(NamedTuple):
    """One active adapter in one forward."""

    functions: Forward
    tensors: dict[str, Tensor]
    binding: dict[str, Tensor]
    shared: Mapping[str, SharedGradient]
    scale: float
    dropout: float
    additive: bool
    where: str


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, uses: list[Use], dropout: bool) -> Tensor:
    """x Wᵀ + b + Σ Δ(x): x [..., in] → [..., out]."""
    if torch.is_grad_enabled():
        return _apply_linear(x, weight, bias, transposed, uses, dropout, *_edges_of(uses))  # type: ignore[no-any-return]
    y = nn.functional.linear(x, weight.t() if transposed else weight, bias)
    _add_all(uses, x, y, dropout)
    return y


def delta(x: Tensor, y: Tensor, uses: list[Use], dropout: bool) -> Tensor:
    """y + Σ Δ(x) for a base that computes y itself (quantized, hooked): x [..., in], y [..., out]."""
    if torch.is_grad_enabled():
        return FusedDelta.apply(x, y, uses, dropout, *_edges_of(uses))  # type: ignore[no-any-return]
    total = y.clone(memory_format=torch.contiguous_format)
    _add_all(uses, x, total, dropout)
    return total


def _edges_of(uses: list[Use]) -> list[Tensor]:
    """The adapters' parameters as autograd sees them, in the order of `uses` and their tensors: the parameter itself, or the
    gate of a shared one.
    """
    edges: list[Tensor] = []
    for use in uses:
        if not use.shared:
            edges += use.tensors.values()
            continue
        for name, tensor in use.tensors.items():
            shared = use.shared.get(name)
            edges.append(shared.edge(tensor) if shared is not None and tensor.requires_grad else tensor)
    return edges


class FusedLinear(torch.autograd.Function):
    """y = x Wᵀ + b + Σ Δ(x), with the adapters adding in place; the base is frozen.

    `edges` are what autograd knows of the adapters' parameters (see `_edges_of`); their values are read from `uses`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        transposed: bool,
        uses: list[Use],
        dropout: bool,
        *edges: Tensor,
    ) -> Tensor:
        y = nn.functional.linear(x, weight.t() if transposed else weight, bias)
        # A view of something inside linear: callers may not change a function's view in place, a tensor they may.
        if y._is_view():
            y = torch.ops.aten._unsafe_view(y, y.shape)
        saved, ctx.parts = _add_all(uses, x, y, dropout)
        ctx.save_for_backward(*saved, weight)
        ctx.transposed = transposed
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad
        weight = saved[-1]
        flat = dy.reshape(-1, dy.shape[-1])
        dx = rows = None
        if needs[0]:
            # A tensor of its own, no view: where x has several readers, the engine adds the others' part to it in place.
            dx = torch.matmul(flat.view(dy.shape), weight.t() if ctx.transposed else weight)
            rows = dx.view(-1, dx.shape[-1])
        return (dx, None, None, None, None, None, *_grad_all(ctx.parts, flat, rows, saved, needs[6:]))


_apply_linear = _torch.apply(FusedLinear)


class FusedDelta(torch.autograd.Function):
    """y + Σ Δ(x) for a base that computes y itself (quantized, hooked)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, uses: list[Use], dropout: bool, *edges: Tensor) -> Tensor:
        total = y.clone(memory_format=torch.contiguous_format)
        saved, ctx.parts = _add_all(uses, x, total, dropout)
        ctx.save_for_backward(*saved)
        ctx.shape = x.shape
        return total

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        flat = dy.reshape(-1, dy.shape[-1])
        dx = flat.new_zeros(flat.shape[0], ctx.shape[-1]) if ctx.needs_input_grad[0] else None
        gradients = _grad_all(ctx.parts, flat, dx, ctx.saved_tensors, ctx.needs_input_grad[4:])
        return (None if dx is None else dx.view(ctx.shape), dy, None, None, *gradients)


class _Part(NamedTuple):
    """One adapter's part of what is saved: its parameters, as many tensors as it `kept`, and a dropout mask if it is `masked`."""

    use: Use
    grad_: GradInPlace
    kept: int
    masked: bool


def _add_all(uses: list[Use], x: Tensor, y: Tensor, dropout: bool) -> tuple[list[Tensor], list[_Part]]:
    """Let every adapter add to y [..., out] in place, x [..., in]. Returns the tensors to save, and what `_grad_all` needs beside
    them.
    """
    x, y = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    saved: list[Tensor] = []
    parts: list[_Part] = []
    for use in uses:
        add_, grad_ = use.functions.add_, use.functions.grad_
        assert add_ is not None and grad_ is not None
        inner, mask = x, None
        if dropout and use.dropout and use.functions.dropped is not None and kernels.use_triton(x):
            # The seed comes from the CPU's generator: no wait for the device, and checkpointing restores it.
            add_, grad_ = use.functions.dropped(use.dropout, int(torch.randint(2**32, 2**62, (), device="cpu")))
        elif dropout and use.dropout:
            inner, mask = drop(x, use.dropout)
        if use.scale == 1.0:
            kept = add_(inner, y, use.tensors, use.binding)
        else:
            delta = torch.zeros_like(y)
            kept = add_(inner, delta, use.tensors, use.binding)
            y.add_(delta, alpha=use.scale)
        if type(kept) is not tuple:
            raise PluginError(
                f"{use.where}: add_ must return a tuple of the tensors that grad_ needs, got {kept!r:.80}"
            )
        saved += use.tensors.values()
        saved += kept
        if mask is not None:
            saved.append(mask)
        parts.append(_Part(use, grad_, len(kept), mask is not None))
    return saved, parts


def _grad_all(
    parts: list[_Part], dy: Tensor, dx: Tensor | None, saved: tuple[Tensor, ...], needs: tuple[bool, ...]
) -> list[Tensor | None]:
    """Let every adapter add to dx [tokens, in] in place, and collect the gradients of their edges.

    Raises:
        AdapterError: the gradients are to be differentiated again, or several computed at once. PluginError: a method gives
            none, or one of another shape.
    """
    if torch.is_grad_enabled():
        raise AdapterError(
            "create_graph=True: the fused backward of adapters has no second derivative; run the model within "
            "pc.kernels('naive'), the readable reference, which has"
        )
    if _torch.is_batched(dy) or _torch.is_legacy_batched(dy):
        raise AdapterError(
            "is_grads_batched=True, vectorize=True or vmap over a backward: the fused backward of adapters computes one gradient "
            "at a time; run the model within pc.kernels('naive'), the readable reference, which computes several"
        )
    gradients: list[Tensor | None] = []
    at = 0
    for use, grad_, count, masked in parts:
        tensors = dict(zip(use.tensors, saved[at:], strict=False))
        at += len(tensors)
        kept = saved[at : at + count]
        at += count
        if masked or use.scale != 1.0:
            found = _grad_scaled(use, grad_, dy, dx, kept, tensors, saved[at] if masked else None)
            at += masked
        else:
            found = grad_(dy, dx, kept, tensors, use.binding)
        for name, parameter in tensors.items():
            gradients.append(_deliver(use, name, found, parameter) if needs[len(gradients)] else None)
    return gradients


def _grad_scaled(
    use: Use,
    grad_: GradInPlace,
    dy: Tensor,
    dx: Tensor | None,
    kept: tuple[Tensor, ...],
    tensors: dict[str, Tensor],
    mask: Tensor | None,
) -> Any:
    """`grad_` under a run-time scale, or a dropout mask."""
    if use.scale != 1.0:
        dy = dy * use.scale
    if mask is None or dx is None:
        return grad_(dy, dx, kept, tensors, use.binding)
    inner = torch.zeros_like(dx)
    found = grad_(dy, inner, kept, tensors, use.binding)
    add_kept_(dx, inner, mask, use.dropout)
    return found


def _deliver(use: Use, name: str, found: Any, parameter: Tensor) -> Tensor | None:
    """A private tensor's gradient goes to autograd, a shared one's into its buffer."""
    try:
        gradient = found[name]
        fits = type(gradient) is Rows or gradient.shape == parameter.shape
    except (KeyError, TypeError, AttributeError):
        gradient, fits = None, False
    if gradient is None or not fits:
        what = "none" if gradient is None else f"one of shape {list(gradient.shape)}"
        raise PluginError(
            f"{use.where}: grad_ must return a gradient of shape {list(parameter.shape)} for '{name}', got {what}"
        )
    shared = use.shared.get(name)
    if shared is not None:
        shared.add_(gradient)
        return None
    if not isinstance(gradient, Tensor):
        whole = torch.zeros_like(parameter)
        whole.index_add_(0, gradient.index, gradient.values.to(whole.dtype))
        return whole
    return gradient.to(parameter.dtype)
