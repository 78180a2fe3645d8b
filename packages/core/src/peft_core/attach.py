"""Attaching: the adapter handle, and which adapters of a model are active."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from . import bases, checkpoint, merge, optim, plugins
from .bank import (
    Bank,
    Registry,
    device_of,
    forget,
    homes,
    initial_fixed,
    initial_state,
    initial_tensors,
    registry,
)
from .errors import AdapterError, MergeError, suggestion
from .gradients import SharedGradient
from .layer import SLOT, AdaptedLinear, AdaptedRoot, Member, Slot, Trained, TrainedSlot, undress, wear
from .originals import check_choice, drop, put_aside
from .owned import OwnedWeight
from .plan import ROOT_PREFIX, Plan, plan
from .sites import Site
from .spec import AdapterSpec


class Adapter:
    """The handle on one attached adapter.

    Attributes:
        name, plan: as attached.
    """

    def __init__(self, bank: Bank) -> None:
        self._bank = bank
        self.name = bank.name
        self.plan = bank.plan

    @property
    def model(self) -> nn.Module:
        """The model that carries the adapter."""
        return self._bank.root

    @property
    def num_trainable(self) -> int:
        """Trainable parameters, each counted once."""
        return self.plan.num_trainable

    @property
    def steps(self) -> int:
        """Real optimizer steps so far, over resumes (counted for methods that act on them)."""
        return self._bank.steps

    @property
    def total_steps(self) -> int | None:
        """Length of the run in optimizer steps, for methods with a schedule. Trainers fill it in."""
        return self._bank.total_steps

    @total_steps.setter
    def total_steps(self, value: int | None) -> None:
        self._bank.total_steps = value

    @property
    def active(self) -> bool:
        """Whether the model's forward applies it (as a separate part; a merged adapter is not active)."""
        return self.name in self._registry().active

    @property
    def merged(self) -> bool:
        """Whether it is merged into the base's weights."""
        return self._registry().is_merged(self.name)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trainable parameters: what an optimizer is given."""
        return (parameter for _, parameter in self.named_parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(key, parameter), with the keys of the checkpoint."""
        self._registry()
        return self._bank.named_parameters()

    def save(self, directory: str | Path) -> None:
        """Write the adapter to a directory; see `peft_core.checkpoint`.

        Raises:
            CheckpointError: it cannot be written; what was there is unchanged.
            OptimizerStepError: the method needs optimizer steps and none was seen though gradients came.
        """
        self._registry()
        checkpoint.save(self._bank, directory)

    def restore(self, directory: str | Path) -> None:
        """Take over the values of a saved adapter of the same layout, in place: optimizers, compiled code and wrappers
        around the model go on as they are. For resuming, and for exchanging one adapter for another.

        Raises:
            CheckpointError: the directory is damaged, or its adapter has another layout (method, options, layers,
                dtypes); nothing has changed then. AdapterError: this adapter is merged.
        """
        self._registry()
        if self.merged:
            raise AdapterError(f"adapter '{self.name}' is merged; unmerge it to give it other values")
        bank = self._bank
        header = checkpoint.read_header(directory)
        checkpoint.check_fit(directory, header, self.model)
        checkpoint.check_layout(directory, header, bank)
        stored = checkpoint.read(directory, header)
        state = checkpoint.read_state(directory, header, self.plan) if bank.state else {}
        with torch.no_grad():
            for key, parameter in bank.named_parameters():
                parameter.copy_(_sharded_like(parameter, stored[key]))
            for key, buffer in bank.named_fixed():
                buffer.copy_(stored[key])
            for key, value in state.items():
                bank.state[key].copy_(value)
            for path in bank.owned:
                bank.write_owned_weight(bank.sites[path], stored[f"{checkpoint.OWNED}{path}"])
        bank.seed, bank.steps = header.seed, header.steps
        bank.backwards, bank.fresh_gradient = 0, False
        bank.stepped_by.clear()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The model without this adapter: the base's output bit for bit, if it is the only one.

        Raises:
            MergeError, AdapterError: it is merged, or owns its base weight, and the original was not kept; or it is merged, and
                an active adapter cannot be carried beside it.
        """
        found = self._registry()
        before = dict(found.active)
        merged = self.merged
        if merged:
            self.unmerge()
            before_unmerge, before = before, dict(found.active)
        active = self.name in found.active
        if active:
            _set_active(self.model, {name: scale for name, scale in before.items() if name != self.name})
        try:
            yield
        finally:
            if active:
                _set_active(self.model, before)
            if merged:
                self.merge(self._bank.merged_keep)
                _set_active(self.model, before_unmerge)

    def merge(self, keep: str | Path = "host") -> None:
        """Put the adapter into the base's weights; forward then costs what the base costs.

        Args:
            keep: where the original weights wait for `unmerge`: `host` (memory), a directory, or `none`.

        Raises:
            AdapterError: it is merged already. MergeError: a weight is tied to another layer, or offloaded, or the originals
                cannot be kept there. Nothing has changed then.
        """
        found = self._registry()
        if self.merged:
            raise AdapterError(f"adapter '{self.name}' is merged already")
        scale = found.active.get(self.name, 1.0)
        merge.merge(self.model, found, self._bank, scale, keep)
        self._bank.merged_scale, self._bank.merged_keep = scale, keep
        _set_active(self.model, {name: scale for name, scale in found.active.items() if name != self.name})

    def unmerge(self) -> None:
        """Restore the base's weights bit for bit, and make the adapter active again.

        Raises:
            AdapterError: it is not merged, or an active adapter cannot be carried beside it. MergeError: the original
                weights were not kept. Nothing has changed then.
        """
        found = self._registry()
        if not self.merged:
            raise AdapterError(f"adapter '{self.name}' is not merged")
        active = {**found.active, self.name: self._bank.merged_scale}
        _refuse_together(found, active)
        merge.unmerge(self.model, found, self._bank)
        _set_active(self.model, active)

    def merge_and_detach(self) -> nn.Module:
        """Leave a plain model with the merged weights, for good; no copy of the originals is kept.

        Returns:
            The model, for convenience: it is changed in place.
        """
        model = self.model
        if not self.merged:
            self.merge(keep="none")
        merge.settle(model, self._bank, self._registry())
        _remove(model, self._bank)
        return model

    def detach(self) -> None:
        """Leave the model as it was, without a trace.

        Raises:
            AdapterError: the adapter is merged. MergeError: it owns base weights whose originals were not kept.
        """
        if self.merged:
            raise AdapterError(f"adapter '{self.name}' is merged; unmerge it first, or use merge_and_detach()")
        if lost := [path for path, owned in self._bank.owned.items() if owned.original is None]:
            raise MergeError(f"'{lost[0]}': the original weight was not kept (attach with keep='host' to detach)")
        self._bank.show_owned(False)
        _remove(self.model, self._bank)

    def __repr__(self) -> str:
        if self.name not in getattr(registry(self.model), "banks", {}):
            return f"Adapter('{self.name}', detached)"
        state = "merged" if self.merged else "active" if self.active else "inactive"
        return f"Adapter('{self.name}', {self.plan.spec.method}, {self.num_trainable:,} parameters, {state})"

    def _registry(self) -> Registry:
        found = registry(self.model)
        if found is None or found.banks.get(self.name) is not self._bank:
            raise AdapterError(f"adapter '{self.name}' has been detached")
        return found


def attach(
    model: nn.Module, spec: AdapterSpec, name: str = "default", seed: int = 0, keep: str | Path = "host"
) -> Adapter:
    """Plan a spec on a model and put the adapter on it, in place. The base is frozen; only the new adapter is active.

    Args:
        name: of the adapter; letters, digits, `_` and `-`. seed: of its initial values and random decisions.
        keep: for methods that own the base weight, where the originals wait: `host` (memory), a directory, or `none`;
            without them the adapter can be neither disabled nor detached.

    Raises:
        TargetError, PlanError: the spec does not fit the model. AdapterError: the name is taken, the model is wrapped for
        parallel training already, another adapter stands on a site that one of the two needs for itself, sites that share
        tensors are on several devices, or a weight that the method starts from is offloaded. MergeError: the originals
        cannot be kept there. PluginError: an initialiser made another shape. The model is unchanged then.
    """
    model = bases.unwrap(model, to_attach=True)
    _check_name(model, name)
    made = plan(model, spec)
    _refuse_divided(model, made)
    bank = Bank(model, name, made, seed)
    bank.state = initial_state(made, seed)
    home = homes(model, made)
    return _install(
        bank,
        initial_tensors(model, made, seed, home),
        initial_fixed(model, made, seed, home),
        trainable=True,
        keep=keep,
        owned={},
    )


def load(
    model: nn.Module,
    directory: str | Path,
    name: str = "default",
    trainable: bool = False,
    keep: str | Path = "host",
) -> Adapter:
    """Put a saved adapter on a model. With `trainable`, training goes on from where it was saved.

    Raises:
        CheckpointError: the directory is no adapter, is damaged, or belongs to another base model.
        PluginError: its method is not installed. AdapterError: the name is taken, or the model is wrapped for parallel
            training already.
    """
    model = bases.unwrap(model, to_attach=True)
    _check_name(model, name)
    header = checkpoint.read_header(directory)
    checkpoint.check_fit(directory, header, model)
    made = plan(model, checkpoint.spec_of(header))
    checkpoint.check_plan(directory, header, made)
    _refuse_divided(model, made)
    stored = checkpoint.read(directory, header)
    bank = Bank(model, name, made, header.seed)
    bank.steps = header.steps
    if trainable:
        bank.state = checkpoint.read_state(directory, header, made)
    home = homes(model, made)
    tensors = {key: stored[key].to(home[key]) for key, _ in made.tensors()}
    fixed = {key: stored[key].to(home[key]) for key, _ in made.fixed()}
    owned = {path: stored[f"{checkpoint.OWNED}{path}"] for path in header.owned}
    return _install(bank, tensors, fixed, trainable=trainable, keep=keep, owned=owned)


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters on a model by name, in the order in which they came."""
    found = registry(bases.unwrap(model))
    return {name: Adapter(bank) for name, bank in found.banks.items()} if found else {}


