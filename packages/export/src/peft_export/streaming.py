"""Merging checkpoint files: tensor by tensor, in memory that does not grow with the model.

Weights are computed by `peft_core.merge.merged_weight`, as in memory, so that both give the same bytes.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from peft_core import MergeError, SpecError
from peft_core.errors import listed, suggestion
from peft_core.merge import merged_weight
from peft_core.spec import DTYPES as DTYPE_NAMES

from . import card, output
from .adapter_files import AdapterFiles
from .checkpoint_files import CODES, DTYPES, INDEX, Entry, Reader, open_checkpoint
from .mapping import find_names
from .merge_plan import Change, MergePlan, Output, plan_merge
from .names import Conversion
from .shards import Writer, parse_size

Adapters: TypeAlias = str | Path | Sequence[str | Path] | Mapping[str, float]
Progress: TypeAlias = Callable[[int, int], None]
"""Called with the bytes written so far and the bytes in all."""

_CHECKED_FIRST = 1 << 30


@dataclass(frozen=True)
class MergeReport:
    """What `merge` did.

    Attributes:
        merged, trained, copied: numbers of tensors: with an adapter merged in, replaced in full, and as they were.
        left_out: files of the base that were not copied, since they hold weights from before. notes: for the user.
    """

    out: str
    base: str
    adapters: Mapping[str, float]
    dtype: str
    tensors: int
    merged: int
    trained: int
    copied: int
    bytes: int
    files: tuple[str, ...]
    seconds: float
    left_out: tuple[str, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def merge(
    base: str | Path,
    adapters: Adapters,
    out: str | Path,
    *,
    dtype: str | None = None,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    untie: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Merge adapters into a checkpoint's files, without building the model.

    Args:
        base: checkpoint directory. adapters: an adapter directory, several, or a map from directory to weight.
        out: the new checkpoint directory. It appears whole or not at all.
        dtype: `float32`, `bfloat16`, ... for all floating-point tensors; None keeps each tensor's own.
        max_shard_size: such as `5GB`. overwrite: replace an earlier export. untie: part tied embeddings where need be.

    Raises:
        CheckpointError: an input cannot be read, the adapter belongs to another base, or the output cannot be written.
        MergeError: the adapters cannot be merged so. SpecError: a dtype or a size that is none.
    """
    started = time.perf_counter()
    code, largest = dtype_code(dtype), parse_size(max_shard_size)
    directory = Path(base)
    checkpoint = open_checkpoint(directory)
    parts = open_adapters(adapters)
    config = output.read_config(directory)
    names = find_names(checkpoint, parts[0].header, config, str(parts[0].directory))
    plan = plan_merge(checkpoint, parts, names, config, code, untie)
    inputs = [directory, *(part.directory for part in parts)]
    with output.export_directory(out, inputs, overwrite) as temporary, _Verification(parts) as verification:
        items = [made.item for made in plan.outputs]
        with Writer(temporary, items, checkpoint.metadata, largest) as writer:
            _Pipeline(writer, plan, parts, progress).run()
            files = writer.write_index()
        skip = {output.MARKER, card.NAME, INDEX, *(entry.file.name for entry in checkpoint.entries.values())}
        left_out = output.copy_rest(directory, temporary, skip)
        _write_config(directory, temporary, config, plan, code)
        verification.finish()
        report = MergeReport(
            out=str(out),
            base=str(base),
            adapters={str(part.directory): part.weight for part in parts},
            dtype=str(DTYPES[code or checkpoint.dtype]).removeprefix("torch."),
            tensors=len(items),
            merged=sum(1 for change in plan.changes.values() if change.adapters),
            trained=sum(1 for change in plan.changes.values() if change.trained),
            copied=sum(1 for made in plan.outputs if made.change is None and made.conversion is None),
            bytes=sum(item.nbytes for item in items),
            files=tuple(files),
            seconds=round(time.perf_counter() - started, 3),
            left_out=tuple(left_out),
            notes=plan.notes,
        )
        marker = output.marker("merged", [part.header for part in parts], plan.config, report.to_json())
        output.write_json(temporary / output.MARKER, marker)
        (temporary / card.NAME).write_text(card.merged(directory, parts, report), encoding="utf-8")
    return report


def open_adapters(adapters: Adapters) -> list[AdapterFiles]:
    """The adapters of a path, several paths, or a map from path to weight; their headers are checked.

    Raises:
        MergeError: none is given, or one twice. CheckpointError, PluginError: see `AdapterFiles`.
    """
    if isinstance(adapters, (str, Path)):
        adapters = [adapters]
    weights = adapters if isinstance(adapters, Mapping) else dict.fromkeys(map(str, adapters), 1.0)
    if not weights or len(weights) != len(adapters):
        raise MergeError("no adapter is given" if not weights else "an adapter is given twice")
    return [AdapterFiles(directory, weight) for directory, weight in weights.items()]


def dtype_code(dtype: str | None) -> str | None:
    """safetensors' code of a dtype's name.

    Raises:
        SpecError: it is no floating-point dtype.
    """
    if dtype is None:
        return None
    if dtype not in DTYPE_NAMES:
        raise SpecError(f"no dtype '{dtype}'{suggestion(dtype, DTYPE_NAMES)}; there are {listed(DTYPE_NAMES)}")
    return CODES[DTYPE_NAMES[dtype]]


