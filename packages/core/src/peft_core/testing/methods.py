"""A sound method for tests of core, and broken ones that the conformance suite must catch.

`pytest -p peft_core.testing.methods --pyargs peft_core.testing --method sound` runs the suite on one;
each of `FAULTS` is a method by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

import peft_core as pc
from peft_core import plugins
from peft_core.initial_values import initial_values

if TYPE_CHECKING:
    import pytest


class Options(BaseModel):
    """Options of the sound method."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    r: int = Field(default=4, ge=1)
    alpha: float = Field(default=8.0, gt=0, le=1e6)


@dataclass(frozen=True)
class Choice(pc.Initializer):
    """As many numbers below `below` as the shape asks for, none twice."""

    below: int

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randperm(self.below, generator=generator)[: shape[0]]


class Sound:
    """Uses what core offers: like layers share a pool of 2r rows, of which each uses r by its binding.

    Δ(x) = (alpha/r)·B·A[rows]·x, with a B for each layer.
    """

    name: ClassVar[str] = "sound"
    capabilities: ClassVar[pc.Capabilities] = pc.Capabilities(lowrank=True)
    trials: ClassVar[Sequence[Mapping[str, Any]]] = ({"r": 4, "alpha": 8},)

    @pc.hookimpl
    def peft_method(self) -> pc.MethodInfo:
        return pc.MethodInfo(self.name, Options, self.capabilities, "for tests", trials=self.trials)

    @pc.hookimpl
    def peft_init(self, sites: Sequence[pc.Site]) -> pc.Layout:
        groups, bindings = [], {}
        for name, members in pc.alike(sites):
            r = members[0].options.r
            for site in members:
                if r > min(site.in_features, site.out_features):
                    raise pc.PlanError(f"r: {r} is larger than '{site.path}'; choose a smaller r")
                B = pc.TensorSpec((site.out_features, r), pc.Zeros())
                groups.append(pc.SharingGroup.private(site, {"B": B}))
                bindings[site.path] = {"rows": pc.TensorSpec((r,), Choice(2 * r), torch.int64)}
            fan_in = members[0].in_features
            pool = pc.TensorSpec((2 * r, fan_in), pc.kaiming_uniform(fan_in))
            groups.append(pc.SharingGroup(f"pool.{name}", tuple(site.path for site in members), {"A": pool}))
        return pc.Layout(tuple(groups), bindings)

    @pc.hookimpl
    def peft_forward(self, site: pc.Site) -> pc.Forward:
        return self.forward(site)

    @pc.hookimpl
    def peft_merge(self, site: pc.Site, weight: Tensor, tensors: pc.Tensors, binding: pc.Tensors) -> Tensor:
        return self.merge(site, weight, tensors, binding)

    @pc.hookimpl
    def peft_lowrank(self, site: pc.Site, tensors: pc.Tensors, binding: pc.Tensors) -> pc.LowRank:
        return pc.LowRank(A=tensors["A"][binding["rows"]], B=tensors["B"] * _scale(site))

    def forward(self, site: pc.Site) -> pc.Forward:
        """The three functions."""
        scale = _scale(site)

        def naive(x: Tensor, tensors: pc.Tensors, binding: pc.Tensors) -> Tensor:
            return pc.lowrank.naive(x, tensors["A"][binding["rows"]], tensors["B"], scale)

        def add_(x: Tensor, y: Tensor, tensors: pc.Tensors, binding: pc.Tensors) -> tuple[Tensor, ...]:
            return x, pc.lowrank.add_(x, y, tensors["A"][binding["rows"]], tensors["B"], scale)

        def grad_(
            dy: Tensor, dx: Tensor | None, saved: tuple[Tensor, ...], tensors: pc.Tensors, binding: pc.Tensors
        ) -> dict[str, Any]:
            rows, (x, h) = binding["rows"], saved
            dA, dB = pc.lowrank.grad_(dy, dx, x, h, tensors["A"][rows], tensors["B"], scale)
            return {"A": pc.Rows(rows, dA), "B": dB}

        return pc.Forward(naive, add_, grad_)

    def merge(self, site: pc.Site, weight: Tensor, tensors: pc.Tensors, binding: pc.Tensors) -> Tensor:
        """W + ΔW."""
        return weight + self.delta(site, tensors, binding, weight.dtype)

    def delta(self, site: pc.Site, tensors: pc.Tensors, binding: pc.Tensors, dtype: torch.dtype) -> Tensor:
        """ΔW (out × in)."""
        return pc.lowrank.delta(tensors["A"][binding["rows"]], tensors["B"], _scale(site), dtype)


