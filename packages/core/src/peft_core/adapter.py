"""The handle on one attached adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path

from torch import nn

from . import checkpoint, merge
from .activation import refuse_together, set_active
from .bank import Bank
from .errors import AdapterError, MergeError
from .install import remove
from .registry import Registry, find_registry
from .unwrapping import unwrap


class Adapter:
    """The handle on one attached adapter.

    Attributes:
        name, plan: as attached. bank: the owner of its tensors.
    """

    def __init__(self, bank: Bank) -> None:
        self.bank = bank
        self.name = bank.name
        self.plan = bank.plan

    @property
    def model(self) -> nn.Module:
        """The model that carries the adapter."""
        return self.bank.root

    @property
    def num_trainable(self) -> int:
        """Trainable parameters, each counted once."""
        return self.plan.num_trainable

    @property
    def steps(self) -> int:
        """Real optimizer steps so far, over resumes and runs (counted for methods that act on them)."""
        return self.bank.progress.steps

    @property
    def total_steps(self) -> int | None:
        """Length of the run in optimizer steps, for methods with a schedule. Trainers fill it in."""
        return self.bank.progress.total_steps

    @total_steps.setter
    def total_steps(self, value: int | None) -> None:
        if value is not None and not (isinstance(value, Integral) and value >= 1):
            raise AdapterError(f"total_steps: expected a positive whole number of optimizer steps, got {value!r:.80}")
        self.bank.progress.total_steps = value

    def begin_run(self, total_steps: int | None = None) -> None:
        """Let a new run of this length begin with the next optimizer step: a schedule starts anew. Trainers call it unless they
        resume. A loop needs it where an adapter that was trained before is trained again, not where it goes on.
        """
        self.total_steps = total_steps
        self.bank.progress.run_start = self.steps

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
        return self.bank.named_parameters()

    def save(self, directory: str | Path) -> None:
        """Write the adapter to a directory; see `peft_core.checkpoint`. Where several processes train, all of them call this:
        it gathers what is sharded, and the first of them writes.

        Raises:
            CheckpointError: it cannot be written; what was there is unchanged.
            OptimizerStepError: the method needs optimizer steps and none was seen though gradients came.
        """
        self._registry()
        checkpoint.save(self.bank, directory)

    def restore(self, directory: str | Path) -> None:
        """Take over the values of a saved adapter of the same layout, in place: optimizers, compiled code and wrappers
        around the model go on as they are. For resuming, and for exchanging one adapter for another.

        Raises:
            CheckpointError: the directory is damaged, or its adapter has another layout (method, options, layers,
                dtypes); nothing has changed then. AdapterError: this adapter is merged.
        """
        self._registry()
        if self.merged:
            raise AdapterError(f"adapter '{self.name}' is merged; unmerge it before it is restored")
        checkpoint.restore(self.bank, directory)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The model without this adapter: the base's output bit for bit, if it is the only one.

        Raises:
            MergeError, AdapterError: it is merged, or owns its base weight, and the original was not kept.
        """
        if self.merged:
            with merge.left_out(self.bank):
                yield
            return
        registry = self._registry()
        before = dict(registry.active)
        merged = {name for name in registry.banks if registry.is_merged(name)}
        set_active(self.model, {name: scale for name, scale in before.items() if name != self.name})
        try:
            yield
        finally:
            # What was detached or merged meanwhile does not come back, what was unmerged goes on.
            wanted = before | {name: scale for name, scale in registry.active.items() if name in merged}
            there = {name for name in registry.banks if not registry.is_merged(name)}
            if registry.banks:
                set_active(self.model, {name: scale for name, scale in wanted.items() if name in there})

    def merge(self, keep: str | Path = "host") -> None:
        """Put the adapter into the base's weights; forward then costs what the base costs.

        Args:
            keep: where to keep the original weights for `unmerge`: `host` (memory), a directory, or `none`.

        Raises:
            AdapterError: it is merged already, or a layer was replaced since it was attached. MergeError: a weight is tied to
                another layer, offloaded, or divided between processes, or the originals cannot be kept there. Nothing has changed
                then.
        """
        registry = self._registry()
        if self.merged:
            raise AdapterError(f"adapter '{self.name}' is merged already")
        scale = registry.active.get(self.name, 1.0)
        for name in registry.active:
            registry.banks[name].check_in_place()
        merge.merge(self.bank, scale, keep)
        set_active(self.model, {name: scale for name, scale in registry.active.items() if name != self.name})

    def unmerge(self) -> None:
        """Restore the base's weights bit for bit, and make the adapter active again.

        Raises:
            AdapterError: it is not merged, an active adapter cannot be carried beside it, or a layer was replaced since it was
                attached. MergeError: the original weights were not kept. Nothing has changed then.
        """
        registry = self._registry()
        if not self.merged:
            raise AdapterError(f"adapter '{self.name}' is not merged")
        active = {**registry.active, self.name: self.bank.merged_scale}
        refuse_together(registry, active)
        for name in active:
            registry.banks[name].check_in_place()
        merge.unmerge(self.bank)
        set_active(self.model, active)

    def merge_and_detach(self) -> nn.Module:
        """Leave a plain model with the merged weights, for good; no copy of the originals is kept.

        Returns:
            The model, for convenience: it is changed in place.

        Raises:
            AdapterError: the adapter is merged, and left out by `disabled` now. AdapterError, MergeError: see `merge`.
        """
        if self.name in self._registry().left_out:
            raise AdapterError(f"adapter '{self.name}' is disabled; leave the block of disabled() first")
        if not self.merged:
            self.merge(keep="none")
        merge.settle(self.bank)
        remove(self.bank)
        return self.model

    def detach(self) -> None:
        """Leave the model as it was, without a trace.

        Raises:
            AdapterError: the adapter is merged. MergeError: it owns base weights whose originals were not kept.
        """
        if self.merged:
            raise AdapterError(f"adapter '{self.name}' is merged; unmerge it first, or use merge_and_detach()")
        if lost := [path for path, owned in self.bank.owned.items() if owned.original is None]:
            raise MergeError(f"'{lost[0]}': the original weight was not kept (attach with keep='host' to detach)")
        self.bank.show_owned(False)
        remove(self.bank)

    def __repr__(self) -> str:
        try:
            state = "merged" if self.merged else "active" if self.active else "inactive"
        except AdapterError:
            return f"Adapter('{self.name}', detached)"
        return f"Adapter('{self.name}', {self.plan.spec.method}, {self.num_trainable:,} parameters, {state})"

    def _registry(self) -> Registry:
        """The model's registry, in which this adapter stands.

        Raises:
            AdapterError: it has been detached.
        """
        registry = find_registry(self.model)
        if registry is None or registry.banks.get(self.name) is not self.bank:
            raise AdapterError(f"adapter '{self.name}' has been detached")
        return registry


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters on a model by name, in the order in which they came."""
    registry = find_registry(unwrap(model))
    return {name: Adapter(bank) for name, bank in registry.banks.items()} if registry else {}
