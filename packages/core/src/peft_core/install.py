"""Putting an adapter's bank on its model, layer by layer, and taking it off without a trace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from . import bases, optim, plugins, quantized
from .activation import set_active
from .bank import Bank
from .bases import ROOT_PREFIX
from .errors import AdapterError, PluginError
from .gradients import SharedGradient
from .kernels import read_environment
from .layer import adapt, seen_weight
from .method import Forward
from .originals import check_choice, drop, put_aside
from .owned import OwnedWeight
from .pretrained import AdapterSaver
from .registry import Registry, create_registry, find_registry, registry_of, remove_registry
from .root import adapt_root, train_in_full
from .sites import Site, options_key
from .slots import SLOT, Member
from .subclassing import plain_class, restore_class
from .writable import is_product, refuse_unwritable


def install(
    bank: Bank,
    values: Mapping[str, Tensor],
    trainable: bool,
    keep: str | Path,
    owned: Mapping[str, Tensor],
) -> None:
    """Put an adapter on its model, and make it the only active one.

    Args:
        values: of its trainable and fixed tensors, by key. keep: where the originals of weights that the method owns wait.
        owned: site path → such a weight as it was stored; empty: the method computes it.

    Raises:
        AdapterError, MergeError: see `attach`. The model is unchanged then.
    """
    model, made = bank.root, bank.plan
    read_environment()
    check_choice(keep)
    _refuse_conflicts(bank)
    _refuse_other_weights(bank)
    registry = find_registry(model) or create_registry(model)
    before = registry.active
    if not registry.banks:
        _remember(model, registry)
        registry.packing = quantized.make_trainable(model)
    registry.banks[bank.name] = bank
    try:
        bank.register(values, trainable)
        adapt_root(model)
        _adapt_layers(bank, registry)
        if made.spec.capabilities.owns_base_weight:
            _take_over(bank, owned, keep)
        set_active(model, {bank.name: 1.0})
        for module in model.modules():
            for _, parameter in bases.own_parameters(module):
                parameter.requires_grad_(False)
        if hasattr(model, "save_pretrained"):
            model.__dict__["save_pretrained"] = AdapterSaver(model)
        optim.watch(bank)
    except BaseException:
        bank.show_owned(False)
        remove(bank)
        if registry.banks:
            set_active(model, before)
        raise


def remove(bank: Bank) -> None:
    """Take an adapter off: its tensors, its members, and with the last one every trace."""
    model, registry = bank.root, registry_of(bank.root)
    optim.forget(bank)
    for owned in bank.owned.values():
        drop(owned.original)
    del registry.banks[bank.name]
    if bank.name in registry.active:
        registry.active = {name: scale for name, scale in registry.active.items() if name != bank.name}
    for module in model.modules():  # wherever they are now
        slot = module.__dict__.get(SLOT)
        if slot is None or slot.root is not model:
            continue
        slot.members.pop(bank.name, None)
        if slot.members:
            slot.activate(registry.active)
        else:
            restore_class(module)
            del module.__dict__[SLOT]
    bank.unregister()
    if not registry.banks:
        _give_back(model, registry)
        quantized.restore(model, registry.packing)
        restore_class(model)
        remove_registry(model)


def _remember(model: nn.Module, registry: Registry) -> None:
    """Note what the first adapter changes of the base beside its layers: the parameters' flags, and how the model is saved.

    Models within this one may carry adapters too. What they remember of their flags is taken from them, and given back when this
    one's last adapter goes: then adapters can go in any order.
    """
    flags = {p: p.requires_grad for name, p in model.named_parameters() if ROOT_PREFIX not in name}
    for inner, theirs in _within(model).items():
        for name, parameter in inner.named_parameters():
            if name in theirs.requires_grad:
                flags[parameter], theirs.requires_grad[name] = theirs.requires_grad[name], False
    registry.requires_grad = {name: flags[p] for name, p in model.named_parameters() if p in flags}
    registry.save_pretrained = model.__dict__.get("save_pretrained")


def _give_back(model: nn.Module, registry: Registry) -> None:
    """Undo `_remember`."""
    named = model.named_parameters()
    flags = {p: registry.requires_grad[name] for name, p in named if name in registry.requires_grad}
    for inner, theirs in _within(model).items():
        for name, parameter in inner.named_parameters():
            if name in theirs.requires_grad and parameter in flags:
                theirs.requires_grad[name] = flags.pop(parameter)
    for parameter, flag in flags.items():
        parameter.requires_grad_(flag)
    model.__dict__.pop("save_pretrained", None)
    if registry.save_pretrained is not None:
        model.__dict__["save_pretrained"] = registry.save_pretrained


def _within(model: nn.Module) -> dict[nn.Module, Registry]:
    """The models within this one that carry adapters of their own, each once, without those within them in turn."""
    within = {}
    for child in model.children():
        theirs = find_registry(child)
        within.update(_within(child) if theirs is None else {child: theirs})
    return within


def _forward(registry: Registry, method: str, site: Site) -> Forward:
    """A method's forward at a site: one object for all adapters of a layout, so that compiled code serves them all."""
    key = method, replace(site, options=None), options_key(site.options)
    if key not in registry.forwards:
        registry.forwards[key] = plugins.call(method, "peft_forward", site=site)
    return registry.forwards[key]


