"""Base weights that a method owns: it has moved weight into them, and the base can show that, or what it held before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import bases
from .errors import AdapterError
from .originals import Kept, look_up
from .sites import Site


@dataclass
class OwnedWeight:
    """The weight of one site. The moved weight is in the base while `shown`, and is parked otherwise.

    Attributes:
        original: what the base held before attach, in the module's layout; None: not kept.
        master: a wider copy of the moved weight (out × in), where the base's dtype would drift.
        parked: the moved weight in the module's layout, while the base holds something else: the original (the adapter is
            inactive) or a merged weight. None: it was not kept.
        shown: whether the base holds the moved weight.
    """

    original: Kept = None
    master: Tensor | None = None
    parked: Kept = None
    shown: bool = True

    def current(self, module: nn.Module, site: Site) -> Tensor:
        """The moved weight (out × in), as exactly as it is known.

        Raises:
            AdapterError: it was merged into the base and not kept.
        """
        if self.master is not None:
            there: torch.device = module.weight.device  # type: ignore[assignment]
            if self.master.device != there and "meta" not in (self.master.device.type, there.type):
                self.master = self.master.to(there)  # no parameter: moving the model leaves it behind
            return self.master
        if self.shown:
            return bases.dense_weight(module)
        if self.parked is None:
            raise AdapterError(
                f"'{site.path}': the weight that the method had moved was merged and not kept (merge with keep='host', or "
                "save the adapter before it is merged)"
            )
        parked = look_up(self.parked).to(module.weight.device)  # type: ignore[arg-type]
        return parked.T if site.transposed else parked

    def write(self, module: nn.Module, weight: Tensor, site: Site) -> None:
        """Make this the moved weight (out × in): the master, and, rounded, what the base shows or will show again."""
        with torch.no_grad():
            if self.master is not None and self.master is not weight:
                self.master.copy_(weight)
            if self.shown:
                bases.write_weight(module, weight, site.transposed)
            else:
                assert isinstance(self.parked, Tensor)  # nothing writes while merged
                self.parked.copy_(weight.T if site.transposed else weight)

    def follow(self, module: nn.Module) -> None:
        """Something was loaded into the base: where that is not just the master's rounding, it is the moved weight now."""
        if self.master is None or not self.shown:
            return
        loaded = bases.dense_weight(module)
        if loaded.is_meta:
            return
        if self.master.is_meta or not torch.equal(self.master.to(loaded.device, loaded.dtype), loaded):
            self.master = loaded.to(self.master.dtype)

    def show(self, module: nn.Module) -> None:
        """Let the base hold the moved weight."""
        if not self.shown:
            assert self.parked is not None
            bases.write_weight(module, look_up(self.parked), transposed=False)
            self.uncover()

    def hide(self, module: nn.Module) -> None:
        """Let the base hold its original, if that was kept."""
        if self.shown and self.original is not None:
            self.cover(module.weight.detach().clone())  # type: ignore[operator]
            bases.write_weight(module, look_up(self.original), transposed=False)

    def cover(self, parked: Kept) -> None:
        """The base is about to hold something else; this is the moved weight."""
        self.parked, self.shown = parked, False

    def uncover(self) -> None:
        """The base holds the moved weight again."""
        self.parked, self.shown = None, True
