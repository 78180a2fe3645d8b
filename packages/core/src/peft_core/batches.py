"""What a training run draws from: examples, the order in which they come, and batches of them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, Sampler

from .data import IGNORED, Tokens, collate

Batch = dict[str, Any]


class Examples(Dataset[Any]):
    """A sequence, as torch's loaders take it."""

    def __init__(self, examples: Sequence[Any]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, number: int) -> Any:
        return self.examples[number]


class LikeLengths(Sampler[int]):
    """An order by (seed, epoch) in which batches hold examples of like length: half of a step would be padding otherwise."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, window: int = 16) -> None:
        self.lengths, self.batch_size, self.seed, self.window, self.epoch = lengths, batch_size, seed, window, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        draws = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=draws).tolist()
        batches: list[list[int]] = []
        for start in range(0, len(order), self.window * self.batch_size):
            chunk = sorted(
                order[start : start + self.window * self.batch_size], key=lambda number: self.lengths[number]
            )
            batches += [chunk[at : at + self.batch_size] for at in range(0, len(chunk), self.batch_size)]
        rest = batches.pop() if len(batches[-1]) < self.batch_size else []
        for number in torch.randperm(len(batches), generator=draws).tolist():
            yield from batches[number]
        yield from rest


class CausalBatch:
    """Padded, with logits of the last positions only, where labels are, if the model can leave out others."""

    def __init__(self, model: nn.Module, pad: int, left: bool = True) -> None:
        self.known, self.pad, self.left = set(inspect.signature(model.forward).parameters), pad, left

    def __call__(self, examples: Sequence[Tokens]) -> Batch:
        batch: Batch = collate(examples, self.pad, self.left)
        labels = batch["labels"]
        if "logits_to_keep" in self.known:
            first = int((labels != IGNORED).any(0).nonzero()[0])
            kept = labels.shape[1] - first + 1  # a label is predicted one position earlier
            batch.update(labels=labels[:, -kept:].contiguous(), logits_to_keep=kept)
        return {name: value for name, value in batch.items() if name in self.known}


class PackedBatch:
    """Rows of several examples: positions start anew with each, by which transformers keeps them apart."""

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
                labels[number, at + 1 : end] = torch.tensor(
                    tokens.labels[1:]
                )  # the first has no predecessor of its own
                positions[number, at:end] = torch.arange(end - at)
                at = end
            positions[number, at:] = torch.arange(length - at)
        return {"input_ids": ids, "position_ids": positions, "labels": labels}


class LabelledBatch:
    """Texts padded by the tokenizer, with their class numbers."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, examples: Sequence[tuple[Tokens, int]]) -> Batch:
        padded = self.tokenizer.pad({"input_ids": [tokens.input_ids for tokens, _ in examples]}, return_tensors="pt")
        return {**padded, "labels": torch.tensor([number for _, number in examples])}


def length_of(example: Tokens | Sequence[Tokens]) -> int:
    return len(example.input_ids) if isinstance(example, Tokens) else sum(map(length_of, example))
