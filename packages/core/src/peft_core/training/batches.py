"""Which examples share a batch, and the collators that make batches of them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from .examples import IGNORED, Tokens, length_of

Batch = dict[str, Any]


def by_length(order: Sequence[int], lengths: Sequence[int], size: int, window: int = 16) -> Iterator[list[list[int]]]:
    """Batches of examples of like length, from each `window` batches of an order: half of a step would be padding otherwise.

    Args:
        order: numbers of the examples, shuffled.
        lengths: of all examples, in tokens.
        size: of a batch; the last one of a window may be smaller.
    """
    for start in range(0, len(order), window * size):
        chunk = sorted(order[start : start + window * size], key=lengths.__getitem__)
        yield [chunk[at : at + size] for at in range(0, len(chunk), size)]


class LengthGroupedSampler(Sampler[int]):
    """An order of all examples that depends on (seed, epoch) alone, and in which batches hold examples of like length."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        draws = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=draws).tolist()
        batches = [batch for batches in by_length(order, self.lengths, self.batch_size) for batch in batches]
        rest = batches.pop() if len(batches[-1]) < self.batch_size else []
        for number in torch.randperm(len(batches), generator=draws).tolist():
            yield from batches[number]
        yield from rest


def collate(batch: Sequence[Tokens], pad_id: int, left: bool = True) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask`, `position_ids` and `labels`, each [batch, length], padded on the left.

    So completions end together, and the vocabulary's logits are needed for a few last positions only. With `left` false,
    padding is on the right, where no token sees it, and there are no `position_ids`: the model counts as it does for
    one example.
    """
    length = max(map(length_of, batch))
    ids = torch.full((len(batch), length), pad_id)
    mask = torch.zeros((len(batch), length), dtype=torch.long)
    labels = torch.full((len(batch), length), IGNORED)
    for row, tokens in enumerate(batch):
        start = length - len(tokens.input_ids) if left else 0
        end = start + len(tokens.input_ids)
        ids[row, start:end] = torch.tensor(tokens.input_ids)
        labels[row, start:end] = torch.tensor(tokens.labels)
        mask[row, start:end] = 1
    positions = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if left else {}
    return {"input_ids": ids, "attention_mask": mask, **positions, "labels": labels}


def logits_needed(labels: Tensor) -> int:
    """The last positions of a batch that have to be known: a label is predicted one position earlier."""
    return labels.shape[1] - int((labels != IGNORED).any(0).nonzero()[0]) + 1


class CausalCollator:
    """Padded examples, with logits of the last positions only, where labels are, if the model can leave out others."""

    def __init__(self, model: nn.Module, pad: int, left: bool = True) -> None:
        self.known, self.pad, self.left = set(inspect.signature(model.forward).parameters), pad, left

    def __call__(self, examples: Sequence[Tokens]) -> Batch:
        batch: Batch = collate(examples, self.pad, self.left)
        if "logits_to_keep" in self.known:
            kept = logits_needed(batch["labels"])
            batch.update(labels=batch["labels"][:, -kept:].contiguous(), logits_to_keep=kept)
        return {name: value for name, value in batch.items() if name in self.known}


class PackedCollator:
    """Rows of several examples; positions start anew with each, by which transformers keeps them apart."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, rows: Sequence[Sequence[Tokens]]) -> Batch:
        length = max(map(length_of, rows))
        ids = torch.full((len(rows), length), self.pad)
        labels = torch.full((len(rows), length), IGNORED)
        positions = torch.zeros((len(rows), length), dtype=torch.long)
        for number, row in enumerate(rows):
            at = 0
            for tokens in row:
                end = at + len(tokens.input_ids)
                ids[number, at:end] = torch.tensor(tokens.input_ids)
                # The first token has no predecessor of its own.
                labels[number, at + 1 : end] = torch.tensor(tokens.labels[1:])
                positions[number, at:end] = torch.arange(end - at)
                at = end
            positions[number, at:] = torch.arange(length - at)
        return {"input_ids": ids, "position_ids": positions, "labels": labels}


class ClassificationCollator:
    """Texts padded by the tokenizer, on its own side or on the given one, with the numbers of their classes."""

    def __init__(self, tokenizer: Any, side: str | None = None) -> None:
        self.tokenizer, self.side = tokenizer, side

    def __call__(self, examples: Sequence[Tokens]) -> Batch:
        ids = {"input_ids": [tokens.input_ids for tokens in examples]}
        padded = self.tokenizer.pad(ids, padding_side=self.side, return_tensors="pt")
        return {**padded, "labels": torch.tensor([tokens.labels[0] for tokens in examples])}
