"""The merge at work: one thread reads ahead, one computes, one writes what is ready, one copies what is untouched.

Every layer passes through the same two buffers: as it is stored, and widened to float32. Memory is then those and what the
method itself takes, whatever the number of layers; and fresh memory, of which the kernel must clear every page, would cost
more time than the arithmetic.
"""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from functools import reduce

import torch
from torch import Tensor

from peft_core import MergeError
from peft_core.merge import merged_weight

from .checkpoint_files import DTYPE_OF_CODE, PIECE, Entry, Reader, all_finite
from .merge_plan import Change, MergePlan, Output
from .names import Conversion
from .shards import Progress, Writer, check_rounded


class Pipeline:
    """Writes every output of a plan."""

    def __init__(self, writer: Writer, plan: MergePlan, progress: Progress | None) -> None:
        self._writer = writer
        self._outputs = {made.item.key: made for made in plan.outputs}
        self._order = [self._outputs[key] for key in writer.order]
        self._changes = plan.changes
        self._total = sum(made.item.nbytes for made in plan.outputs)
        self._progress = progress
        self._done = 0
        self._lock = threading.Lock()
        self._converted: dict[str, Tensor] = {}
        sites = [made for made in self._order if made.is_site]
        entries = [_stored(made) for made in sites]
        self._raw = torch.empty(max((entry.nbytes for entry in entries), default=0), dtype=torch.uint8)
        self._wide = torch.empty(8 * max((entry.numel for entry in entries), default=0), dtype=torch.uint8)

    def run(self) -> None:
        """Do it.

        Raises:
            CheckpointError, MergeError: an adapter is damaged, or a conversion cannot be undone. OSError: the disk is full.
        """
        changed = [made for made in self._order if not made.is_copy]
        sites = deque(made for made in changed if made.is_site)
        reading, writing, copying = threads = [ThreadPoolExecutor(1) for _ in range(3)]
        with Reader() as ahead, Reader() as here, Reader() as there, torch.no_grad():
            try:
                copies = [copying.submit(self._copy, made, there) for made in self._order if made.is_copy]
                upcoming = self._read_ahead(sites, reading, ahead)
                last: Future[None] | None = None
                for made in changed:
                    if made.is_site:
                        assert made.change is not None and upcoming is not None
                        weight = widened(upcoming.result(), self._wide)
                        upcoming = self._read_ahead(sites, reading, ahead)
                        tensor = self._merged(made.change, weight, here)
                    else:
                        tensor = self._other(made, here)
                    if last is not None:
                        last.result()  # one result at a time waits to be written; copies take no memory
                    last = writing.submit(self._write, made, tensor)
                    del tensor
                    while copies and copies[0].done():
                        copies.pop(0).result()
                for future in [*copies, *([last] if last is not None else [])]:
                    future.result()
            finally:
                for thread in threads:
                    thread.shutdown(cancel_futures=True)

    def _read_ahead(self, sites: deque[Output], thread: ThreadPoolExecutor, reader: Reader) -> Future[Tensor] | None:
        """Begin to read the next site's weight; what the buffer held has been widened."""
        return thread.submit(reader.read, _stored(sites.popleft()), self._raw) if sites else None

    def _copy(self, made: Output, reader: Reader) -> None:
        assert made.source is not None
        if made.item.dtype == made.source.dtype:
            self._writer.copy(made.item.key, reader, made.source)
        else:
            self._writer.cast(made.item.key, reader, made.source)
        self._count(made)

    def _write(self, made: Output, tensor: Tensor) -> None:
        self._writer.write(made.item.key, tensor)
        self._count(made)

    def _count(self, made: Output) -> None:
        with self._lock:
            self._done += made.item.nbytes
            if self._progress is not None:
                self._progress(self._done, self._total)

    def _merged(self, change: Change, stored: Tensor, reader: Reader) -> Tensor:
        """A site's merged weight in float32, oriented as in the files. `stored`: its weight, or the one that is owned."""
        site = change.adapters[0].sites[change.path]
        if any(adapter.owns(change.path) for adapter in change.adapters):
            parts = [adapter.contribution(change.path, reader, stored) for adapter in change.adapters]
            weight = torch.empty(site.out_features, site.in_features, dtype=stored.dtype, device="meta")
        else:
            parts = [adapter.contribution(change.path, reader) for adapter in change.adapters]
            weight = stored.T if site.transposed else stored
        merged = merged_weight(weight, parts)
        if not all_finite(merged):
            raise MergeError(
                f"'{change.path}': the merged weight has NaN or infinite values: the base's own weight has some, or the "
                "adapters' weights are too large"
            )
        if merged.untyped_storage().data_ptr() == self._wide.data_ptr():
            merged = merged.clone()  # the method returned the weight that it was given, whose buffer is needed again
        return merged.T if site.transposed else merged

    def _other(self, made: Output, reader: Reader) -> Tensor:
        """A tensor that a module trained in full brings along, or one that is part of a conversion."""
        if made.conversion is None:
            assert made.change is not None and made.change.trained is not None
            adapter, key = made.change.trained
            return adapter.tensor(key, reader)
        if made.item.key not in self._converted:
            self._converted.update(self._convert(made.conversion, reader))
        return self._converted.pop(made.item.key)

    def _convert(self, group: Conversion, reader: Reader) -> dict[str, Tensor]:
        """A group of tensors that the model holds in another form: there and, changed, back again.

        Raises:
            MergeError: the way back does not restore the tensors as they were.
        """
        entries = {key: self._outputs[key].source for key in group.sources}
        before = {key: reader.read(entry) for key, entry in entries.items() if entry is not None}
        inside = group.forward(before)
        again = group.backward(inside)
        if again.keys() != before.keys() or not all(torch.equal(again[key], before[key]) for key in before):
            raise MergeError(
                f"'{group.parameters[0]}' is made of '{group.sources[0]}' and others ({group.operations}), and transformers "
                "cannot undo that: leave these layers out of the adapter, or merge in memory"
            )
        dtype = reduce(torch.promote_types, (DTYPE_OF_CODE[self._outputs[key].item.dtype] for key in group.sources))
        for parameter in group.parameters:
            made, change = inside[parameter], self._changes.get(parameter)
            if change is not None and change.trained is not None:
                adapter, key = change.trained
                made = adapter.tensor(key, reader)
            elif change is not None:
                owner = next((adapter for adapter in change.adapters if adapter.owns(change.path)), None)
                stored = made if owner is None else owner.owned(change.path, reader)
                made = self._merged(change, stored.to(torch.promote_types(stored.dtype, torch.float32)), reader)
            inside[parameter] = made.to(dtype)  # once, and to what is written
            check_rounded(parameter, made, inside[parameter])
        return group.backward(inside)


def widened(tensor: Tensor, buffer: Tensor) -> Tensor:
    """The tensor in float32 (or float64, where it is that) in a buffer of bytes."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    wide = buffer[: tensor.numel() * dtype.itemsize].view(dtype)
    flat = tensor.view(-1)
    # In pieces so small that torch starts no threads for them, which would wait for each other and for the other work.
    for begin in range(0, len(flat), PIECE):
        wide[begin : begin + PIECE].copy_(flat[begin : begin + PIECE])
    return wide.view(tensor.shape)


def _stored(made: Output) -> Entry:
    """Where a site's weight is read: in the adapter, if that owns it."""
    assert made.change is not None
    for adapter in made.change.adapters:
        if adapter.owns(made.change.path):
            return adapter.owned_entry(made.change.path)
    assert made.source is not None
    return made.source
