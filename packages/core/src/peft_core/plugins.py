"""Finding method plugins, and calling the hooks of one of them."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from typing import Any

import pluggy
import torch
from pydantic import BaseModel

from . import hookspecs
from .errors import PluginError, suggestion
from .method import MethodInfo, Tensors

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
            raise PluginError(f"{source} cannot be imported: {error!r}; reinstall or uninstall it") from error
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
    except (pluggy.PluginValidationError, ValueError) as error:
        raise PluginError(f"plugin '{name}': {error}") from error
    try:
        pm.check_pending()
        _check(pm)
    except PluginError:
        unregister(name)
        raise
    except pluggy.PluginValidationError as error:
        unregister(name)
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
        PluginError: the method does not implement the hook, or returned nothing.
    """
    info, plugin = _find(method_name)
    pm = manager()
    others = [other for _, other in _methods(pm).values() if other is not plugin]
    if hook in _WIDE_HOOKS:
        arguments |= {name: _widened(arguments[name]) for name in ("tensors", "binding")}
    result = pm.subset_hook_caller(hook, remove_plugins=others)(**arguments)
    if result is None:
        raise PluginError(
            f"method '{method_name}' ({_named(info)}) returned None from {hook}; it must implement the hook and return a value"
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


def validate_options(info: MethodInfo, options: dict[str, Any]) -> BaseModel:
    """The method's options, complete and checked. pydantic's error is the caller's to explain."""
    return info.options.model_validate(options)


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
        if implementation.hookwrapper or implementation.wrapper:
            continue
        found[implementation.plugin_name] = (_describe(implementation), implementation.plugin)
    return found


@functools.cache
def _describe(implementation: pluggy.HookImpl) -> MethodInfo:
    info = implementation.function()
    if not isinstance(info, MethodInfo):
        raise PluginError(
            f"plugin '{implementation.plugin_name}': peft_method must return a MethodInfo, it returned {info!r}"
        )
    distribution, version = _provenance(implementation.plugin_name)
    return dataclasses.replace(info, distribution=info.distribution or distribution, version=info.version or version)


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
        implemented = {caller.name for caller in pm.get_hookcallers(plugin) or ()}
        required = set(_REQUIRED_HOOKS)
        if not callable(info.capabilities):
            required |= {hook for can, hook in _PROMISES.items() if getattr(info.capabilities, can)}
        if missing := sorted(required - implemented):
            raise PluginError(f"method '{info.name}' ({_named(info)}) does not implement {', '.join(missing)}")
    for hook in _METHOD_HOOKS:
        for implementation in getattr(pm.hook, hook).get_hookimpls():
            observes = implementation.hookwrapper or implementation.wrapper
            if not observes and implementation.plugin_name not in owners.values():
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
