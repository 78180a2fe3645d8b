"""Model checkpoints as files: what is where, checked against the files, and tensors read by range.

A memory map counts as resident memory for every page that was touched, so tensors are read by their place in the file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_core import CheckpointError, SpecError, system
from peft_core.errors import listed, reason, suggestion
from peft_core.spec import DTYPE_OF_NAME

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPE_OF_CODE: Mapping[str, torch.dtype] = {
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
CODES: Mapping[torch.dtype, str] = {dtype: code for code, dtype in DTYPE_OF_CODE.items()}
PLAIN_FLOATS = ("F64", "F32", "F16", "BF16")
"""Codes of the dtypes that can be merged and cast; the 8-bit ones come with scales of their own."""

_LARGEST_HEADER = 100_000_000
CHUNK = 1 << 24
# Elements that are cast at once: small enough to stay in the cache, and for torch to start no threads for them.
PIECE = 1 << 15


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


def dtype_code(dtype: str | None) -> str | None:
    """safetensors' code of a dtype's name.

    Raises:
        SpecError: it is not a floating-point dtype.
    """
    if dtype is None:
        return None
    if dtype not in DTYPE_OF_NAME:
        raise SpecError(f"no dtype '{dtype}'{suggestion(dtype, DTYPE_OF_NAME)}; there are {listed(DTYPE_OF_NAME)}")
    return CODES[DTYPE_OF_NAME[dtype]]


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
        if not entries:
            raise CheckpointError(f"'{path / SINGLE}' has no tensors; restore it from where it came from")
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
        raise CheckpointError(f"{where} is damaged: it is not an index of a sharded checkpoint ({error!r})") from None
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    for file in dict.fromkeys(places.values()):
        if Path(file).name != file:
            raise CheckpointError(f"{where} names the shard '{file}', which is not a file name")
        if not (path / file).is_file():
            missing = next(key for key, place in places.items() if place == file)
            raise CheckpointError(f"'{path / file}' is missing; the index says that it holds '{missing}'")
        found, metadata = read_entries(path / file)
        for key in found:
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
        CheckpointError: it is not a safetensors file, is cut short, or its header contradicts itself.
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
                what = "is empty" if not start else "is not a safetensors file, or is cut short within its header"
                raise CheckpointError(f"'{path}' {what}")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read: {reason(error)}") from None
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
        metadata = header.pop("__metadata__", None) or {}
        entries = [_entry(path, key, value, 8 + length) for key, value in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"'{path}' is not a safetensors file: its header cannot be read ({error})") from None
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
        raise CheckpointError(f"'{path}' has {size - end} bytes that its header does not know of; it is damaged")
    return {entry.key: entry for entry in entries}, {str(key): str(value) for key, value in metadata.items()}


def _entry(path: Path, key: str, value: Any, offset: int) -> Entry:
    begin, end = (int(number) for number in value["data_offsets"])
    shape = tuple(int(size) for size in value["shape"])
    entry = Entry(key, str(value["dtype"]), shape, path, offset + begin, end - begin)
    known = DTYPE_OF_CODE.get(entry.dtype)
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


def all_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    # The sum is finite only if every element is (it may overflow, too): one pass, nothing allocated.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


class Reader:
    """Reads tensors by range. Files stay open until it is closed."""

    def __init__(self) -> None:
        self._handles: dict[Path, int] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def handle(self, file: Path) -> int:
        """A descriptor of the file.

        Raises:
            CheckpointError: it cannot be opened.
        """
        if file not in self._handles:
            try:
                self._handles[file] = os.open(file, os.O_RDONLY | system.BINARY)
            except OSError as error:
                raise CheckpointError(f"'{file}' cannot be read: {error.strerror}") from None
        return self._handles[file]

    def read(self, entry: Entry, into: Tensor | None = None) -> Tensor:
        """The tensor, in memory of its own or in a buffer of bytes.

        Raises:
            CheckpointError: its dtype is unknown here, or the file cannot be read, or has shrunk.
        """
        if entry.dtype not in DTYPE_OF_CODE:
            raise CheckpointError(
                f"'{entry.file}': '{entry.key}' has the dtype {entry.dtype}, which this torch does not know"
            )
        raw = torch.empty(entry.nbytes, dtype=torch.uint8) if into is None else into[: entry.nbytes]
        self._fill(entry, 0, raw)
        return raw.view(DTYPE_OF_CODE[entry.dtype]).view(entry.shape)

    def pieces(self, entry: Entry) -> Iterator[Tensor]:
        """The tensor's elements bit by bit, one-dimensional; each piece lies where the one before it was."""
        dtype = DTYPE_OF_CODE[entry.dtype]
        step = PIECE * dtype.itemsize
        raw = torch.empty(min(step, entry.nbytes), dtype=torch.uint8)
        for begin in range(0, entry.nbytes, step):
            piece = raw[: min(step, entry.nbytes - begin)]
            self._fill(entry, begin, piece)
            yield piece.view(dtype)

    def same(self, one: Entry, other: Entry) -> bool:
        """Whether two tensors are equal, bit for bit."""
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        pairs = zip(self.pieces(one), self.pieces(other), strict=True)
        return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)

    def _fill(self, entry: Entry, begin: int, raw: Tensor) -> None:
        view = raw.numpy().data
        done = 0
        while done < len(view):
            count = system.read_at(self.handle(entry.file), view[done : done + CHUNK], entry.start + begin + done)
            if count == 0:
                raise CheckpointError(f"'{entry.file}' has become shorter while it was read")
            done += count
