"""AdamW with a step count per vector, and the reset of single vectors in it and in torch's optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.adamw import adamw

import peft_core as pc

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
"""State of torch's optimizers in which a vector that is all zeros has no past."""


class RowAdamW(torch.optim.AdamW):
    """AdamW in which a vector (a row or a column of a parameter) can start afresh: moments *and* step count.

    Until a vector of a parameter is reset, that parameter is updated by torch's own AdamW. From then on, `step` in its
    state is not a scalar but holds a count per vector, shaped to broadcast: [r, 1] for rows, [1, r] for columns.

    Args:
        params, lr, betas, eps, weight_decay, foreach: as for `torch.optim.AdamW`.
        fused: likewise, for parameters of which no vector was reset.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, foreach=foreach, fused=fused)
        self._step_supports_amp_scaling = False  # torch's fused kernel unscales gradients; `update_vectors` does not

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's.

        Raises:
            ValueError: a variant is asked for that this optimizer does not have.
        """
        for variant in ("amsgrad", "maximize", "capturable", "differentiable"):
            if param_group.get(variant):
                raise ValueError(f"RowAdamW has no {variant}; leave it out, or use torch.optim.AdamW")
        super().add_param_group(param_group)

    def restart_counts(self, parameter: Tensor, dim: int, places: Tensor) -> None:
        """The vectors at `places` along `dim` count their steps from 0 again."""
        state = self.state[parameter]
        if state["step"].dim() == 0:
            shape = [size if axis == dim else 1 for axis, size in enumerate(parameter.shape)]
            state["step"] = state["step"].expand(shape).clone()
        state["step"].index_fill_(dim, places.to(state["step"].device), 0)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            plain: list[Tensor] = []
            counted: dict[Any, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if self._state(parameter, group["fused"])["step"].dim() == 0:
                    plain.append(parameter)
                else:
                    counted.setdefault(_batch(parameter, group["foreach"]), []).append(parameter)
            numbers: dict[str, Any] = {name: group[name] for name in ("lr", "eps", "weight_decay")}
            numbers["beta1"], numbers["beta2"] = group["betas"]
            if plain:
                kind = {"foreach": group["foreach"], "fused": group["fused"]}
                torchs = {**numbers, **kind, "amsgrad": False, "maximize": False}
                gradients, exp_avgs, exp_avg_sqs, counts = self._lists(plain)
                adamw(plain, gradients, exp_avgs, exp_avg_sqs, [], counts, **torchs)
            for parameters in counted.values():
                update_vectors(parameters, *self._lists(parameters), **numbers)
        return loss

    def _state(self, parameter: Tensor, fused: bool | None) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if fused else None)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state

    def _lists(self, parameters: list[Tensor]) -> tuple[list[Tensor], ...]:
        """Gradients, first and second moments, counts: four lists."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        states = [self.state[parameter] for parameter in parameters]
        return gradients, *([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))


def update_vectors(
    parameters: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    counts: list[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """AdamW with a step count per vector, on parameters of one device and dtype. The counts rise by 1.

    p −= lr/c₁·m / (√v/√c₂ + ε), c = 1 − βᵏ, is computed as lr·m / (√v·c₁/√c₂ + ε·c₁): what differs between vectors is
    then in the denominator alone, and one call updates all parameters.
    """
    lr = float(lr)
    torch._foreach_add_(counts, 1)
    flat = torch.cat([count.flatten() for count in counts]).double()
    c1, c2 = 1 - beta1**flat, 1 - beta2**flat
    like = parameters[0]
    factors = torch.stack([c1 / c2.sqrt(), eps * c1]).to(like.device, like.dtype, non_blocking=True)

    if weight_decay:
        torch._foreach_mul_(parameters, 1 - lr * weight_decay)
    torch._foreach_lerp_(exp_avgs, gradients, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, gradients, gradients, 1 - beta2)
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    parts = factors.split([count.numel() for count in counts], dim=1)
    for denominator, count, (factor, floor) in zip(denominators, counts, parts, strict=True):
        denominator.mul_(factor.view_as(count)).add_(floor.view_as(count))
    torch._foreach_addcdiv_(parameters, exp_avgs, denominators, -lr)


def _batch(parameter: Tensor, foreach: bool | None) -> Any:
    """What parameters have in common that are updated together. By default, as in torch, all parameters on an accelerator
    are (calls are expensive there), and each on the CPU is by itself (it should stay in the cache).
    """
    together = parameter.device.type != "cpu" if foreach is None else foreach
    return (parameter.device, parameter.dtype) if together else parameter


def check(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> None:
    """Refuse an optimizer in which single vectors cannot be reset: by its class, before it has any state.

    Raises:
        OptimizerStepError: names optimizers in which they can.
    """
    known = isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD))
    if not known or not all(_is_plain(optimizer.state.get(parameter, {}), parameter) for parameter in parameters):
        kind = type(optimizer)
        raise pc.OptimizerStepError(
            "SwitchLoRA resets single vectors in the optimizer's state and does not know the state of "
            f"{kind.__module__}.{kind.__name__}; use peft_method_switchlora.RowAdamW, or torch's AdamW, Adam or SGD"
        )


def _is_plain(state: Mapping[str, Any], parameter: Tensor) -> bool:
    """Whether all state but the step count is moments of the parameter's shape and a floating-point dtype. A subclass may keep
    others: of 8 bits, where a byte of zero need not mean zero, or the weights of a moving average.
    """
    tensors = {name: value for name, value in state.items() if name != "step" and isinstance(value, Tensor)}
    return all(
        name in MOMENTS and value.shape == parameter.shape and value.is_floating_point()
        for name, value in tensors.items()
    )


def zero_moments(optimizer: torch.optim.Optimizer, parameter: Tensor, dim: int, places: Tensor) -> None:
    """Zero the moments of the vectors at `places` along `dim`."""
    state = optimizer.state.get(parameter, {})
    for name in MOMENTS:
        if isinstance(value := state.get(name), Tensor):
            value.index_fill_(dim, places, 0)


def restart(
    optimizer: torch.optim.Optimizer, parameter: Tensor, dim: int, places: Tensor, places_on_cpu: Tensor | None = None
) -> None:
    """Let the vectors at `places` along `dim` start afresh: moments, and counts where each vector has its own.

    `places_on_cpu`: the same places, for counts on the CPU, where they usually are: so nothing waits for an accelerator.
    """
    zero_moments(optimizer, parameter, dim, places)
    if isinstance(optimizer, RowAdamW) and parameter in optimizer.state:
        if places_on_cpu is not None and optimizer.state[parameter]["step"].device.type == "cpu":
            places = places_on_cpu
        optimizer.restart_counts(parameter, dim, places)


def decays_through_moments(optimizer: torch.optim.Optimizer) -> bool:
    """Whether weight decay is added to the gradient, and so to moments that should stay zero."""
    coupled = not isinstance(optimizer, torch.optim.AdamW)
    return coupled and any(group.get("weight_decay") for group in optimizer.param_groups)
