"""AdamW that counts steps per vector, and the reset of single vectors in it and in torch's optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, overload

import torch
from peft_core import OptimizerStepError
from torch import Tensor
from torch.optim.adamw import adamw


class RowAdamW(torch.optim.AdamW):
    """AdamW in which a vector (a row or a column of a parameter) can start afresh: moments *and* step count.

    Until a vector of a parameter is reset, that parameter is updated by torch's own AdamW. From then on its state's
    `step` is no scalar but has a count for each vector, shaped to broadcast: [r, 1] for rows, [1, r] for columns.

    Args:
        params, lr, betas, eps, weight_decay, foreach: as for `torch.optim.AdamW`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        foreach: bool | None = None,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, foreach=foreach)

    def restart_counts(self, parameter: Tensor, dim: int, index: Tensor) -> None:
        """The vectors at `index` along `dim` count their steps from 0 again."""
        state = self.state[parameter]
        if state["step"].dim() == 0:
            shape = [size if axis == dim else 1 for axis, size in enumerate(parameter.shape)]
            state["step"] = state["step"].expand(shape).clone()
        state["step"].index_fill_(dim, index.to(state["step"].device), 0)

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
            by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if self._state(parameter)["step"].dim() == 0:
                    plain.append(parameter)
                else:
                    by_kind.setdefault((parameter.device, parameter.dtype), []).append(parameter)
            if plain:
                adamw(*self._lists(plain, True), **_settings(group), foreach=group["foreach"])
            for counted in by_kind.values():
                update_vectors(*self._lists(counted, False), **_settings(group))
        return loss

    def _state(self, parameter: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state

    def _lists(self, parameters: Sequence[Tensor], torchs: bool) -> list[list[Tensor]]:
        """Parameters, gradients and moments in the order in which torch's functional AdamW takes them."""
        states = [self._state(parameter) for parameter in parameters]
        moments = [[state[name] for state in states] for name in ("exp_avg", "exp_avg_sq")]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        maxima: list[list[Tensor]] = [[]] if torchs else []  # of AMSGrad
        return [list(parameters), gradients, *moments, *maxima, [state["step"] for state in states]]


def update_vectors(
    parameters: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    counts: list[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """AdamW with a step count per vector, on parameters of one device and dtype. The counts rise by 1.

    p −= lr/c₁·m / (√v/√c₂ + ε), c = 1 − βᵏ, is computed as lr·m / (√v·c₁/√c₂ + ε·c₁): whatever differs from vector
    to vector is in the denominator, and the parameters themselves are updated by one call for all.
    """
    torch._foreach_add_(counts, 1)
    flat = torch.cat([count.flatten() for count in counts]).double()
    c1, c2 = 1 - beta1**flat, 1 - beta2**flat
    like = parameters[0]
    factors = torch.stack([c1 / c2.sqrt(), eps * c1]).to(like.device, like.dtype, non_blocking=True)
    sizes = [count.numel() for count in counts]

    if weight_decay:
        torch._foreach_mul_(parameters, 1 - lr * weight_decay)
    torch._foreach_lerp_(exp_avgs, gradients, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, gradients, gradients, 1 - beta2)
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    for denominator, count, (factor, floor) in zip(
        denominators, counts, (part.unbind() for part in factors.split(sizes, dim=1)), strict=True
    ):
        denominator.mul_(factor.view_as(count)).add_(floor.view_as(count))
    torch._foreach_addcdiv_(parameters, exp_avgs, denominators, -lr)


def check(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer whose state cannot be reset vector by vector; before its first step, so by its class.

    Raises:
        OptimizerStepError: names the ones that can.
    """
    if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)):
        raise OptimizerStepError(
            f"SwitchLoRA resets single vectors in the optimizer's state, and does not know that of "
            f"{type(optimizer).__name__}; use peft_method_switchlora.RowAdamW, or AdamW, Adam or SGD of torch.optim"
        )


def zero_moments(optimizer: torch.optim.Optimizer, parameter: Tensor, dim: int, index: Tensor) -> None:
    """Zero the moments of the vectors at `index` along `dim`: whatever state has the parameter's shape.

    Raises:
        OptimizerStepError: the state is packed (8-bit), so that zero may not mean zero.
    """
    for name, value in optimizer.state.get(parameter, {}).items():
        if not isinstance(value, Tensor) or name == "step":
            continue
        if value.shape != parameter.shape or not value.is_floating_point():
            raise OptimizerStepError(
                f"SwitchLoRA does not understand '{name}' in the state of {type(optimizer).__name__}: "
                f"{value.dtype} of shape {tuple(value.shape)}; use peft_method_switchlora.RowAdamW"
            )
        value.index_fill_(dim, index, 0)


def restart(optimizer: torch.optim.Optimizer, parameter: Tensor, dim: int, index: Tensor) -> None:
    """Let the vectors at `index` along `dim` start afresh: moments zero, and step counts where there is one each."""
    zero_moments(optimizer, parameter, dim, index)
    if isinstance(optimizer, RowAdamW) and parameter in optimizer.state:
        optimizer.restart_counts(parameter, dim, index)


def decays_through_moments(optimizer: torch.optim.Optimizer) -> bool:
    """Whether weight decay is part of the gradient, so that it fills moments that should stay zero."""
    coupled = not isinstance(optimizer, torch.optim.AdamW)
    return coupled and any(group.get("weight_decay") for group in optimizer.param_groups)


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    beta1, beta2 = group["betas"]
    return {"lr": group["lr"], "beta1": beta1, "beta2": beta2, "eps": group["eps"], "weight_decay": group["weight_decay"]}
