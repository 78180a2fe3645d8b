"""Losses of a batch, and figures of held-out examples: in nats, every token (or every classified text) weighing the same."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..reporting import progress_bar
from .batches import Batch, collate, logits_needed
from .examples import IGNORED, Tokens, length_of


def completion_loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """(sum of the losses of the labelled tokens, how many they are) of a batch from `collate`."""
    batch = _on_device(batch, model)
    labels = batch.pop("labels")
    kept = logits_needed(labels)
    offered = {**batch, "logits_to_keep": kept, "use_cache": False}
    known = inspect.signature(model.forward).parameters
    logits = model(**{name: value for name, value in offered.items() if name in known}).logits[:, -kept:-1]
    wanted = labels[:, 1 - kept :]
    return _summed(logits, wanted), int((wanted != IGNORED).sum())


def next_token_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Mean over all labels of a step, however they are divided into forward passes: a loss function of the trainer."""
    wanted = labels[:, 1:]
    items = (wanted != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return _summed(outputs.logits[:, :-1], wanted) / items


def class_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Mean over all texts of a step, however they are divided into forward passes: a loss function of the trainer."""
    return _summed(outputs.logits, labels) / (len(labels) if num_items_in_batch is None else num_items_in_batch)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    examples: Sequence[Tokens],
    pad_id: int,
    batch_size: int = 16,
    console: Console | None = None,
    title: str = "evaluating",
    left: bool = True,
) -> float:
    """Mean loss of a labelled token of the examples, in evaluation mode.

    Args:
        console: where progress is shown.
        left: on which side to pad; see `batches.collate`.
    """
    total, count = 0.0, 0
    with _evaluating(model), progress_bar(console) as progress:
        task = progress.add_task(title, total=len(examples), note="")
        for some in _by_length(examples, batch_size):
            loss, tokens = completion_loss(model, collate(some, pad_id, left))
            total, count = total + loss.item(), count + tokens
            progress.update(task, advance=len(some), note=f"loss {total / count:.3f}")
    return total / count


@torch.no_grad()
def evaluate_classifier(
    model: Any, examples: Sequence[Tokens], collator: Callable[[Sequence[Tokens]], Batch], batch_size: int
) -> dict[str, float]:
    """Mean loss of a text and accuracy, in evaluation mode."""
    loss, right = 0.0, 0
    with _evaluating(model):
        for some in _by_length(examples, batch_size):
            batch = _on_device(collator(some), model)
            labels = batch.pop("labels")
            logits = model(**batch).logits
            loss += _summed(logits, labels).item()
            right += int((logits.argmax(-1) == labels).sum())
    return {"loss": loss / len(examples), "accuracy": right / len(examples)}


def _summed(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")


def _by_length(examples: Sequence[Tokens], size: int) -> Iterator[list[Tokens]]:
    """Batches with little padding; a mean over all of them is the same in any order."""
    ordered = sorted(examples, key=length_of)
    return (ordered[at : at + size] for at in range(0, len(ordered), size))


def _on_device(batch: Batch, model: nn.Module) -> Batch:
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