class _Verification:
    """Compares the adapters' checksums: at once, or beside the merge for one as large as a model."""

    def __init__(self, adapters: Sequence[AdapterFiles]) -> None:
        self._threads = ThreadPoolExecutor(1)
        self._pending: list[Future[None]] = []
        for adapter in adapters:
            if adapter.nbytes <= _CHECKED_FIRST:
                adapter.verify()
            else:
                self._pending.append(self._threads.submit(adapter.verify))

    def __enter__(self) -> _Verification:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None and issubclass(kind, Exception):
            self.finish()  # a damaged adapter is the better explanation
        self._threads.shutdown(cancel_futures=True)

    def finish(self) -> None:
        """Wait for the comparisons; raises CheckpointError where one fails."""
        for pending in self._pending:
            pending.result()


class _Pipeline:
    """Reads and computes the outputs in the order of the files, while another thread writes them."""

    def __init__(
        self, writer: Writer, plan: MergePlan, adapters: Sequence[AdapterFiles], progress: Progress | None
    ) -> None:
        self._writer = writer
        self._outputs = {made.item.key: made for made in plan.outputs}
        self._changes = plan.changes
        self._total = sum(made.item.nbytes for made in plan.outputs)
        self._progress = progress
        self._done = 0
        self._converted: dict[str, Tensor] = {}
        sizes = [math.prod(made.item.shape) for made in plan.outputs if made.change is not None and made.change.path]
        self._largest = max(sizes, default=0)
        self._scratch: dict[torch.dtype, Tensor] = {}

    def run(self) -> None:
        """Write everything."""
        order = [self._outputs[key] for key in self._writer.order]
        computed = deque(made for made in order if made.change is not None or made.conversion is not None)
        # Of what was computed, one tensor at a time waits to be written; copies take no memory.
        waiting: deque[Future[None]] = deque()
        last: Future[None] | None = None
        thread = ThreadPoolExecutor(1)
        with Reader() as here, Reader() as there, torch.no_grad():
            try:
                for made in order:
                    if made.change is None and made.conversion is None:
                        waiting.append(thread.submit(self._copy, made, there))
                    else:
                        computed.popleft()
                        if computed and (source := computed[0].source) is not None:
                            here.expect(source)
                        tensor = self._compute(made, here)
                        if last is not None:
                            last.result()
                        last = thread.submit(self._write, made, tensor)
                        del tensor
                        waiting.append(last)
                    while waiting and waiting[0].done():
                        waiting.popleft().result()
                for future in waiting:
                    future.result()
            finally:
                thread.shutdown(cancel_futures=True)

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
        self._done += made.item.nbytes
        if self._progress is not None:
            self._progress(self._done, self._total)

    def _compute(self, made: Output, reader: Reader) -> Tensor:
        """The tensor of an output, not rounded to its dtype yet, in memory that the next one does not touch."""
        if made.conversion is not None:
            if made.item.key not in self._converted:
                self._converted.update(self._convert(made.conversion, reader))
            return self._converted.pop(made.item.key)
        assert made.change is not None
        tensor = self._changed(made.change, made.source, reader)
        place = tensor.untyped_storage().data_ptr()
        # A method may return the weight that it was given.
        return tensor.clone() if any(held.data_ptr() == place for held in self._scratch.values()) else tensor

    def _changed(self, change: Change, source: Entry | None, reader: Reader, stored: Tensor | None = None) -> Tensor:
        """A parameter after its change, oriented as in the files; `stored` is it before, if it was read already."""
        if change.trained is not None:
            adapter, key = change.trained
            return adapter.tensor(key, reader)
        site = change.adapters[0].sites[change.path]
        wide = torch.promote_types(site.dtype if source is None else DTYPES[source.dtype], torch.float32)
        # One weight after the other is widened into the same memory: fresh memory would cost more than the arithmetic.
        if wide not in self._scratch:
            self._scratch[wide] = torch.empty(max(self._largest, site.in_features * site.out_features), dtype=wide)
        buffer = self._scratch[wide]
        if any(adapter.owns(change.path) for adapter in change.adapters):
            weight = torch.empty(site.out_features, site.in_features, dtype=wide, device="meta")
        else:
            weight = stored.to(wide) if stored is not None else reader.read(source, buffer)  # type: ignore[arg-type]
            weight = weight.T if site.transposed else weight
        parts = [adapter.contribution(change.path, reader, buffer) for adapter in change.adapters]
        merged = merged_weight(weight, parts)
        return merged.T if site.transposed else merged

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
        dtype = next(iter(before.values())).dtype
        del before, again
        for parameter in group.parameters:
            if (change := self._changes.get(parameter)) is not None:
                inside[parameter] = self._changed(change, None, reader, inside[parameter]).to(dtype, copy=True)
        return group.backward(inside)


def _write_config(base: Path, temporary: Path, config: Mapping[str, Any], plan: MergePlan, code: str | None) -> None:
    """Put the changes into the copied `config.json`; without any it stays as it is, byte for byte."""
    edits = dict(plan.config)
    if code is not None and config:
        edits["torch_dtype" if "torch_dtype" in config else "dtype"] = str(DTYPES[code]).removeprefix("torch.")
    if not edits or not config:
        return
    changed = {**config, **edits}
    inner = changed.get("text_config")
    if isinstance(inner, dict):
        changed["text_config"] = {key: edits.get(key, value) for key, value in inner.items()}
    output.write_json(temporary / "config.json", changed)
