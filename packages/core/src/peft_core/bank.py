"""The bank owns the tensors of one adapter.

Parameters are registered directly on the root model, under names that no module path can have, and not in a submodule:
a root that iterates over its children (nn.Sequential) must not find a new one. Everything that walks a model's
parameters (optimizers, `.to()`, DDP, FSDP2, state_dict) then finds each exactly once.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from .bases import ROOT_PREFIX, own_parameters
from .errors import AdapterError
from .owned import OwnedWeight
from .plan import Plan
from .progress import Progress
from .sharing import stand_ins
from .sites import Site
from .slots import SLOT, Member, Slot, TrainedSlot


class Bank:
    """The tensors of one adapter.

    Attributes:
        root, name, plan, seed: of the adapter. sites: by path. stand_ins: see `sharing.stand_ins`.
        borrowed, bound: site path → name of a tensor → its key, as `Plan.borrowed` and `Plan.bound` say.
        trained: path of a module trained in full, or of one within that owns parameters → its own parameters' names → name on
            the root of what stands in for them, also where they are tied.
        state: key → training-only tensor (on the CPU). owned: site path → its weight, for methods that own it.
        progress: of its training.
        merged_scale: the run-time scale at which the adapter was merged, if it is.
    """

    def __init__(self, root: nn.Module, name: str, plan: Plan, seed: int) -> None:
        self.root = root
        self.name = name
        self.plan = plan
        self.seed = seed
        self.state: dict[str, Tensor] = {}
        self.owned: dict[str, OwnedWeight] = {}
        self.progress = Progress()
        self.merged_scale = 1.0
        self.sites = {site.path: site for site in plan.sites}
        self.stand_ins = stand_ins(plan.trained)
        self.trained = dict(self._stand_ins_by_owner())
        self.borrowed, self.bound = plan.borrowed(), plan.bound()

    def root_name(self, key: str) -> str:
        """The name under which the root model holds a tensor: without dots, and another for every key."""
        escaped = key.replace("%", "%25").replace("/", "%2F")
        return f"{ROOT_PREFIX}{self.name}/{escaped.replace('.', '/')}"

    def _stand_ins_by_owner(self) -> Iterator[tuple[str, dict[str, str]]]:
        """The items of `trained`: a tied parameter is one object under several names, and found by it under each."""
        for path, named in self.plan.trained.items():
            top = self.root.get_submodule(path)
            keys = {id(top.get_parameter(local)): key for local, key in named.items()}
            for inner, module in top.named_modules(prefix=path):
                own = {local: self.root_name(keys[id(p)]) for local, p in own_parameters(module)}
                if own or inner == path:
                    yield inner, own

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(key, parameter) of every trainable tensor, as they are now: FSDP and others replace them."""
        for key, _ in self.plan.tensors():
            yield key, self.parameter(key)

    def parameter(self, key: str) -> nn.Parameter:
        """One trainable tensor, as it is now."""
        return self.root._parameters[self.root_name(key)]  # type: ignore[return-value]

    def buffer(self, key: str) -> Tensor:
        """One fixed tensor, as it is now."""
        return self.root._buffers[self.root_name(key)]  # type: ignore[return-value]

    def tensors(self, path: str) -> dict[str, nn.Parameter]:
        """A site's borrowed parameters by name."""
        return {name: self.parameter(key) for name, key in self.borrowed[path].items()}

    def binding(self, path: str) -> dict[str, Tensor]:
        """A site's fixed tensors by name."""
        return {name: self.buffer(key) for name, key in self.bound[path].items()}

    def named_fixed(self) -> Iterator[tuple[str, Tensor]]:
        """(key, buffer) of every fixed tensor, each once."""
        for key, _ in self.plan.fixed():
            yield key, self.buffer(key)

    def owned_weight(self, site: Site) -> Tensor:
        """The weight (out × in) that the method moved into the base at a site. See `OwnedWeight.current`."""
        return self.owned[site.path].current(self.root.get_submodule(site.path), site)

    def write_owned_weight(self, site: Site, weight: Tensor) -> None:
        """Give a site that the method owns another weight (out × in)."""
        self.owned[site.path].write(self.root.get_submodule(site.path), weight, site)

    def loaded_into(self, module: nn.Module, site: Site) -> None:
        """`load_state_dict` has given a site's module another weight."""
        if site.path in self.owned:
            self.owned[site.path].follow(module)
        if self.progress.steps and self.state:
            warnings.warn(
                f"adapter '{self.name}' is in training, and a state_dict was loaded that holds neither the training state of "
                f"method '{self.plan.spec.method}' nor its count of steps; to go back to an earlier step, use Adapter.save and "
                "Adapter.restore",
                stacklevel=2,
            )

    def show_owned(self, show: bool) -> None:
        """Let the base hold the weights that the method moved, or the original ones."""
        for path, owned in self.owned.items():
            if self._slot(path) is not None:
                (owned.show if show else owned.hide)(self.root.get_submodule(path))

    def slot(self, path: str) -> Slot | TrainedSlot:
        """What the module at a path knows of its adapters.

        Raises:
            AdapterError: it is not the module that this adapter was attached to.
        """
        found = self._slot(path)
        if found is None:
            raise AdapterError(
                f"'{path}' was replaced or taken away after adapter '{self.name}' was attached; detach the adapter, and attach "
                "or load it on the model as it is now"
            )
        return found

    def check_in_place(self) -> None:
        """See that the model still has all the modules that this adapter was attached to. See `slot` for the error."""
        for path in (*self.sites, *self.trained):
            self.slot(path)

    def _slot(self, path: str) -> Slot | TrainedSlot | None:
        try:
            slot: Slot | TrainedSlot = self.root.get_submodule(path).__dict__[SLOT]
            member = slot.members[self.name]
        except (AttributeError, KeyError):
            return None
        moved = isinstance(member, Member) and member.site.path != path
        return None if moved else slot

    def site_state(self, path: str) -> dict[str, Tensor]:
        """A site's training-only tensors by name."""
        groups = (group for group in self.plan.groups if path in group.members)
        return {name: self.state[f"{group.name}.{name}"] for group in groups for name in group.state}

    def register(self, values: Mapping[str, Tensor], trainable: bool) -> None:
        """Put the adapter's values, by key, on the root model: what is trained as parameters, what is fixed as non-persistent
        buffers.
        """
        for key, _ in self.plan.tensors():
            self.root._parameters[self.root_name(key)] = nn.Parameter(values[key], requires_grad=trainable)
        for key, _ in self.plan.fixed():
            self.root._buffers[self.root_name(key)] = values[key]
            self.root._non_persistent_buffers_set.add(self.root_name(key))

    def unregister(self) -> None:
        """Take everything off the root model."""
        prefix = f"{ROOT_PREFIX}{self.name}/"
        for held in (self.root._parameters, self.root._buffers):
            for name in [name for name in held if name.startswith(prefix)]:
                del held[name]
        for name in [name for name in self.root._non_persistent_buffers_set if name.startswith(prefix)]:
            self.root._non_persistent_buffers_set.discard(name)