class ScaleTwiceInMerge(Sound):
    """Forward applies the scale once, merge twice."""

    name = "scale-twice-in-merge"

    def delta(self, site: pc.Site, tensors: pc.Tensors, binding: pc.Tensors, dtype: torch.dtype) -> Tensor:
        return super().delta(site, tensors, binding, dtype) * _scale(site)


class ForgottenTranspose(Sound):
    """Merge fills ΔW in × out, and its shape hides it."""

    name = "forgotten-transpose"

    def delta(self, site: pc.Site, tensors: pc.Tensors, binding: pc.Tensors, dtype: torch.dtype) -> Tensor:
        right = super().delta(site, tensors, binding, dtype)
        return right.T.reshape(right.shape)


class MissingBorrower(Sound):
    """Only the first layer hands in its part of the shared tensor's gradient."""

    name = "gradient-missing-a-borrower"

    def forward(self, site: pc.Site) -> pc.Forward:
        right = super().forward(site)
        if site.layer == 0:
            return right

        def grad_(*arguments: Any) -> dict[str, Any]:
            assert right.grad_ is not None
            found = dict(right.grad_(*arguments))
            rows = found["A"]
            assert isinstance(rows, pc.Rows)
            return {**found, "A": pc.Rows(rows.index, torch.zeros_like(rows.values))}

        return pc.Forward(right.naive, right.add_, grad_)


class ForwardChangesBase(Sound):
    """Forward accumulates into the base weight that it is given to read."""

    name = "forward-changes-the-base"
    capabilities = pc.Capabilities(additive=False, lowrank=True)

    def forward(self, site: pc.Site) -> pc.Forward:
        right = super().forward(site)

        def naive(x: Tensor, tensors: pc.Tensors, binding: pc.Tensors) -> Tensor:
            with torch.no_grad():
                tensors["base_weight"].add_(1e-3)
            return right.naive(x, tensors, binding)

        return pc.Forward(naive)


class OverwritesInputGradient(Sound):
    """The first adapter's part of the input gradient replaces the base's."""

    name = "input-gradient-overwritten"

    def forward(self, site: pc.Site) -> pc.Forward:
        right = super().forward(site)

        def grad_(dy: Tensor, dx: Tensor | None, *rest: Any) -> Mapping[str, Any]:
            assert right.grad_ is not None
            if dx is not None:
                dx.zero_()
            return right.grad_(dy, dx, *rest)

        return pc.Forward(right.naive, right.add_, grad_)


class StartsElsewhere(Sound):
    """Claims to start at zero, and does not."""

    name = "does-not-start-at-zero"

    @pc.hookimpl
    def peft_init(self, sites: Sequence[pc.Site]) -> pc.Layout:
        right = super().peft_init(sites)
        groups = tuple(
            pc.SharingGroup(
                g.name, g.members, {n: pc.TensorSpec(t.shape, pc.Normal(0.02)) for n, t in g.tensors.items()}
            )
            for g in right.groups
        )
        return pc.Layout(groups, right.bindings)


class StartsAnywhere(StartsElsewhere):
    """Says that it does not start at zero, and is sound."""

    name = "starts-anywhere"
    capabilities = pc.Capabilities(starts_at_zero=False, lowrank=True)


class WeightsInFunctions(Sound):
    """Forward keeps the first tensors that it sees instead of taking those that it is given."""

    name = "functions-capture-weights"

    def forward(self, site: pc.Site) -> pc.Forward:
        right = super().forward(site)
        kept: list[pc.Tensors] = []

        def first(tensors: pc.Tensors) -> pc.Tensors:
            kept.append({name: tensor.detach().clone() for name, tensor in tensors.items()})
            return kept[0]

        def add_(x: Tensor, y: Tensor, tensors: pc.Tensors, binding: pc.Tensors) -> tuple[Tensor, ...]:
            assert right.add_ is not None
            return right.add_(x, y, first(tensors), binding)

        return pc.Forward(right.naive, add_, right.grad_)


