"""A plain training loop for causal language models: loss on completions, one optimizer, one bar."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from rich.console import Console
from torch import Tensor, nn

from ..reporting import TrainingError, progress_bar
from ..training.batches import by_length, collate
from ..training.examples import Tokens, length_of
from ..training.losses import completion_loss


@dataclass
class TrainingLog:
    """What each step gave: its loss (mean over completion tokens, in nats) and how long it took."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def seconds_per_step(self) -> float:
        """Median seconds of a step: the first, which sets up caches, does not count for more than one."""
        return statistics.median_high(self.seconds) if self.seconds else math.nan


def batches(tokens: Sequence[Tokens], size: int, pad_id: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Batches of `size` without end, of examples of like length, in an order that depends on `seed` alone.

    What does not fill the last batch of a window of `by_length` is left out.
    """
    generator = torch.Generator().manual_seed(seed)
    size, lengths = min(size, len(tokens)), list(map(length_of, tokens))
    while True:
        order = torch.randperm(len(tokens), generator=generator).tolist()
        for window in by_length(order, lengths, size):
            full = [batch for batch in window if len(batch) == size]
            for at in torch.randperm(len(full), generator=generator).tolist():
                yield collate([tokens[index] for index in full[at]], pad_id)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[dict[str, Tensor]],
    *,
    steps: int,
    warmup: float = 0.1,
    max_grad_norm: float = 1.0,
    console: Console | None = None,
) -> TrainingLog:
    """Train what the optimizer holds, for `steps` batches; afterwards the model is in the mode it was in.

    Args:
        optimizer: its learning rate rises over the warm-up, then falls to 0.
        warmup: a part of the steps.
        max_grad_norm: gradients are clipped to it.
        console: where progress is shown.

    Raises:
        TrainingError: the loss is no longer finite.
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
