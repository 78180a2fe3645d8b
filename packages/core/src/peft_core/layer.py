"""The only wrapper: a class that a base layer wears.

An adapted layer stays the module that it was, in its place, with its parameters and state-dict keys; only its class becomes
a subclass of its own. Where the base is a frozen dense layer, one autograd.Function computes the base product, lets every
active adapter add to the output in place, and in backward does the same for the input gradient. Everywhere else the base's
own forward runs and the adapters' naive Δ(x) is added to it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import _torch, bases, kernels, plugins
from .errors import AdapterError, PluginError
from .gradients import SharedGradient
from .method import Capabilities, Forward
from .sites import Site

SLOT = "_peft_site"


class Member:
    """One adapter at one site: which tensors it borrows there and the functions that use them.

    Attributes:
        names: (tensor name, name on the root) of what is borrowed. fixed: likewise for the binding.
        shared: tensor name → where its gradient is summed, for tensors with more than one borrower.
    """

    def __init__(
        self,
        adapter: str,
        method: str,
        site: Site,
        functions: Forward,
        can: Capabilities,
        names: Sequence[tuple[str, str]],
        fixed: Sequence[tuple[str, str]],
        shared: dict[str, SharedGradient],
        dropout: float,
    ) -> None:
        self.adapter, self.method, self.site = adapter, method, site
        self.functions, self.can = functions, can
        self.names, self.fixed, self.shared, self.dropout = tuple(names), tuple(fixed), shared, dropout
        self.where = f"'{site.path}', method '{method}'"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "functions": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.functions = plugins.call(self.method, "peft_forward", site=self.site)

    def borrow(self, held: dict[str, Any]) -> dict[str, Tensor]:
        """The parameters as the root holds them now."""
        return {name: held[there] for name, there in self.names}


class Use(NamedTuple):
    """One active adapter in one forward."""

    functions: Forward
    tensors: dict[str, Tensor]
    binding: dict[str, Tensor]
    shared: dict[str, SharedGradient]
    scale: float
    dropout: float
    additive: bool
    where: str


class Slot:
    """What an adapted layer knows of its adapters: kept in the layer's plain `__dict__`, so that a copy has its own.

    Attributes:
        parameters, buffers: the root's own dictionaries, compared at every forward. members: by adapter.
        active: the active members with their run-time scale. dense: a weight that stands in for a quantized one.
        paired: whether all active methods have an accumulating pair. drops: whether one has dropout.
    """

    def __init__(self, root: nn.Module, transposed: bool, fused: bool) -> None:
        self.root = root
        self.parameters, self.buffers = root._parameters, root._buffers
        self.transposed, self.fused = transposed, fused
        self.members: dict[str, Member] = {}
        self.active: list[tuple[Member, float]] = []
        self.dense: Tensor | None = None
        self.paired = self.drops = False
        self._uses: list[Use] | None = None
        self._sources: list[tuple[dict[str, Any], str, Any]] = []

    def activate(self, scales: dict[str, float]) -> None:
        """Make these adapters the active ones, in their order."""
        self.active = [(self.members[name], scale) for name, scale in scales.items() if name in self.members]
        self._refresh()

    def uses(self) -> list[Use]:
        """The active adapters with their tensors as they are now.

        Compiled code reads the tensors from this object: names would be guarded, and every other adapter of the same layout
        would compile anew. FSDP2 replaces parameters at every step, so there they are looked up by name all the same.
        """
        if self._uses is None:
            self._refresh()
        if torch.compiler.is_compiling():
            return self._look_up() if hasattr(self.root, "unshard") else self._uses  # type: ignore[return-value]
        for held, name, tensor in self._sources:
            if held.get(name) is not tensor:
                self._refresh()
                break
        return self._uses  # type: ignore[return-value]

    def _refresh(self) -> None:
        """Look everything up anew: something was activated, or the root holds other tensors than before."""
        self._uses = self._look_up()
        self._sources = [
            (held, there, held[there])
            for member, _ in self.active
            for held, names in ((self.parameters, member.names), (self.buffers, member.fixed))
            for _, there in names
        ]
        self.paired = all(use.functions.add_ is not None and use.additive for use in self._uses)
        self.drops = any(use.dropout for use in self._uses)

    def _look_up(self) -> list[Use]:
        return [
            Use(
                member.functions,
                member.borrow(self.parameters),
                {name: self.buffers[there] for name, there in member.fixed},  # type: ignore[misc]
                member.shared,
                scale,
                member.dropout,
                member.can.additive,
                member.where,
            )
            for member, scale in self.active
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_uses": None, "_sources": []}


class AdaptedLinear:
    """What an adapted layer wears above its own class."""

    def forward(self, input: Tensor | None = None, *, x: Tensor | None = None) -> Tensor:
        x = _named(x) if input is None else input
        slot: Slot = self.__dict__[SLOT]
        if slot.dense is not None:
            return _dense(self, slot, x)
        if not slot.active:
            return super().forward(x)  # type: ignore[misc,no-any-return]
        uses = slot.uses()
        if slot.fused and _paired(slot):
            y = _fused(self, slot, uses, x)
            if y is not None:
                return y
        return add_to(self, slot, uses, x, super().forward(x))  # type: ignore[misc]

    def __reduce__(self) -> Any:
        return _rebuild, (undressed(type(self)), AdaptedLinear), self.__dict__


class HookedLinear(AdaptedLinear):
    """For a layer whose instance has a `forward` of its own (Accelerate's hooks): that one runs, adapters are added to it."""

    def __call__(self, input: Tensor | None = None, *, x: Tensor | None = None) -> Tensor:
        x = _named(x) if input is None else input
        y: Tensor = nn.Module.__call__(self, x)  # type: ignore[arg-type]
        slot: Slot = self.__dict__[SLOT]
        if "forward" not in self.__dict__ or not slot.active or slot.dense is not None:
            return y
        return add_to(self, slot, slot.uses(), x, y)

    def __reduce__(self) -> Any:
        return _rebuild, (undressed(type(self)), HookedLinear), self.__dict__


def _named(x: Tensor | None) -> Tensor:
    """The input, given by the name that Conv1D has for it (Linear's is `input`)."""
    if x is None:
        raise TypeError("forward() is missing its argument 'input'")
    return x


class Trained:
    """What a module trained in full wears: while its adapter is active, the bank's copies stand in for its parameters.

    `__dict__[SLOT]` is a `TrainedSlot`.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        slot: TrainedSlot = self.__dict__[SLOT]
        if not slot.active:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        # A hook on the instance (Accelerate's) would put the base's parameters back; all of them stand in, so it is not needed.
        hooked = self.__dict__.pop("forward", None)
        try:
            with _torch.standing_in(self, slot.tensors(self)):  # type: ignore[arg-type]
                return super().__call__(*args, **kwargs)  # type: ignore[misc]
        finally:
            if hooked is not None:
                self.__dict__["forward"] = hooked

    def __reduce__(self) -> Any:
        return _rebuild, (undressed(type(self)), Trained), self.__dict__


class TrainedSlot:
    """The stand-ins of a module that is trained in full: adapter → ((parameter name, name on the root), …)."""

    def __init__(self, root: nn.Module) -> None:
        self.root, self.parameters = root, root._parameters
        self.members: dict[str, tuple[tuple[str, str], ...]] = {}
        self.active = ""

    def activate(self, scales: dict[str, float]) -> None:
        """The last active adapter that brings this module counts."""
        self.active = next((name for name in reversed(scales) if name in self.members), "")

    def tensors(self, module: Any) -> dict[str, Tensor]:
        """Parameter name → the bank's tensor, in the base's dtype."""
        held = self.parameters
        return {
            name: held[there].to(module.get_parameter(name).dtype)  # type: ignore[union-attr]
            for name, there in self.members[self.active]
        }


class AdaptedRoot:
    """What the root model wears: its own parameters come before those of its adapters, since the first parameter is what
    `model.dtype` and much user code take for the model's.
    """

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """See `nn.Module.named_parameters`."""
        ours = []
        for name, parameter in super().named_parameters(*args, **kwargs):  # type: ignore[misc]
            if bases.ROOT_PREFIX in name:
                ours.append((name, parameter))
            else:
                yield name, parameter
        yield from ours

    def __reduce__(self) -> Any:
        return _rebuild, (undressed(type(self)), AdaptedRoot), self.__dict__


class AdaptedGenerator(AdaptedRoot):
    """For a root that generates: says what is not possible, where transformers would only say that it does not know a word."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """See the model's own `generate`.

        Raises:
            AdapterError: `adapter_names`, an adapter for each row of the batch, is asked for.
        """
        if kwargs.get("adapter_names") is not None:
            raise AdapterError(
                "generate(adapter_names=...): all rows of a batch go through the same adapters; activate one with "
                "pc.activate(model, name) and generate for its rows, or serve them with a runtime that batches LoRA"
            )
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    def __reduce__(self) -> Any:
        return _rebuild, (undressed(type(self)), AdaptedGenerator), self.__dict__


def wear(module: nn.Module, garment: type) -> None:
    """Give the module a subclass of its own class."""
    if garment is AdaptedLinear and "forward" in module.__dict__:
        garment = HookedLinear
    if garment is AdaptedRoot and hasattr(module, "generate"):
        garment = AdaptedGenerator
    module.__class__ = dressed(type(module), garment)  # type: ignore[arg-type]


def undress(module: nn.Module) -> None:
    """Take our own layer of the class off again, whatever others have put above or below it."""
    forward = module.__dict__.get("_old_forward")
    cls = type(module)
    if not isinstance(module, tuple(garments)):
        return
    plain = undressed(cls)
    module.__class__ = plain
    module.__dict__.pop(SLOT, None)
    # A hook that came after us remembers our forward as the original.
    if getattr(forward, "__func__", None) is AdaptedLinear.forward:
        module.__dict__["_old_forward"] = plain.forward.__get__(module)  # type: ignore[attr-defined]
    own = module.__dict__.get("forward")
    if getattr(own, "__func__", None) is AdaptedLinear.forward:
        del module.__dict__["forward"]


@functools.cache
def dressed(base: type, garment: type) -> type:
    """The subclass of `base` that wears `garment`: one per pair, with the base's name."""
    namespace = {"__module__": base.__module__, "__doc__": base.__doc__, "__qualname__": base.__qualname__}
    return type(base.__name__, (garment, base), namespace)


def undressed(cls: type) -> type:
    """The class without our layer; a class that others derived from ours is derived anew from the base."""
    if garments.intersection(cls.__bases__):
        return next(base for base in cls.__bases__ if base not in garments)
    bases = tuple(undressed(base) if issubclass(base, tuple(garments)) else base for base in cls.__bases__)
    return cls if bases == cls.__bases__ else type(cls.__name__, bases, dict(cls.__dict__))


def _rebuild(base: type, garment: type) -> Any:
    cls = dressed(base, garment)
    return cls.__new__(cls)  # type: ignore[call-overload]


garments = {AdaptedLinear, HookedLinear, Trained, AdaptedRoot, AdaptedGenerator}


def add_to(module: Any, slot: Slot, uses: list[Use], x: Tensor, y: Tensor) -> Tensor:
    """The path for bases that cannot be fused: what the active adapters add to the base's output.

    Raises:
        AdapterError: the base's own forward returns something else than one tensor.
    """
    if not isinstance(y, Tensor):
        raise AdapterError(
            f"'{slot.active[0][0].site.path}' is a {undressed(type(module)).__name__}, whose forward returns {type(y).__name__}, "
            "not the product alone: no Δ can be added to it; exclude it"
        )
    if _paired(slot):
        with torch.autocast(x.device.type, enabled=False):
            return FusedDelta.apply(x.to(y.dtype), y, uses, module.training, *_edges(uses))  # type: ignore[no-any-return]
    for use in uses:
        tensors = use.tensors if use.additive else {**use.tensors, "base_weight": _base_weight(module, slot)}
        inner = nn.functional.dropout(x, use.dropout, module.training)
        delta = use.functions.naive(inner, tensors, use.binding)
        y = y + (delta if use.scale == 1.0 else delta * use.scale).to(y.dtype)
    return y


def _paired(slot: Slot) -> bool:
    """Whether the methods' accumulating pairs are to be used, and all have one. Transforms of functions need autograd."""
    return (
        slot.paired
        and not torch.compiler.is_compiling()
        and kernels.chosen() != "naive"
        and not _torch.transforms_functions()
        and not _torch.is_tracing()
    )


def seen_weight(module: Any) -> Tensor:
    """The weight (out × in) that a layer computes with: its own, or the dense one that stands in for a quantized one into which
    an adapter is merged.
    """
    dense = getattr(module.__dict__.get(SLOT), "dense", None)
    return dense if dense is not None else bases.dense_weight(module)


def _base_weight(module: Any, slot: Slot) -> Tensor:
    weight = seen_weight(module)
    if weight.device.type == "meta":
        member = slot.active[0][0]
        raise AdapterError(
            f"'{member.site.path}': the weight is offloaded, and method '{member.method}' reads it at every forward; "
            "load the model without offloading this layer, or exclude it"
        )
    return weight


def _dense(module: Any, slot: Slot, x: Tensor) -> Tensor:
    """A quantized layer into which an adapter is merged: its dense weight stands in for the packed one."""
    weight = slot.dense
    assert weight is not None
    y = nn.functional.linear(x.to(weight.dtype), weight, None if module.bias is None else module.bias.to(weight.dtype))
    return add_to(module, slot, slot.uses(), x, y.to(x.dtype)) if slot.active else y.to(x.dtype)


def _fused(module: Any, slot: Slot, uses: list[Use], x: Tensor) -> Tensor | None:
    """Base and adapters in one function, or None where the base must compute its part by itself.

    This runs at every layer of every step, between products that push Python's own data out of the caches: what is not
    asked for here costs nothing there.
    """
    held = module._parameters  # a weight or bias that is none of these is computed by somebody (a parametrization)
    weight, bias, device = held.get("weight"), held.get("bias"), x.device
    if (
        type(weight) not in (nn.Parameter, Tensor)
        or "bias" not in held
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
        or weight.device != device
        or device.type == "meta"
    ):
        return None
    autocast = torch.is_autocast_enabled(device.type)
    if x.dtype != weight.dtype and not autocast:
        return None
    if x.shape[-1] != weight.shape[0 if slot.transposed else 1]:
        expected = weight.shape[0 if slot.transposed else 1]
        raise AdapterError(f"the input has {x.shape[-1]} features, the adapted layer expects {expected}")
    dropout = slot.drops and module.training
    if not autocast:
        return _apply_linear(x, weight, bias, slot.transposed, uses, dropout, *_edges(uses))  # type: ignore[no-any-return]
    dtype = torch.get_autocast_dtype(device.type)
    x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(device.type, enabled=False):
        return _apply_linear(x, weight, bias, slot.transposed, uses, dropout, *_edges(uses))  # type: ignore[no-any-return]


def _edges(uses: list[Use]) -> list[Tensor]:
    """The adapters' parameters as autograd sees them, in the order of `uses` and their tensors: the parameter itself, or the
    gate of a shared one.
    """
    edges: list[Tensor] = []
    if torch.is_grad_enabled():
        for use in uses:
            if not use.shared:
                edges += use.tensors.values()
                continue
            for name, tensor in use.tensors.items():
                shared = use.shared.get(name)
                edges.append(shared.edge(tensor) if shared is not None and tensor.requires_grad else tensor)
    return edges


def _once(backward: Any) -> Any:
    """`once_differentiable`, at no cost where no second derivative is asked for."""
    guarded = once_differentiable(backward)

    @functools.wraps(backward)
    def choose(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return (guarded if torch.is_grad_enabled() else backward)(ctx, dy)  # type: ignore[no-any-return]

    return choose


class FusedLinear(torch.autograd.Function):
    """y = x Wᵀ + b + Σ Δ(x), with the adapters adding in place; the base is frozen.

    `edges` are what autograd knows of the adapters' parameters (see `_edges`); their values are read from `uses`.
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
        _add_all(ctx, uses, x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1]), dropout, weight)
        ctx.transposed = transposed
        return y

    @staticmethod
    @_once
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        weight, *saved = ctx.saved_tensors
        needs = ctx.needs_input_grad
        flat = dy.reshape(-1, dy.shape[-1])
        dx = rows = None
        if needs[0]:
            # A tensor of its own, no view: where x has several readers, the engine adds the others' part to it in place.
            dx = torch.matmul(flat.view(dy.shape), weight.t() if ctx.transposed else weight)
            rows = dx.view(-1, dx.shape[-1])
        return (dx, None, None, None, None, None, *_grad_all(ctx, flat, rows, saved, needs[6:]))


_apply_linear = _torch.apply(FusedLinear)


class FusedDelta(torch.autograd.Function):
    """y + Σ Δ(x) for a base that computes y itself (quantized, hooked)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, uses: list[Use], dropout: bool, *edges: Tensor) -> Tensor:
        total = y.clone(memory_format=torch.contiguous_format)
        _add_all(ctx, uses, x.reshape(-1, x.shape[-1]), total.view(-1, y.shape[-1]), dropout)
        ctx.shape = x.shape
        return total

    @staticmethod
    @_once
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        flat = dy.reshape(-1, dy.shape[-1])
        dx = flat.new_zeros(flat.shape[0], ctx.shape[-1]) if ctx.needs_input_grad[0] else None
        gradients = _grad_all(ctx, flat, dx, ctx.saved_tensors, ctx.needs_input_grad[4:])
        return (None if dx is None else dx.view(ctx.shape), dy, None, None, *gradients)


def _add_all(ctx: Any, uses: list[Use], x: Tensor, y: Tensor, dropout: bool, *more: Tensor) -> None:
    """Let every adapter add to y [tokens, out] in place; save what their gradients need, after `more`."""
    saved: list[Tensor] = [*more]
    layout: list[tuple[Any, int, bool]] = []  # per use: grad_, number of saved tensors, whether a dropout mask follows
    for use in uses:
        add_, grad_ = use.functions.add_, use.functions.grad_
        assert add_ is not None
        inner, mask = x, None
        if dropout and use.dropout and use.functions.dropped is not None and kernels.use_triton(x):
            # The seed comes from the CPU's generator: no wait for the device, and checkpointing restores it.
            add_, grad_ = use.functions.dropped(use.dropout, int(torch.randint(2**32, 2**62, (), device="cpu")))
        elif dropout and use.dropout:
            mask = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - use.dropout)
            inner = x * mask / (1 - use.dropout)
        if use.scale == 1.0:
            kept = add_(inner, y, use.tensors, use.binding)
        else:
            delta = torch.zeros_like(y)
            kept = add_(inner, delta, use.tensors, use.binding)
            y.add_(delta, alpha=use.scale)
        if type(kept) is not tuple:
            raise PluginError(
                f"{use.where}: add_ must return a tuple of the tensors that grad_ needs, it returned {kept!r:.80}"
            )
        layout.append((grad_, len(kept), mask is not None))
        saved += kept
        if mask is not None:
            saved.append(mask)
    for use in uses:
        saved += use.tensors.values()
    ctx.save_for_backward(*saved)
    ctx.uses, ctx.layout = uses, layout


