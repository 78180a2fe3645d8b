"""Models that take training steps: the frozen base, one of our methods on it, or the field's PEFT library."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import peft_core as pc

T = TypeVar("T")

FLOOR = "floor"
"""Label of the frozen base with gradients of its inputs only: what no adapter can go below."""
TYPES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class Run:
    """One model that takes training steps.

    Attributes:
        parameters: those that are trained; none: the floor. compiled: what torch.compile made of the model, if anything.
        kernels: see `pc.kernels`.
    """

    model: nn.Module
    parameters: list[nn.Parameter] = field(default_factory=list)
    optimizer: torch.optim.Optimizer | None = None
    compiled: Any = None
    kernels: str = "auto"

    def forward(self, ids: Tensor) -> Tensor:
        """The loss. Gradients flow to the embedded inputs, through every layer, in every run alike."""
        embedded = self.model.get_input_embeddings()(ids)  # type: ignore[operator]
        if not embedded.requires_grad:
            embedded.requires_grad_()
        called: Any = self.model if self.compiled is None else self.compiled
        loss: Tensor = called(inputs_embeds=embedded, labels=ids, use_cache=False).loss
        return loss

    def backward(self, ids: Tensor) -> None:
        """Forward, loss and backward."""
        with pc.kernels(self.kernels):
            self.forward(ids).backward()

    def update(self) -> None:
        """The optimizer's part of a training step."""
        if self.optimizer is not None:
            self.optimizer.step()
        self.forget()

    def step(self, ids: Tensor) -> None:
        """A whole training step."""
        self.backward(ids)
        self.update()

    def forget(self) -> None:
        """No gradients are left."""
        for parameter in self.parameters:
            parameter.grad = None


def copy_of(base: nn.Module) -> nn.Module:
    """A model of its own on the same weights."""
    shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    return copy.deepcopy(base, shared)


def ours(base: nn.Module, spec: pc.AdapterSpec, kernels: str = "auto", fused: bool | None = None) -> Run:
    """A run of one of our methods. `fused`: of AdamW, where the method has no optimizer of its own."""
    model = copy.deepcopy(base) if spec.capabilities.owns_base_weight else copy_of(base)
    adapter = pc.attach(model, spec, keep="none")
    adapter.total_steps = 1000
    make = spec.info.optimizer
    parameters = list(adapter.parameters())
    optimizer = make(parameters, lr=1e-4) if make else torch.optim.AdamW(parameters, lr=1e-4, fused=fused)
    return Run(model, parameters, optimizer, kernels=kernels)


def theirs(
    base: nn.Module, kind: str, r: int, wide: bool = True, dropout: float = 0.0, fused: bool | None = None
) -> Run:
    """A run of the PEFT library.

    Args:
        kind: class of the configuration. wide: with float32 parameters, its default, through which all that they meet is cast.
        fused: of AdamW.
    """
    import peft

    settings = {"lora_alpha": r, "lora_dropout": dropout} if kind == "LoraConfig" else {"miss_dropout": dropout}
    config = getattr(peft, kind)(r=r, target_modules=TYPES, **settings)
    model = peft.get_peft_model(copy_of(base), config, autocast_adapter_dtype=wide).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Run(model, parameters, torch.optim.AdamW(parameters, lr=1e-4, fused=fused))


def in_turn(labels: Iterable[T], number: int) -> list[T]:
    """The order of a round, which begins with another label every time."""
    order = list(labels)
    first = number % len(order)
    return order[first:] + order[:first]


def median_ratio(own: Sequence[float], floor: Sequence[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(own, floor, strict=True))