def activate(model: nn.Module, names: str | Sequence[str] | Mapping[str, float]) -> None:
    """Choose the adapters that forward applies: one, several in order, or a map from name to a run-time scale.

    Raises:
        AdapterError: no such adapter, a merged one, or two that one site cannot carry together.
    """
    model = bases.unwrap(model)
    names = [names] if isinstance(names, str) else names
    for name in names:
        if not isinstance(name, str):
            raise AdapterError(f"activate: {name!r} is no name of an adapter; the choice is one for the whole batch")
    wanted = dict(names) if isinstance(names, Mapping) else dict.fromkeys(names, 1.0)
    found = registry(model)
    known = found.banks if found else {}
    for name in wanted:
        if name not in known:
            raise AdapterError(
                f"no adapter '{name}' on this model{suggestion(name, known)}; there are: {', '.join(known) or 'none'}"
            )
        if found and found.is_merged(name):
            raise AdapterError(f"adapter '{name}' is merged; unmerge it to make it active")
    _set_active(model, {name: float(scale) for name, scale in wanted.items()})


def _check_name(model: nn.Module, name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise AdapterError(f"adapter name '{name}': use letters, digits, '_' and '-'")
    found = registry(model)
    if found and name in found.banks:
        raise AdapterError(f"an adapter '{name}' is attached already; detach it or choose another name")


def _install(
    bank: Bank,
    tensors: Mapping[str, Tensor],
    fixed: Mapping[str, Tensor],
    trainable: bool,
    keep: str | Path,
    owned: Mapping[str, Tensor],
) -> Adapter:
    model, made = bank.root, bank.plan
    check_choice(keep)
    _refuse_conflicts(model, made, bank.name)
    found = registry(model, create=True)
    assert found is not None
    before = found.active
    if not found.banks:
        found.frozen = {name: p.requires_grad for name, p in model.named_parameters()}
    found.banks[bank.name] = bank
    bank.register(tensors, fixed, trainable)
    if not isinstance(model, AdaptedRoot):
        wear(model, AdaptedRoot)
    try:
        if made.spec.capabilities.owns_base_weight:
            _take_over(bank, owned, keep)
        _dress(bank, _functions(found, made))
        _set_active(model, {bank.name: 1.0})
    except BaseException:
        bank.show_owned(False)
        _remove(model, bank)
        if found.banks:
            _set_active(model, before)
        raise
    for module in model.modules():
        for _, parameter in bases.own_parameters(module):
            parameter.requires_grad_(False)
    if hasattr(model, "save_pretrained"):
        model.__dict__["save_pretrained"] = _AdapterSaver(model)
    optim.watch(bank)
    return Adapter(bank)


def _functions(found: Registry, made: Plan) -> dict[str, Any]:
    """Each site's forward; one object for equal sites, so that compiled code serves all adapters of a layout."""
    out = {}
    for site in made.sites:
        key = (made.spec.method, repr(site))
        if key not in found.forwards:
            found.forwards[key] = plugins.call(made.spec.method, "peft_forward", site=site)
        out[site.path] = found.forwards[key]
    return out


def _dress(bank: Bank, functions: Mapping[str, Any]) -> None:
    model, made = bank.root, bank.plan
    found = registry(model)
    assert found is not None
    shared = {
        f"{group.name}.{name}": found.gradients.setdefault(bank.root_name(f"{group.name}.{name}"), SharedGradient())
        for group in made.groups
        if len(group.members) > 1
        for name in group.tensors
    }
    for site in made.sites:
        module = model.get_submodule(site.path)
        if SLOT not in module.__dict__:
            base = bases.describe(module)
            assert base is not None
            wear(module, AdaptedLinear)
            module.__dict__[SLOT] = Slot(model, base.transposed, base.fused)
        keys = bank.site_keys(site.path)
        module.__dict__[SLOT].members[bank.name] = Member(
            adapter=bank.name,
            method=made.spec.method,
            site=site,
            functions=functions[site.path],
            can=made.spec.info.can(site.options),
            names=[(name, bank.root_name(key)) for name, key in keys.items()],
            fixed=[(name, bank.root_name(key)) for name, key in bank.bound_keys(site.path).items()],
            shared={name: shared[key] for name, key in keys.items() if key in shared},
            dropout=made.spec.dropout,
        )
    for path, named in made.trained.items():
        module = model.get_submodule(path)
        if SLOT not in module.__dict__:
            wear(module, Trained)
            module.__dict__[SLOT] = TrainedSlot(model)
        slot = module.__dict__[SLOT]
        slot.members[bank.name] = tuple((local, bank.root_name(key)) for local, key in named.items())


def _take_over(bank: Bank, owned: Mapping[str, Tensor], keep: str | Path) -> None:
    """Let the method move weight into the base: as it computes it, or as it was stored."""
    for site in bank.plan.sites:
        module = bank.root.get_submodule(site.path)
        if bases.is_quantized(module) or module.weight.device.type == "meta":
            what = "quantized" if bases.is_quantized(module) else "on the meta device"
            raise AdapterError(f"'{site.path}' is {what}; method '{bank.plan.spec.method}' needs to write its weight")
    merge.refuse_unwritable(bank.root, list(bank.sites))
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
    """What the base shall hold at a site (out × in): as stored, or as the method computes it."""
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
    return moved.to(weight.device)  # type: ignore[no-any-return]


def _refuse_conflicts(model: nn.Module, made: Plan, name: str) -> None:
    """A site whose weight is owned by a method can carry no other adapter; and a merged site must be left alone by it."""
    for path in (*(site.path for site in made.sites), *made.trained):
        slot = model.get_submodule(path).__dict__.get(SLOT)
        if slot is not None and slot.root is not model:
            raise AdapterError(
                f"'{path}' carries an adapter of {type(slot.root).__name__}, another model that holds this layer; attach to that "
                "one, or detach its adapters first"
            )
    mine = made.spec.capabilities.owns_base_weight
    places = {site.path for site in made.sites}
    for other, adapter in adapters(model).items():
        theirs = bool(adapter._bank.owned)
        taken = adapter._bank.sites.keys()
        both = sorted((places | made.trained.keys()) & taken) if mine or theirs else []
        if both:
            owner = made.spec.method if mine else adapter.plan.spec.method
            raise AdapterError(
                f"'{both[0]}' carries the adapter '{other}', and method '{owner}' owns its base weight: "
                "they cannot stand on one layer; detach one or choose other targets"
            )
        crossed = sorted((made.trained.keys() & taken) | (places & adapter.plan.trained.keys()))
        if crossed:
            raise AdapterError(
                f"'{crossed[0]}' is trained in full by one of the adapters '{other}' and '{name}' and adapted by the other"
            )


def _refuse_divided(model: nn.Module, made: Plan) -> None:
    """A tensor lies on one device; sites on several cannot borrow it."""
    for group in [group for group in made.groups if len(group.members) > 1]:
        devices = {path: device_of(model, path) for path in group.members}
        real = {(device.type, device.index or 0): path for path, device in devices.items() if device.type != "meta"}
        if len(real) > 1:
            here, there, *_ = real.values()
            raise AdapterError(
                f"'{here}' is on {devices[here]} and '{there}' on {devices[there]}, and method '{made.spec.method}' lets them "
                "share tensors; load the model on one device, or choose targets on one"
            )


def _set_active(model: nn.Module, scales: dict[str, float]) -> None:
    found = registry(model)
    assert found is not None
    _refuse_together(found, scales)
    # Sites at which nothing was active and nothing will be are left alone: the cost does not grow with idle adapters.
    concerned = [found.banks[name] for name in {**found.active, **scales}]
    owning = [bank for bank in concerned if bank.owned and not found.is_merged(bank.name)]
    for bank in owning:
        hides = bank.name in found.active and bank.name not in scales
        if hides and any(owned.original is None for owned in bank.owned.values()):
            raise AdapterError(
                f"adapter '{bank.name}' owns its base weights and the originals were not kept (attach with keep='host')"
            )
    for bank in owning:
        bank.show_owned(bank.name in scales)
    found.active = scales
    for path in {path: None for bank in concerned for path in (*bank.sites, *bank.plan.trained)}:
        model.get_submodule(path).__dict__[SLOT].activate(scales)


def _refuse_together(found: Registry, scales: Mapping[str, float]) -> None:
    carried: dict[str, str] = {}
    for name in scales:
        bank = found.banks[name]
        for path in bank.sites:
            other = carried.setdefault(path, name)
            if other == name:
                continue
            for one in (found.banks[other], bank):
                if one.plan.spec.info.can(one.sites[path].options).exclusive:
                    raise AdapterError(
                        f"'{path}' cannot carry '{other}' and '{name}' at once: method '{one.plan.spec.method}' is not an "
                        "added Δ; activate one of them alone, or detach the other first"
                    )


def _sharded_like(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """A whole tensor as FSDP2 has divided the parameter."""
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(parameter.device), mesh, parameter.placements)  # type: ignore[attr-defined]


def _plain_trainer() -> Any:
    """A Trainer that is saving now and, at its end, would fail to load its best checkpoint, and go on with the last weights.

    transformers tells a model nothing of who saves it; the Trainer is found among the callers.
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        caller: Any = frame.f_locals.get("self")
        asked = getattr(getattr(caller, "args", None), "load_best_model_at_end", False)
        if asked and hasattr(caller, "_load_best_model"):
            return None if hasattr(caller, "restores_adapters") else caller
        frame = frame.f_back
    return None


class _AdapterSaver:
    """Stands in for `save_pretrained` on a model with adapters, which would save the base and drop them without a word."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, save_directory: str | Path, **options: Any) -> None:
        """Save the adapters: the only one in `save_directory`, several in a directory each below it.

        Raises:
            AdapterError: an adapter is merged (so it is not clear what is to be saved), `push_to_hub` is asked for, or
                the caller is a plain Trainer that would at its end fail to load its best checkpoint, and go on.
        """
        if (trainer := _plain_trainer()) is not None:
            raise AdapterError(
                f"{type(trainer).__name__} cannot load an adapter back for load_best_model_at_end; use peft_core.AdapterTrainer "
                "(or AdapterTrainerMixin before the trainer's class)"
            )
        present = adapters(self.model)
        for adapter in present.values():
            if adapter.merged:
                raise AdapterError(
                    f"save_pretrained: adapter '{adapter.name}' is merged but still attached; call merge_and_detach() to save "
                    "the merged model, or adapter.save(directory) for the adapter"
                )
        if options.get("push_to_hub"):
            raise AdapterError(
                "save_pretrained: push_to_hub is not supported for adapters; save to a directory and upload it"
            )
        for adapter in present.values():
            adapter.save(save_directory if len(present) == 1 else Path(save_directory) / adapter.name)


def _remove(model: nn.Module, bank: Bank) -> None:
    """Take an adapter off: its tensors, its members, and with the last one every trace."""
    found = registry(model)
    assert found is not None
    optim.forget(bank)
    for owned in bank.owned.values():
        drop(owned.original)
    del found.banks[bank.name]
    if bank.name in found.active:
        found.active = {name: scale for name, scale in found.active.items() if name != bank.name}
    for path in [*bank.sites, *bank.plan.trained]:
        module = model.get_submodule(path)
        slot = module.__dict__.get(SLOT)
        if slot is None:  # replaced by a dense layer, or never dressed
            continue
        slot.members.pop(bank.name, None)
        if slot.members:
            slot.activate(found.active)
        else:
            undress(module)
    for key in [key for key in found.gradients if key.startswith(f"{ROOT_PREFIX}{bank.name}/")]:
        del found.gradients[key]
    bank.unregister()
    if not found.banks:
        for name, parameter in model.named_parameters():
            if name in found.frozen:
                parameter.requires_grad_(found.frozen[name])
        model.__dict__.pop("save_pretrained", None)
        undress(model)
        forget(model)