def _grad_all(
    ctx: Any, dy: Tensor, dx: Tensor | None, saved: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Let every adapter add to dx [tokens, in] in place, and collect the gradients of their edges."""
    gradients: list[Tensor | None] = []
    at, value_at = 0, sum(count + masked for _, count, masked in ctx.layout)
    for use, (grad_, count, masked) in zip(ctx.uses, ctx.layout, strict=True):
        own = tuple(saved[at : at + count])
        mask = saved[at + count] if masked else None
        at += count + masked
        tensors = dict(zip(use.tensors, saved[value_at:], strict=False))
        value_at += len(tensors)
        found = _backward_of(use, grad_, dy, dx, own, mask, tensors)
        for name in tensors:
            needed = len(gradients) < len(needs) and needs[len(gradients)]
            gradients.append(_deliver(use, name, found, tensors[name]) if needed else None)
    return gradients


def _backward_of(
    use: Use,
    grad_: Any,
    dy: Tensor,
    dx: Tensor | None,
    saved: tuple[Tensor, ...],
    mask: Tensor | None,
    tensors: dict[str, Tensor],
) -> Any:
    if use.scale != 1.0:
        dy = dy * use.scale
    if mask is None or dx is None:
        return grad_(dy, dx, saved, tensors, use.binding)
    inner = torch.zeros_like(dx)
    found = grad_(dy, inner, saved, tensors, use.binding)
    dx.add_(inner.mul_(mask), alpha=1 / (1 - use.dropout))
    return found


def _deliver(use: Use, name: str, found: Any, parameter: Tensor) -> Tensor | None:
    """A private tensor's gradient goes to autograd, a shared one's into its buffer."""
    try:
        gradient = found[name]
        fits = not isinstance(gradient, Tensor) or gradient.shape == parameter.shape
    except (KeyError, TypeError):
        gradient, fits = None, False
    if gradient is None or not fits:
        what = "none" if gradient is None else f"one of shape {list(gradient.shape)}"
        raise PluginError(
            f"{use.where}: grad_ must return a gradient of shape {list(parameter.shape)} for '{name}', it returned {what}"
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
