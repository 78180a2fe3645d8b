"""Model checkpoints as files: what is where, ranges read without a memory map, shards written at known positions.

A memory map counts as resident memory for every page that was touched, so tensors are read with plain `pread` into
buffers that are freed when they are done with, and untouched tensors pass from file to file in the kernel.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from peft_core import CheckpointError, SpecError
from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES: Mapping[torch.dtype, str] = {dtype: code for code, dtype in DTYPES.items()}
PLAIN_FLOATS = ("F64", "F32", "F16", "BF16")
"""Codes of the dtypes that can be merged and cast; the 8-bit ones come with scales of their own."""

_LARGEST_HEADER = 100_000_000
_CHUNK = 1 << 24
_NO_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF}


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: its key, safetensors dtype code and shape, and the range of bytes that holds it."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """A model's weights on disk: entries by key in the order of the files, and the files' metadata."""

    directory: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        """Size of all tensors."""
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def dtype(self) -> str:
        """Code of the plain floating-point dtype that most elements have."""
        sizes = dict.fromkeys(PLAIN_FLOATS, 0)
        for entry in self.entries.values():
            if entry.dtype in sizes:
                sizes[entry.dtype] += entry.numel
        return max(sizes, key=lambda code: sizes[code])


def open_checkpoint(directory: str | Path) -> Checkpoint:
    """The single or sharded safetensors checkpoint in a directory, from headers alone.

    Raises:
        CheckpointError: it is none, a shard is missing, the index or a header does not fit the files.
    """
    path = Path(directory)
    if not path.is_dir():
        raise CheckpointError(
            f"'{directory}' {'is a file, not a checkpoint directory' if path.exists() else 'does not exist'}"
        )
    if (path / SINGLE).is_file():
        entries, metadata = read_entries(path / SINGLE)
        return Checkpoint(path, entries, metadata)
    if (path / INDEX).is_file():
        return _open_sharded(path)
    formats = ("pytorch_model*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.ckpt")
    others = sorted(found.name for pattern in formats for found in path.glob(pattern))
    there = (
        f"it has {others[0]}, which must be saved as safetensors first"
        if others
        else f"it has neither {SINGLE} nor {INDEX}"
    )
    raise CheckpointError(f"'{directory}' is not a safetensors checkpoint: {there}")


def _open_sharded(path: Path) -> Checkpoint:
    where = f"'{path / INDEX}'"
    try:
        weight_map = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
        places = {str(key): str(file) for key, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(
            f"{where} is damaged: it is no index of a sharded checkpoint ({error!r})"
        ) from None
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    for file in dict.fromkeys(places.values()):
        if Path(file).name != file:
            raise CheckpointError(f"{where} names the shard '{file}', which is not a file name")
        if not (path / file).is_file():
            missing = next(key for key, place in places.items() if place == file)
            raise CheckpointError(f"'{path / file}' is missing; the index says that it holds '{missing}'")
        found, metadata = read_entries(path / file)
        for key, entry in found.items():
            if places.get(key) != file:
                said = f"in '{places[key]}'" if key in places else "nowhere"
                raise CheckpointError(f"{where} is wrong: '{key}' is in '{file}', the index says {said}")
        entries.update(found)
    if lost := [key for key in places if key not in entries]:
        raise CheckpointError(f"{where} is wrong: '{places[lost[0]]}' does not hold '{lost[0]}'")
    return Checkpoint(path, entries, metadata)


def read_entries(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The header of a safetensors file, checked against the file: entries in the order of their bytes, and metadata.

    Raises:
        CheckpointError: it is no safetensors file, is cut short, or its header contradicts itself.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if start == b"version ":
                raise CheckpointError(
                    f"'{path}' is a Git LFS pointer, not the file itself; fetch it with: git lfs pull"
                )
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(size - 8, _LARGEST_HEADER):
                what = (
                    "is empty"
                    if not start
                    else "is not a safetensors file, or is cut short within its header"
                )
                raise CheckpointError(f"'{path}' {what}")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read: {error.strerror or error}") from None
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
        metadata = header.pop("__metadata__", None) or {}
        entries = [_entry(path, key, value, 8 + length) for key, value in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"'{path}' is not a safetensors file: its header cannot be read ({error})"
        ) from None
    entries.sort(key=lambda entry: (entry.start, entry.nbytes))
    end = 8 + length
    for entry in entries:
        if entry.start != end:
            raise CheckpointError(
                f"'{path}': the header is wrong: '{entry.key}' does not begin where the tensor before it ends"
            )
        end += entry.nbytes
    if end > size:
        raise CheckpointError(f"'{path}' is cut short: its header claims {end} bytes, the file has {size}")
    if end < size:
        raise CheckpointError(
            f"'{path}' has {size - end} bytes that its header does not know of; it is damaged"
        )
    return {entry.key: entry for entry in entries}, {str(key): str(value) for key, value in metadata.items()}


def _entry(path: Path, key: str, value: Any, offset: int) -> Entry:
    begin, end = (int(number) for number in value["data_offsets"])
    shape = tuple(int(size) for size in value["shape"])
    entry = Entry(key, str(value["dtype"]), shape, path, offset + begin, end - begin)
    known = DTYPES.get(entry.dtype)
    if (
        begin < 0
        or end < begin
        or any(size < 0 for size in shape)
        or (known and entry.numel * known.itemsize != entry.nbytes)
    ):
        raise CheckpointError(
            f"'{path}': the header is wrong: '{key}' of shape {list(shape)} claims the bytes {begin} to {end}"
        )
    return entry


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"'{next(name for name in names if names.count(name) > 1)}' occurs twice")
    return found


class Reader:
    """Reads tensors by range. Files stay open until it is closed."""

    def __init__(self) -> None:
        self._handles: dict[Path, int] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def handle(self, file: Path) -> int:
        """A descriptor of the file."""
        if file not in self._handles:
            self._handles[file] = os.open(file, os.O_RDONLY)
        return self._handles[file]

    def read(self, entry: Entry) -> Tensor:
        """The tensor, in memory of its own.

        Raises:
            CheckpointError: its dtype is unknown here, or the file has shrunk.
        """
        if entry.dtype not in DTYPES:
            raise CheckpointError(
                f"'{entry.file}': '{entry.key}' has the dtype {entry.dtype}, which this torch does not know"
            )
        raw = torch.empty(entry.nbytes, dtype=torch.uint8)
        self._fill(entry, 0, raw)
        return raw.view(DTYPES[entry.dtype]).view(entry.shape)

    def chunks(self, entry: Entry) -> Iterator[Tensor]:
        """The tensor's elements in pieces of bounded size, one-dimensional."""
        dtype = DTYPES[entry.dtype]
        for begin in range(0, entry.nbytes, _CHUNK):
            raw = torch.empty(min(_CHUNK, entry.nbytes - begin), dtype=torch.uint8)
            self._fill(entry, begin, raw)
            yield raw.view(dtype)

    def expect(self, entry: Entry) -> None:
        """Let the system read this tensor ahead."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.handle(entry.file), entry.start, entry.nbytes, os.POSIX_FADV_WILLNEED)

    def same(self, one: Entry, other: Entry) -> bool:
        """Whether two tensors are equal, bit for bit."""
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        return all(
            torch.equal(a.view(torch.uint8), b.view(torch.uint8))
            for a, b in zip(self.chunks(one), self.chunks(other), strict=True)
        )

    def _fill(self, entry: Entry, begin: int, raw: Tensor) -> None:
        view = memoryview(raw.numpy())
        done = 0
        while done < len(view):
            count = os.preadv(
                self.handle(entry.file), [view[done : done + _CHUNK]], entry.start + begin + done
            )
            if count == 0:
                raise CheckpointError(f"'{entry.file}' has become shorter while it was read")
            done += count


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
    """Writes tensors, in any order, into shards of bounded size whose layout is fixed beforehand.

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

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
            OSError: the disk is full, and the like.
        """
        shard, item = self._places[key], self._items[key]
        assert tuple(tensor.shape) == item.shape, f"{key}: {tuple(tensor.shape)} for {item.shape}"
        raw = tensor.to(DTYPES[item.dtype]).contiguous().reshape(-1).view(torch.uint8)
        self._put(shard, shard.starts[key], memoryview(raw.numpy()))
        self._done(shard, key)

    def cast(self, key: str, reader: Reader, entry: Entry) -> None:
        """Write a tensor of another file in this item's dtype, piece by piece."""
        shard, dtype = self._places[key], DTYPES[self._items[key].dtype]
        place = shard.starts[key]
        for piece in reader.chunks(entry):
            view = memoryview(piece.to(dtype).view(torch.uint8).numpy())
            self._put(shard, place, view)
            place += len(view)
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
        if shard.name not in self._handles:
            handle = os.open(self.directory / shard.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            self._handles[shard.name] = handle
            self._put(shard, 0, memoryview(shard.header))
        return self._handles[shard.name]

    def _put(self, shard: _Shard, place: int, view: memoryview) -> None:
        handle = self._handle(shard)
        while view:
            count = os.pwrite(handle, view[:_CHUNK], place)
            view, place = view[count:], place + count

    def _done(self, shard: _Shard, key: str) -> None:
        self._handle(shard)  # an empty tensor writes nothing, but its file must exist
        self._left[shard.name].discard(key)
        if not self._left[shard.name]:
            os.close(self._handles.pop(shard.name))


def _lay_out(
    items: Sequence[Item], metadata: Mapping[str, str], largest: int | None, name: str
) -> list[_Shard]:
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
    items = sorted(items, key=lambda item: -(DTYPES[item.dtype].itemsize if item.dtype in DTYPES else 1))
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


def _copy_range(source: int, entry: Entry, target: int, place: int) -> None:
    """Within the kernel where the system can, otherwise by reading and writing."""
    done = 0
    while done < entry.nbytes:
        count = min(_CHUNK, entry.nbytes - done)
        try:
            copied = os.copy_file_range(source, target, count, entry.start + done, place + done)
        except (OSError, AttributeError) as error:
            if isinstance(error, OSError) and error.errno not in _NO_COPY:
                raise
            copied = os.pwrite(target, os.pread(source, count, entry.start + done), place + done)
        if copied == 0:
            raise CheckpointError(f"'{entry.file}' has become shorter while it was read")
        done += copied


def parse_size(text: str | int) -> int:
    """Bytes of a size such as `5GB`, `500MB`, `2GiB` or a plain number.

    Raises:
        SpecError: it is no size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(text), re.IGNORECASE)
    size = 0
    if found:
        number, unit, binary = found.groups()
        size = int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))
    if size <= 0:
        raise SpecError(f"'{text}' is no size of a shard; write it like 5GB, 500MB or 2GiB")
    return size
