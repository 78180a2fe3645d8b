"""What a method plugin hands to core: its description, its forward, and what it is given around an optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from pydantic import BaseModel
from torch import Tensor

from ._torch import version
from .errors import PluginError
from .sites import Site

Tensors: TypeAlias = Mapping[str, Tensor]
"""A site's borrowed tensors by name; a binding likewise."""


BASE_WEIGHT = "base_weight"
"""The name under which a method that is not additive finds its site's weight, beside the tensors that it borrows."""


@dataclass(frozen=True)
class Capabilities:
    """What core must know of a method before it plans. Core reads these and never a method's name.

    Attributes:
        additive: forward is base(x) + Δ(x), with a Δ that does not depend on the base weight. A method without it is
            exclusive on its sites; its `naive` finds the base weight (out × in, perhaps a transposed view) in
            `tensors["base_weight"]`, and is all that runs.
        owns_base_weight: the method moves weight into the base. It implements `peft_attach`, is exclusive on its sites,
            and the moved weight is part of its checkpoint.
        starts_at_zero: attaching changes no bit of the model's output.
        lowrank: it implements `peft_lowrank`.
        dropout: a spec with dropout > 0 is allowed.
        optimizer_step: it implements `peft_optimizer_step`, and training without it would be wrong.
    """

    additive: bool = True
    owns_base_weight: bool = False
    starts_at_zero: bool = True
    lowrank: bool = False
    dropout: bool = True
    optimizer_step: bool = False

    @property
    def exclusive(self) -> bool:
        """Whether a site of this method can carry no second active adapter."""
        return not self.additive or self.owns_base_weight


@dataclass(frozen=True)
class MethodInfo:
    """What `peft_method` returns.

    Attributes:
        name: the `method` of a spec.
        options: pydantic model of the method's own options, every one with a default.
        capabilities: or a function of validated options, where they depend on them.
        summary: one line. paper: a reference such as `arXiv 2409.15371`.
        trials: option sets for tiny layers, which the conformance suite runs one by one.
        optimizer: `(parameters, lr=, weight_decay=) -> Optimizer`, for methods that come with one of their own; trainers
            take it unless the user chooses another.
        version, distribution: filled in by core.
    """

    name: str
    options: type[BaseModel]
    capabilities: Capabilities | Callable[[Any], Capabilities] = Capabilities()
    summary: str = ""
    paper: str = ""
    trials: Sequence[Mapping[str, Any]] = ({},)
    optimizer: Callable[..., torch.optim.Optimizer] | None = None
    version: str = ""
    distribution: str = ""

    def can(self, options: BaseModel) -> Capabilities:
        """The capabilities under these validated options."""
        return self.capabilities(options) if callable(self.capabilities) else self.capabilities


@dataclass(frozen=True)
class Rows:
    """A gradient that is zero but for some rows: `values[i]` belongs to row `index[i]`. No index occurs twice.

    What a site returns for a tensor of which it borrows only a part, so that the cost of a site does not grow with
    the number of sites that share the tensor.
    """

    index: Tensor
    values: Tensor


Gradient: TypeAlias = Tensor | Rows
Naive: TypeAlias = Callable[[Tensor, Tensors, Tensors], Tensor]
AddInPlace: TypeAlias = Callable[[Tensor, Tensor, Tensors, Tensors], tuple[Tensor, ...]]
GradInPlace: TypeAlias = Callable[[Tensor, Tensor | None, tuple[Tensor, ...], Tensors, Tensors], Mapping[str, Gradient]]


@dataclass(frozen=True)
class Forward:
    """What `peft_forward` returns: plain functions that capture no weights. `naive` is a site's own (torch.compile fails under
    gradient checkpointing where those of several hold a number in common); the pair may be one for all sites of a kind.

    Attributes:
        naive: `(x, tensors, binding) -> Δ(x)`, x [..., in] → [..., out]: what is added to the base's output (without a bias),
            additive or not. Differentiable by autograd, in x's dtype (float64 included). The readable reference, and the
            path for bases that cannot be fused and for methods that are not additive.
        add_: `(x, y, tensors, binding) -> saved`: adds Δ(x) to y in place. x [tokens, in] and y [tokens, out] are in
            the compute dtype, tensors in their own (cast what you use). Runs without autograd. Returns the tensors that
            `grad_` needs, nothing more.
        grad_: `(dy, dx, saved, tensors, binding) -> gradients`: adds this adapter's part of the input gradient to dx
            in place (unless dx is None) and returns the gradients by tensor name.
        dropped: `(p, seed) -> (add_, grad_)`: the pair with dropout of x built in, for kernels that draw what they drop
            while they read it; asked in their stead at every forward in which Triton is to be used. Without it, or
            elsewhere, core drops, and keeps a mask of x's size.
    """

    naive: Naive
    add_: AddInPlace | None = None
    grad_: GradInPlace | None = None
    dropped: Callable[[float, int], tuple[AddInPlace, GradInPlace]] | None = None

    def __post_init__(self) -> None:
        if not callable(self.naive):
            raise PluginError(f"Forward: naive must be a function (x, tensors, binding) -> Δ(x), got {self.naive!r}")
        if callable(self.add_) != callable(self.grad_):
            given, missing = ("add_", "grad_") if callable(self.add_) else ("grad_", "add_")
            raise PluginError(f"Forward: {given} is given without {missing}; give both, or naive alone")


@dataclass
class StepMember:
    """One site inside an optimizer step.

    Attributes:
        site: the site. tensors: its live parameters by name (`.grad` is set). binding: its fixed tensors.
        state: the training-only tensors of its groups, to be changed in place.
        weight: for a method that owns its base weight, that weight (out × in; a float32 master where there is one), to
            be changed in place. None otherwise.
        weight_changed: set it where torch does not see that the weight was changed in place (`weight.data`, a Triton kernel).
    """

    site: Site
    tensors: Mapping[str, torch.nn.Parameter]
    binding: Tensors
    state: Mapping[str, Tensor]
    weight: Tensor | None = None
    weight_changed: bool = False

    def __post_init__(self) -> None:
        self._version = 0 if self.weight is None else version(self.weight)

    def took_changes(self) -> bool:
        """Whether the weight was changed since the last time; core asks."""
        before, self._version = self._version, 0 if self.weight is None else version(self.weight)
        changed, self.weight_changed = self.weight_changed or self._version != before, False
        return changed


@dataclass
class OptimizerStep:
    """What `peft_optimizer_step` is given: one real optimizer step of one adapter.

    Attributes:
        index: number of real steps before this one, over resumes and runs.
        run_start: index of the run's first step: a schedule begins there.
        total_steps: length of the run in steps, if known (`adapter.total_steps`; trainers set it).
        seed: the adapter's seed, to key random decisions by (seed, index, site).
        optimizer: the optimizer that steps. loss_scale: what the gradients are multiplied by (1.0 without a scaler).
        members: the sites whose parameters this optimizer steps.
    """

    adapter: str
    index: int
    total_steps: int | None
    seed: int
    optimizer: torch.optim.Optimizer
    loss_scale: float
    members: Sequence[StepMember] = field(default_factory=tuple)
    run_start: int = 0


class LowRank(NamedTuple):
    """Exact factors of a site: ΔW = B·A, with A [rank, in] and B [out, rank]."""

    A: Tensor
    B: Tensor
