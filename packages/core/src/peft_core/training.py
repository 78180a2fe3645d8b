"""A plain training loop for causal language models: loss on completions, one optimizer, one bar."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from torch.nn.functional import cross_entropy

from .data import IGNORED, Tokens, collate
from .reporting import TrainingError, progress_bar


@dataclass
class TrainingLog:
    """What each step gave: its loss (mean over completion tokens, in nats) and how long it took."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def seconds_per_step(self) -> float:
        """Median seconds of a step: the first, which sets up caches, does not count for more than one."""
        return sorted(self.seconds)[len(self.seconds) // 2] if self.seconds else math.nan


def train(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[dict[str, torch.Tensor]],
    *,
    steps: int,
    warmup: float = 0.1,
    max_grad_norm: float = 1.0,
    console: Console | None = None,
) -> TrainingLog:
    """Train what ``optimizer`` holds for ``steps`` batches.

    Its learning rate rises over ``warmup`` (a part of the steps), then falls to 0; gradients are clipped to
    ``max_grad_norm``. Shows a progress bar on ``console`` if there is one. The model stays in the mode it
    is in. Raises TrainingError when the loss is no longer finite.
    """
    owned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    rising = max(1, math.ceil(warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rising, (steps - step) / max(1, steps - rising + 1))
    )
    log = TrainingLog()
    was_training = model.training
    model.train()
    with progress_bar(console) as progress:
        task = progress.add_task("training", total=steps, note="")
        for step in range(steps):
            start = time.perf_counter()
            total, tokens = completion_loss(model, next(batches))
            loss = total / tokens
            value = loss.item()
            if not math.isfinite(value):
                raise TrainingError(f"the loss is {value} at step {step + 1}; lower the learning rate")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(owned, max_grad_norm)
            optimizer.step()
            schedule.step()
            log.losses.append(value)
            log.seconds.append(time.perf_counter() - start)
            progress.update(task, advance=1, note=f"loss {value:.3f}")
    model.train(was_training)
    return log


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    examples: Sequence[Tokens],
    pad_id: int,
    batch_size: int = 16,
    console: Console | None = None,
    title: str = "evaluating",
    left: bool = True,
) -> float:
    """Mean loss of a completion token over ``examples``, in nats, in evaluation mode. ``left``: see `data.collate`."""
    was_training = model.training
    model.eval()
    by_length = sorted(examples, key=lambda tokens: len(tokens.input_ids))  # little padding, same mean
    total, count = 0.0, 0
    with progress_bar(console) as progress:
        task = progress.add_task(title, total=len(by_length), note="")
        for start in range(0, len(by_length), batch_size):
            batch = by_length[start : start + batch_size]
            loss, tokens = completion_loss(model, collate(batch, pad_id, left))
            total, count = total + loss.item(), count + tokens
            progress.update(task, advance=len(batch), note=f"loss {total / count:.3f}")
    model.train(was_training)
    return total / count


def completion_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """``(sum of the completion tokens' losses in nats, how many they are)`` of a batch."""
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    labels = batch.pop("labels")
    first = int((labels != IGNORED).any(0).nonzero()[0])
    kept = labels.shape[1] - first + 1  # a label is predicted one position earlier
    logits = model(**_accepted(model, batch, kept)).logits[:, -kept:-1]
    wanted = labels[:, first:]
    total = cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), ignore_index=IGNORED, reduction="sum")
    return total, int((wanted != IGNORED).sum())


def _accepted(model: torch.nn.Module, batch: dict[str, torch.Tensor], kept: int) -> dict[str, Any]:
    """The arguments that this forward knows; logits of the last ``kept`` positions only, if it can."""
    known = inspect.signature(model.forward).parameters
    offered: dict[str, Any] = {**batch, "logits_to_keep": kept, "use_cache": False}
    return {name: value for name, value in offered.items() if name in known}