def _adapt_layers(bank: Bank, registry: Registry) -> None:
    """Make the sites adapted layers, and the modules to train in full ones that can be, and tell them of this adapter."""
    model, made = bank.root, bank.plan
    shared = {
        f"{group.name}.{name}": SharedGradient()
        for group in made.groups
        if len(group.members) > 1
        for name in group.tensors
    }
    for site in made.sites:
        module = model.get_submodule(site.path)
        slot = module.__dict__.get(SLOT) or adapt(module, model)
        keys = bank.borrowed[site.path]
        slot.members[bank.name] = Member(
            adapter=bank.name,
            method=made.spec.method,
            site=site,
            functions=_forward(registry, made.spec.method, site),
            can=made.spec.info.can(site.options),
            names=[(name, bank.root_name(key)) for name, key in keys.items()],
            fixed=[(name, bank.root_name(key)) for name, key in bank.bound[site.path].items()],
            shared={name: shared[key] for name, key in keys.items() if key in shared},
            dropout=made.spec.dropout,
        )
    for path, named in bank.trained.items():
        module = model.get_submodule(path)
        in_full = module.__dict__.get(SLOT) or train_in_full(module, model)
        in_full.members[bank.name] = named


def _take_over(bank: Bank, owned: Mapping[str, Tensor], keep: str | Path) -> None:
    """Let the method move weight into the base: as it computes it, or as it was stored."""
    for site in bank.plan.sites:
        module = bank.root.get_submodule(site.path)
        if bases.is_quantized(module) or module.weight.device.type == "meta":
            what = "quantized" if bases.is_quantized(module) else "on the meta device"
            raise AdapterError(f"'{site.path}' is {what}; method '{bank.plan.spec.method}' needs to write its weight")
    refuse_unwritable(bank.root, list(bank.sites))
    if keep == "none":  # there will be no way back: see first that the method can do it everywhere
        for site in bank.plan.sites:
            _moved(bank, site, owned)
    for site in bank.plan.sites:
        module = bank.root.get_submodule(site.path)
        moved = _moved(bank, site, owned)
        kept = put_aside(module.weight, f"{site.path}.before-{bank.name}", keep)  # type: ignore[arg-type]
        master = moved if moved.dtype != module.weight.dtype else None
        bank.owned[site.path] = OwnedWeight(kept, master)
        bases.write_weight(module, moved, site.transposed)


@torch.no_grad()
def _moved(bank: Bank, site: Site, stored: Mapping[str, Tensor]) -> Tensor:
    """The weight that the base is to hold at a site (out × in): as stored, or as the method computes it."""
    weight = bases.dense_weight(bank.root.get_submodule(site.path))
    moved = stored.get(site.path)
    if moved is None:
        moved = plugins.call(
            bank.plan.spec.method,
            "peft_attach",
            site=site,
            weight=weight.clone(),
            tensors={name: tensor.detach() for name, tensor in bank.tensors(site.path).items()},
            binding=bank.binding(site.path),
        )
        if moved.shape != weight.shape:
            raise PluginError(
                f"method '{bank.plan.spec.method}': peft_attach returned {list(moved.shape)} for '{site.path}', expected "
                f"{list(weight.shape)} (out × in)"
            )
    return moved.to(weight.device)  # type: ignore[no-any-return]


def _refuse_other_weights(new: Bank) -> None:
    """A method whose Δ depends on the base weight must find the one that the layer multiplies by."""
    for path, site in new.sites.items():
        module = new.root.get_submodule(path)
        reads = not new.plan.spec.info.can(site.options).additive
        if reads and not bases.is_quantized(module) and not seen_weight(module).is_meta and not is_product(module):
            raise AdapterError(
                f"'{path}' is a {plain_class(type(module)).__name__}, whose own forward gives something else than x Wᵀ + b, and "
                f"method '{new.plan.spec.method}' computes with W; exclude the layer"
            )


def _refuse_conflicts(new: Bank) -> None:
    """A site whose weight is owned by a method can carry no other adapter; and a merged site must be left alone by it."""
    model, made = new.root, new.plan
    for path in (*new.sites, *new.trained):
        slot = model.get_submodule(path).__dict__.get(SLOT)
        if slot is not None and slot.root is not model:
            raise AdapterError(
                f"'{path}' carries an adapter of {type(slot.root).__name__}, another model that holds this layer; attach to that "
                "one, or detach its adapters first"
            )
    mine = made.spec.capabilities.owns_base_weight
    registry = find_registry(model)
    for other, bank in registry.banks.items() if registry else ():
        theirs = bool(bank.owned)
        taken = bank.sites.keys()
        both = sorted((new.sites.keys() | new.trained.keys()) & taken) if mine or theirs else []
        if both:
            owner = made.spec.method if mine else bank.plan.spec.method
            raise AdapterError(
                f"'{both[0]}' carries the adapter '{other}', and method '{owner}' owns its base weight: "
                "they cannot share a layer; detach one or choose other targets"
            )
        crossed = sorted((new.trained.keys() & taken) | (new.sites.keys() & bank.trained.keys()))
        if crossed:
            raise AdapterError(
                f"the adapters '{other}' and '{new.name}' cannot share '{crossed[0]}': one trains it in full, the other adapts it"
            )
