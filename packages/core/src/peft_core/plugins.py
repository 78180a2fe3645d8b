"""Finding method plugins, and calling the hooks of one of them."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import pluggy
import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from . import hookspecs
from ._torch import version
from .errors import PluginError, finding, suggestion
from .method import Capabilities, Forward, LowRank, MethodInfo, Tensors

ENTRY_POINTS = "peft_core.plugins"
_METHOD_HOOKS = (
    "peft_init",
    "peft_attach",
    "peft_forward",
    "peft_optimizer_step",
    "peft_merge",
    "peft_lowrank",
)
_REQUIRED_HOOKS = ("peft_init", "peft_forward", "peft_merge")
# Hooks that compute weights: a 16-bit factor that is multiplied by anything would be rounded.
_WIDE_HOOKS = ("peft_merge", "peft_lowrank")
# The hook that each capability promises.
_PROMISES = {
    "owns_base_weight": "peft_attach",
    "lowrank": "peft_lowrank",
    "optimizer_step": "peft_optimizer_step",
}
# Without these, core would never call the hook. (peft_lowrank may explain why there are no factors.)
_UNHEARD = ("owns_base_weight", "optimizer_step")
_RETURNS = {
    "peft_attach": Tensor,
    "peft_forward": Forward,
    "peft_optimizer_step": AbstractContextManager,
    "peft_merge": Tensor,
    "peft_lowrank": LowRank,
}


@functools.cache
def manager() -> pluggy.PluginManager:
    """The plugin manager, with every installed plugin loaded and checked.

    Raises:
        PluginError: a plugin cannot be imported or breaks the hook contract.
    """
    pm = pluggy.PluginManager(hookspecs.PROJECT)
    pm.add_hookspecs(hookspecs)
    for entry in sorted(importlib.metadata.entry_points(group=ENTRY_POINTS), key=lambda e: e.name):
        source = f"plugin '{entry.name}' of {_distribution(entry)}"
        if pm.has_plugin(entry.name):
            raise PluginError(
                f"{source}: another installed distribution also provides a plugin '{entry.name}'; uninstall one of the two"
            )
        try:
            plugin = entry.load()
        except Exception as error:
            raise PluginError(f"{source} cannot be imported: {error!r}; mend, reinstall or uninstall it") from error
        try:
            pm.register(plugin, name=entry.name)
            pm.check_pending()
        except (pluggy.PluginValidationError, ValueError) as error:
            raise PluginError(f"{source}: {error}; it may need another version of peft-core") from error
    _check(pm)
    return pm


def register(plugin: object, name: str) -> None:
    """Add a plugin that is not installed as a distribution: a method under development, a tracer.

    Raises:
        PluginError: the name is taken, or the plugin breaks the hook contract; it is then not registered.
    """
    pm = manager()
    if pm.has_plugin(name):
        raise PluginError(f"a plugin '{name}' is registered already; unregister it or choose another name")
    try:
        pm.register(plugin, name=name)
        pm.check_pending()
        _check(pm)
    except PluginError:
        unregister(name)
        raise
    except (pluggy.PluginValidationError, ValueError) as error:
        unregister(name)  # pluggy keeps what it had registered before it refused the rest
        raise PluginError(f"plugin '{name}': {error}") from error


def unregister(name: str) -> None:
    """Take back `register`."""
    manager().unregister(name=name)


def methods() -> dict[str, MethodInfo]:
    """The installed methods by name."""
    return {info.name: info for info, _ in _methods(manager()).values()}


def method(name: str) -> MethodInfo:
    """The description of one method.

    Raises:
        PluginError: no installed plugin has it; the message says what to install and what there is.
    """
    return _find(name)[0]


def call(method_name: str, hook: str, **arguments: Any) -> Any:
    """Call one hook of one method (and of the plugins that wrap it).

    The caller is made here and dropped: a kept one would let a plugin that is registered later answer too. Hooks that compute
    weights find 16-bit tensors widened to float32.

    Raises:
        PluginError: the method does not implement the hook, returned something else than it must, or changed in place the
            weight that it was lent.
    """
    info, plugin = _find(method_name)
    pm = manager()
    others = [other for _, other in _methods(pm).values() if other is not plugin]
    if hook in _WIDE_HOOKS:
        arguments |= {name: _widened(arguments[name]) for name in ("tensors", "binding")}
    weight = arguments.get("weight")
    before = None if weight is None else version(weight)
    result = pm.subset_hook_caller(hook, remove_plugins=others)(**arguments)
    where = f"method '{method_name}' ({_named(info)})" + (
        f", '{arguments['site'].path}'" if "site" in arguments else ""
    )
    if result is None:
        raise PluginError(f"{where} returned None from {hook}; it must implement the hook and return a value")
    wanted = _RETURNS.get(hook, object)
    if not isinstance(result, wanted):
        raise PluginError(f"{where}: {hook} must return an instance of {wanted.__name__}, it returned {result!r:.80}")
    if weight is not None and version(weight) != before:
        raise PluginError(
            f"{where}: {hook} changed the weight that it was given in place; compute a new tensor from it"
        )
    return result


def _widened(named: Tensors) -> Tensors:
    """Floating-point tensors in float32 or float64."""
    return {
        name: tensor.to(torch.promote_types(tensor.dtype, torch.float32)) if tensor.is_floating_point() else tensor
        for name, tensor in named.items()
    }


def add_commands(app: Any) -> None:
    """Let every plugin add its commands to the Typer `app`."""
    manager().hook.peft_cli(app=app)


def _find(name: str) -> tuple[MethodInfo, object]:
    found = {info.name: (info, plugin) for info, plugin in _methods(manager()).values()}
    if name not in found:
        present = ", ".join(sorted(found)) or "none"
        raise PluginError(
            f"method '{name}' is not installed{suggestion(name, found)}; installed: {present}. "
            f"Methods come as distributions named peft-method-NAME: pip install peft-method-{name}"
        )
    return found[name]


def _methods(pm: pluggy.PluginManager) -> dict[str, tuple[MethodInfo, object]]:
    """Plugin name → (description, plugin) of the plugins that register a method."""
    found: dict[str, tuple[MethodInfo, object]] = {}
    for implementation in pm.hook.peft_method.get_hookimpls():
        if not _observes(implementation):
            found[implementation.plugin_name] = (_describe(implementation), implementation.plugin)
    return found


def _observes(implementation: pluggy.HookImpl) -> bool:
    """Whether this wraps the hook of a method instead of being one."""
    return implementation.hookwrapper or implementation.wrapper


@functools.cache
def _describe(implementation: pluggy.HookImpl) -> MethodInfo:
    what = f"{_provider(implementation.plugin_name)}: peft_method"
    try:
        info = implementation.function()
    except Exception as error:
        raise PluginError(f"{what} failed: {error!r}; mend, reinstall or uninstall it") from error
    if not isinstance(info, MethodInfo):
        raise PluginError(f"{what} must return a MethodInfo, it returned {info!r}")
    distribution, installed = _provenance(implementation.plugin_name)
    return dataclasses.replace(info, distribution=info.distribution or distribution, version=info.version or installed)


def _check(pm: pluggy.PluginManager) -> None:
    """The rules that pluggy does not know."""
    owners: dict[str, str] = {}
    for plugin_name, (info, plugin) in _methods(pm).items():
        if info.name in owners:
            raise PluginError(
                f"method '{info.name}' is provided twice, by {_provider(owners[info.name])} and {_provider(plugin_name)}; "
                "uninstall one of the two"
            )
        owners[info.name] = plugin_name
        _check_options(info)
        _check_hooks(info, {caller.name for caller in pm.get_hookcallers(plugin) or ()})
    for hook in _METHOD_HOOKS:
        for implementation in getattr(pm.hook, hook).get_hookimpls():
            if not _observes(implementation) and implementation.plugin_name not in owners.values():
                raise PluginError(
                    f"plugin '{implementation.plugin_name}' implements {hook} but registers no method: "
                    "a plugin that only observes must use @hookimpl(wrapper=True)"
                )


def _check_options(info: MethodInfo) -> None:
    what = f"method '{info.name}' ({_named(info)}): its options"
    if not (isinstance(info.options, type) and issubclass(info.options, BaseModel)):
        raise PluginError(f"{what} must be a pydantic model, a class; they are {info.options!r}")
    if info.options.model_config.get("extra") != "forbid":
        raise PluginError(f"{what} would silently accept misspelt names; set model_config = ConfigDict(extra='forbid')")
    if required := [name for name, field in info.options.model_fields.items() if field.is_required()]:
        raise PluginError(f"{what} need defaults; '{required[0]}' has none")
    try:
        info.options.model_validate(info.options().model_dump(mode="json", warnings=False))
    except Exception as error:
        raise PluginError(f"{what} have a default that they refuse themselves: {_finding(error)}") from error


def _check_hooks(info: MethodInfo, implemented: set[str]) -> None:
    """What is required and what capabilities promise is implemented, and what is implemented is declared."""
    what = f"method '{info.name}' ({_named(info)})"
    declared = _trial_capabilities(info, what)
    required = set(_REQUIRED_HOOKS) | {
        hook for name, hook in _PROMISES.items() if any(getattr(can, name) for can in declared)
    }
    if missing := sorted(required - implemented):
        raise PluginError(f"{what} does not implement {', '.join(missing)}")
    for name in _UNHEARD:
        if _PROMISES[name] in implemented and not any(getattr(can, name) for can in declared):
            raise PluginError(
                f"{what} implements {_PROMISES[name]}, but declares {name}=True for no trial: it would never be called; "
                "declare it in its Capabilities, or remove the hook"
            )


def _trial_capabilities(info: MethodInfo, what: str) -> list[Capabilities]:
    """The capabilities under the defaults, and under each option set of the trials."""
    if not isinstance(info.trials, Sequence) or not info.trials:
        raise PluginError(
            f"{what}: trials must be a sequence of option sets, such as ({{'r': 4}},); they are {info.trials!r}"
        )
    declared = []
    for trial in ({}, *info.trials):
        try:
            can = info.can(info.options.model_validate(dict(trial)))
        except Exception as error:
            raise PluginError(f"{what}: the trial {trial!r} is not valid: {_finding(error)}") from error
        if not isinstance(can, Capabilities):
            raise PluginError(
                f"{what}: its capabilities must be a Capabilities, or a function that gives one; got {can!r}"
            )
        declared.append(can)
    return declared


def _finding(error: Exception) -> str:
    return finding(error.errors()[0]) if isinstance(error, ValidationError) else repr(error)


def _distribution(entry: importlib.metadata.EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown distribution"


def _provenance(plugin_name: str) -> tuple[str, str]:
    """(distribution, version) of an installed plugin; empty for one that was registered by hand."""
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS, name=plugin_name):
        if entry.dist:
            return entry.dist.name, entry.dist.version
    return "", ""


def _provider(plugin_name: str) -> str:
    return " ".join(_provenance(plugin_name)).strip() or f"plugin '{plugin_name}'"


def _named(info: MethodInfo) -> str:
    return f"{info.distribution} {info.version}".strip() or "registered by hand"
