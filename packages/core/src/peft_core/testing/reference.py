"""Gradients in float64, by the naive reference, of what reaches each site in a real forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

import peft_core as pc

from .checks import TOLERANCE, Trial, assert_near, base_weight, borrowed, doubled, naive, relative


class Reference:
    """Float64 gradients from what reaches each site in a real forward and backward of the model.

    Every site's input and output gradient are recorded; the naive reference is differentiated with them, and
    the results are added up over the borrowers of a tensor.
    """

    def __init__(self, model: nn.Module, adapters: Sequence[pc.Adapter], *trials: Trial) -> None:
        self.adapters = {adapter.name: (adapter, trial) for adapter, trial in zip(adapters, trials, strict=True)}
        self.model = model
        self.calls: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for site in adapters[0].plan.sites:
            calls = self.calls[site.path] = []
            model.get_submodule(site.path).register_forward_hook(
                lambda module, args, output, calls=calls: keep_call(calls, args[0], output)
            )

    def sums(self, name: str, moved: Callable[[Tensor], Tensor] = lambda value: value) -> dict[str, Tensor]:
        """Key → gradient summed over borrowers and calls so far, for the tensors that sites borrow.

        Args:
            moved: what becomes of every number that goes in.
        """
        adapter, trial = self.adapters[name]
        keys = adapter.plan.borrowed()
        out: dict[str, Tensor] = {}
        for site in adapter.plan.sites:
            tensors, binding = borrowed(adapter, site.path)
            tensors64 = doubled({local: moved(tensor) for local, tensor in tensors.items()})
            weight = base_weight(self.model, site).double()
            for x, dy in self.calls[site.path]:
                naive(trial, site, moved(x.double()), tensors64, binding, weight).backward(moved(dy.double()))
            for local, tensor in tensors64.items():
                key = keys[site.path][local]
                gradient = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
                out[key] = out[key] + gradient if key in out else gradient
        return out

    def assert_near(self, found: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        """The adapter's gradients are float32, and off by no more than rounding to this dtype may cost: more where a gradient is
        a small sum of large parts.
        """
        (name,) = self.adapters
        for key, expected in self.sums(name).items():
            assert found[key].dtype == torch.float32, f"gradient of '{key}' came back as {found[key].dtype}"
            allowed = TOLERANCE[dtype]
            if relative(found[key], expected) > allowed:
                allowed = max(allowed, 2 * self.rounding(name, dtype)[key])
            assert_near(found[key], expected, allowed, f"gradient of '{key}'")

    def rounding(self, name: str, dtype: torch.dtype, draws: int = 4) -> dict[str, float]:
        """Key → how far the gradient moves, relative root mean square, where what goes in is off by a rounding to this dtype."""
        generator = torch.Generator().manual_seed(0)
        exact = self.sums(name)
        found = [self.sums(name, lambda value: _off_by_rounding(value, dtype, generator)) for _ in range(draws)]
        return {key: max(relative(sums[key], exact[key]) for sums in found) for key in exact}


def keep_call(calls: list[tuple[Tensor, Tensor]], x: Tensor, output: Tensor) -> None:
    """Note an input, and the gradient of what was computed from it when that comes."""
    if output.requires_grad:
        kept = x.detach().clone()
        output.register_hook(lambda dy: calls.append((kept, dy.detach().clone())))


def _off_by_rounding(value: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A tensor in float64, every number off by what rounding to this dtype may change."""
    off = torch.rand(value.shape, generator=generator, dtype=torch.float64) - 0.5
    return value.detach().double() * (1 + torch.finfo(dtype).eps * off)
