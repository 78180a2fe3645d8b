"""The life of an adapter, as the hooks that a plugin implements, in the order in which they fire.

A method's hooks are addressed to the plugin that registered the method, never broadcast: every call here reaches one
method. Other plugins may wrap them (`@hookimpl(wrapper=True)`) to trace or log.
"""

# mypy: disable-error-code="empty-body"

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import pluggy
from torch import Tensor

from .method import Forward, LowRank, MethodInfo, OptimizerStep, Tensors
from .sharing import Layout
from .sites import Site

PROJECT = "peft_core"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec(firstresult=True)
def peft_method() -> MethodInfo:
    """At discovery: the method's name, options model and capabilities."""


@hookspec(firstresult=True)
def peft_init(sites: Sequence[Site]) -> Layout:
    """At plan: lay out the tensors for these sites. Pure: shapes and `site.options` in, data out, no weights.

    Core draws the values, keyed by (seed, group, tensor). Raise `PlanError` for options that do not fit a site.
    """


@hookspec(firstresult=True)
def peft_attach(site: Site, weight: Tensor, tensors: Tensors, binding: Tensors) -> Tensor:
    """At attach, per site, for methods that own their base weight: the weight (out × in) that the base holds from then on.

    Pure. `weight` is the original. A result in a wider dtype than the base's becomes a master copy, of which the base
    holds the rounded values.
    """


@hookspec(firstresult=True)
def peft_forward(site: Site) -> Forward:
    """At attach: Δ(x) as plain functions, called directly ever after. Asked once for each site of a model and its options: later
    adapters there share what it gave. A model that was pickled asks again.
    """


@hookspec(firstresult=True)
def peft_optimizer_step(step: OptimizerStep) -> AbstractContextManager[Any]:
    """Around every real optimizer step: a context manager that is entered after backward and clipping, just before the
    optimizer updates, and left just after. Steps that a gradient scaler skips do not count and are not seen.
    """


@hookspec(firstresult=True)
def peft_merge(site: Site, weight: Tensor, tensors: Tensors, binding: Tensors) -> Tensor:
    """At merge, per site: the merged weight (out × in). Pure; no module is needed.

    `weight` (out × in) is the base weight in float32 or float64 (for methods that own it: the owned weight); compute in
    its dtype and do not change it in place. Core rounds the result to the base's dtype. `tensors` and `binding` are in
    float32 or float64, too: core widens 16-bit parameters.
    """


@hookspec(firstresult=True)
def peft_lowrank(site: Site, tensors: Tensors, binding: Tensors) -> LowRank:
    """On request, per site: exact factors with ΔW = B·A, scale included. Raise `MergeError` where there are none.

    Core widens 16-bit `tensors` and `binding` to float32, so that a factor times the scale is not rounded; compute in their
    dtype.
    """


@hookspec
def peft_cli(app: Any) -> None:
    """At the start of the command line: add commands to the Typer `app`."""
