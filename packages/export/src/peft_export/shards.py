"""Writing tensors into shards of bounded size, whose layout is fixed before the first byte.

Tensors that are cast pass through a buffer piece by piece; untouched ones pass from file to file in the kernel.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from peft_core import CheckpointError, MergeError, SpecError, system
from peft_core.dtypes import name_of

from .checkpoint_files import CHUNK, DTYPE_OF_CODE, INDEX, PIECE, SINGLE, Entry, Reader, all_finite

Progress: TypeAlias = Callable[[int, int], None]
"""Called with the bytes written so far and the bytes in all."""

_NO_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF}


@dataclass(frozen=True)
class Item:
    """A tensor to be written."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class _Shard:
    name: str
    header: bytes
    starts: Mapping[str, int]


class Writer:
    """Writes tensors, in any order and from any thread, into shards of bounded size whose layout is fixed beforehand.

    Args:
        directory: where the files go. items: every tensor, in the order that they should have.
        largest: bytes that a shard may hold (a larger tensor gets a shard of its own), or None for one file.
        name: of a single file; shards are numbered.
    """

    def __init__(
        self,
        directory: Path,
        items: Sequence[Item],
        metadata: Mapping[str, str],
        largest: int | None = None,
        name: str = SINGLE,
    ) -> None:
        self.directory = directory
        self._items = {item.key: item for item in items}
        self._shards = _lay_out(items, {**metadata, "format": "pt"}, largest, name)
        self._places = {key: shard for shard in self._shards for key in shard.starts}
        self._left = {shard.name: set(shard.starts) for shard in self._shards}
        self._handles: dict[str, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    @property
    def order(self) -> list[str]:
        """Keys in the order of the files: the order to write them in."""
        return [key for shard in self._shards for key in shard.starts]

    @property
    def files(self) -> list[str]:
        """Names of the weight files."""
        return [shard.name for shard in self._shards]

    def write(self, key: str, tensor: Tensor) -> None:
        """Write a tensor, cast to its item's dtype.

        Raises:
            MergeError: a value is too large for that. OSError: the disk is full, and the like.
        """
        item = self._items[key]
        assert tuple(tensor.shape) == item.shape, f"{key}: {tuple(tensor.shape)} for {item.shape}"
        flat = tensor.contiguous().view(-1)
        if flat.dtype == DTYPE_OF_CODE[item.dtype]:
            shard = self._places[key]
            self._put(shard, shard.starts[key], flat)
            self._done(shard, key)
        else:
            self._write_pieces(key, flat.split(PIECE))

    def cast(self, key: str, reader: Reader, entry: Entry) -> None:
        """Write a tensor of another file in this item's dtype; raises as `write` does."""
        self._write_pieces(key, reader.pieces(entry))

    def _write_pieces(self, key: str, pieces: Iterable[Tensor]) -> None:
        shard, dtype = self._places[key], DTYPE_OF_CODE[self._items[key].dtype]
        place = shard.starts[key]
        raw = torch.empty(min(CHUNK, self._items[key].nbytes), dtype=torch.uint8)
        buffer, filled = raw.view(dtype), 0
        for piece in pieces:
            if filled + len(piece) > len(buffer):
                place = self._put(shard, place, buffer[:filled])
                filled = 0
            check_rounded(key, piece, buffer[filled : filled + len(piece)].copy_(piece))
            filled += len(piece)
        self._put(shard, place, buffer[:filled])
        self._done(shard, key)

    def copy(self, key: str, reader: Reader, entry: Entry) -> None:
        """Copy a tensor's bytes from another file."""
        shard = self._places[key]
        _copy_range(reader.handle(entry.file), entry, self._handle(shard), shard.starts[key])
        self._done(shard, key)

    def write_index(self) -> list[str]:
        """Write the index, if there are several shards. Returns the names of all files written."""
        unwritten = [key for left in self._left.values() for key in left]
        assert not unwritten, f"not written: {unwritten[:3]}"
        if len(self._shards) == 1:
            return self.files
        total = {
            "total_parameters": sum(math.prod(item.shape) for item in self._items.values()),
            "total_size": sum(item.nbytes for item in self._items.values()),
        }
        weight_map = {key: shard.name for key, shard in sorted(self._places.items())}
        text = json.dumps({"metadata": total, "weight_map": weight_map}, indent=2) + "\n"
        (self.directory / INDEX).write_text(text, encoding="utf-8")
        return [*self.files, INDEX]

    def _handle(self, shard: _Shard) -> int:
        with self._lock:
            if shard.name not in self._handles:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | system.BINARY
                handle = os.open(self.directory / shard.name, flags, 0o666)
                self._handles[shard.name] = handle
                _write_at(handle, 0, memoryview(shard.header))
            return self._handles[shard.name]

    def _put(self, shard: _Shard, place: int, tensor: Tensor) -> int:
        """Write at a position; returns the one after it."""
        view = tensor.view(torch.uint8).numpy().data
        _write_at(self._handle(shard), place, view)
        return place + len(view)

    def _done(self, shard: _Shard, key: str) -> None:
        handle = self._handle(shard)  # an empty tensor writes nothing, but its file must exist
        if hasattr(os, "posix_fadvise"):
            # Begin to write it to disk: what is left for the last fsync is waited for.
            os.posix_fadvise(handle, shard.starts[key], self._items[key].nbytes, os.POSIX_FADV_DONTNEED)
        with self._lock:
            self._left[shard.name].discard(key)
            if not self._left[shard.name]:
                os.close(self._handles.pop(shard.name))


def check_rounded(name: str, before: Tensor, after: Tensor) -> None:
    """Raises MergeError where a finite value has become infinite, in a dtype of less range (bfloat16 has float32's)."""
    if before.dtype == after.dtype or torch.finfo(after.dtype).max > torch.finfo(before.dtype).max / 2:
        return
    if not all_finite(after) and not torch.equal(before.isfinite(), after.isfinite()):
        largest = before[before.isfinite()].abs().max().item()
        raise MergeError(
            f"'{name}' has values up to {largest:.3g}, which are too large for {name_of(after.dtype)}; write bfloat16 or "
            "float32 (--dtype)"
        )


def _lay_out(items: Sequence[Item], metadata: Mapping[str, str], largest: int | None, name: str) -> list[_Shard]:
    parts: list[list[Item]] = [[]]
    size = 0
    for item in items:
        if largest is not None and parts[-1] and size + item.nbytes > largest:
            parts.append([])
            size = 0
        parts[-1].append(item)
        size += item.nbytes
    stem = Path(name).stem
    names = (
        [name]
        if len(parts) == 1
        else [f"{stem}-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)]
    )
    return [_shard(name, part, metadata) for name, part in zip(names, parts, strict=True)]


def _shard(name: str, items: list[Item], metadata: Mapping[str, str]) -> _Shard:
    # Wider elements first, so that every tensor is aligned whatever comes before it.
    items = sorted(items, key=lambda item: -(DTYPE_OF_CODE[item.dtype].itemsize if item.dtype in DTYPE_OF_CODE else 1))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offsets: dict[str, int] = {}
    end = 0
    for item in items:
        offsets[item.key] = end
        header[item.key] = {
            "dtype": item.dtype,
            "shape": list(item.shape),
            "data_offsets": [end, end + item.nbytes],
        }
        end += item.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return _Shard(
        name, len(text).to_bytes(8, "little") + text, {key: start + offset for key, offset in offsets.items()}
    )


def _write_at(handle: int, place: int, view: memoryview) -> None:
    while view:
        count = system.write_at(handle, view[:CHUNK], place)
        view, place = view[count:], place + count


def _copy_range(source: int, entry: Entry, target: int, place: int) -> None:
    """Within the kernel where the system can, otherwise by reading and writing."""
    done = 0
    while done < entry.nbytes:
        count = min(CHUNK, entry.nbytes - done)
        try:
            copied = os.copy_file_range(source, target, count, entry.start + done, place + done)
        except (OSError, AttributeError) as error:
            if isinstance(error, OSError) and error.errno not in _NO_COPY:
                raise
            buffer = memoryview(bytearray(count))
            found = system.read_at(source, buffer, entry.start + done)
            copied = system.write_at(target, buffer[:found], place + done) if found else 0
        if copied == 0:
            raise CheckpointError(f"'{entry.file}' has become shorter while it was read")
        done += copied


def parse_size(text: str | int) -> int:
    """Bytes of a size such as `5GB`, `500MB`, `2GiB` or a plain number.

    Raises:
        SpecError: it is not a size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(text), re.IGNORECASE)
    size = 0
    if found:
        number, unit, binary = found.groups()
        size = int(Decimal(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))
    if size <= 0:
        raise SpecError(f"'{text}' is not a size; write it like 5GB, 500MB or 2GiB")
    return size