class RegisteredTwice(Sound):
    """Attaching registers a layer's tensor on the layer, too."""

    name = "parameter-registered-twice"


class BindingRegenerated(Sound):
    """Loading draws the bindings anew instead of reading them."""

    name = "binding-regenerated-on-load"


class DropoutIgnored(Sound):
    """The pair with dropout built in drops nothing."""

    name = "dropout-ignored"

    def forward(self, site: pc.Site) -> pc.Forward:
        right = super().forward(site)
        assert right.add_ is not None and right.grad_ is not None
        pair = right.add_, right.grad_
        return pc.Forward(right.naive, *pair, dropped=lambda p, seed: pair)


class FirstOptions(Sound):
    """All layers are laid out with the options of the first."""

    name = "first-site's-options"
    trials = ({"r": 4, "alpha": 8}, {"r": 3, "alpha": 2})

    @pc.hookimpl
    def peft_init(self, sites: Sequence[pc.Site]) -> pc.Layout:
        return super().peft_init([replace(site, options=sites[0].options) for site in sites])


class UnkeyedSteps(Sound):
    """What a step draws depends on the process, and not on seed, step and site."""

    name = "steps-draw-unkeyed"
    capabilities = pc.Capabilities(lowrank=True, optimizer_step=True)

    @pc.hookimpl
    @contextmanager
    def peft_optimizer_step(self, step: pc.OptimizerStep) -> Iterator[None]:
        yield
        with torch.no_grad():
            for member in step.members:
                member.tensors["B"].add_(torch.randn(member.tensors["B"].shape), alpha=1e-3)


class WeightMovedTwice(Sound):
    """A step moves ΔW into the base, and leaves it in the tensors, too."""

    name = "weight-moved-twice"
    capabilities = pc.Capabilities(owns_base_weight=True, optimizer_step=True)

    @pc.hookimpl
    def peft_attach(self, weight: Tensor) -> Tensor:
        return weight

    @pc.hookimpl
    @contextmanager
    def peft_optimizer_step(self, step: pc.OptimizerStep) -> Iterator[None]:
        yield
        with torch.no_grad():
            for member in step.members:
                assert member.weight is not None
                member.weight.add_(self.delta(member.site, member.tensors, member.binding, member.weight.dtype))


SOUND: tuple[type[Sound], ...] = (Sound, StartsAnywhere)
FAULTS: tuple[type[Sound], ...] = (
    ScaleTwiceInMerge,
    ForgottenTranspose,
    MissingBorrower,
    ForwardChangesBase,
    OverwritesInputGradient,
    StartsElsewhere,
    WeightsInFunctions,
    RegisteredTwice,
    BindingRegenerated,
    DropoutIgnored,
    FirstOptions,
    UnkeyedSteps,
    WeightMovedTwice,
)


def register_sound() -> None:
    """Make the sound method known to core, once per process."""
    if Sound.name not in pc.methods():
        plugins.register(Sound(), Sound.name)


def pytest_configure(config: pytest.Config) -> None:
    """As a pytest plugin: register all, and plant what no method can do by itself into core."""
    register_sound()
    for method in (*SOUND[1:], *FAULTS):
        plugins.register(method(), method.name)
    pc.attach = _after(pc.attach, RegisteredTwice.name, _register_on_layer)
    pc.load = _after(pc.load, BindingRegenerated.name, _draw_again)


def _after(
    function: Callable[..., pc.Adapter], method: str, fault: Callable[[pc.Adapter], None]
) -> Callable[..., pc.Adapter]:
    def planted(*args: Any, **kwargs: Any) -> pc.Adapter:
        adapter = function(*args, **kwargs)
        if adapter.plan.spec.method == method:
            fault(adapter)
        return adapter

    return planted


def _register_on_layer(adapter: pc.Adapter) -> None:
    key, parameter = next(iter(adapter.named_parameters()))
    adapter.model.get_submodule(adapter.plan.sites[0].path).register_parameter(key.replace(".", "_"), parameter)


def _draw_again(adapter: pc.Adapter) -> None:
    drawn = initial_values(adapter.model, adapter.plan, seed=0)
    for key, buffer in adapter.bank.named_fixed():
        buffer.copy_(drawn[key])


def _scale(site: pc.Site) -> float:
    return float(site.options.alpha / site.options.r)
