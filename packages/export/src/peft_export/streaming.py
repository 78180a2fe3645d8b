"""Merging checkpoint files: tensor by tensor, in memory that does not grow with the model.

Weights are computed by `peft_core.merge.merged_weight`, as in memory, so that both give the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from peft_core.dtypes import name_of

from . import card, output
from .adapter_files import AdapterFiles, Adapters, open_adapters
from .checkpoint_files import DTYPE_OF_CODE, INDEX, dtype_code, open_checkpoint
from .mapping import find_names
from .merge_plan import MergePlan, plan_merge
from .pipeline import Pipeline
from .reports import MergeReport
from .shards import Progress, Writer, parse_size

_CHECKED_FIRST = 1 << 30


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
            Pipeline(writer, plan, progress).run()
            files = writer.write_index()
        skip = {output.MARKER, card.NAME, INDEX, *(entry.file.name for entry in checkpoint.entries.values())}
        left_out = output.copy_rest(directory, temporary, skip)
        _write_config(temporary, config, plan, code)
        verification.finish()
        report = MergeReport(
            out=str(out),
            base=str(base),
            adapters={str(part.directory): part.weight for part in parts},
            dtype=name_of(DTYPE_OF_CODE[code or checkpoint.dtype]),
            tensors=len(items),
            merged=sum(1 for change in plan.changes.values() if change.adapters),
            trained=sum(1 for change in plan.changes.values() if change.trained),
            copied=sum(made.is_copy for made in plan.outputs),
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


def _write_config(temporary: Path, config: Mapping[str, Any], plan: MergePlan, code: str | None) -> None:
    """Put the changes into the copied `config.json`; without any it stays as it is, byte for byte."""
    edits = dict(plan.config)
    if code is not None and config:
        edits["torch_dtype" if "torch_dtype" in config else "dtype"] = name_of(DTYPE_OF_CODE[code])
    if not edits or not config:
        return
    output.write_json(temporary / "config.json", output.edited(config, edits))
