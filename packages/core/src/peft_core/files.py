"""Directories that appear whole or not at all, and tensor files that are read with suspicion."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from .errors import CheckpointError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def whole_directory(target: str | Path, ours: Collection[str]) -> Iterator[Path]:
    """A temporary directory that takes the place of `target` in one step when the block ends well.

    What stands in `target` under other names than `ours` is carried over. If the block fails, or the process dies in it,
    `target` is as it was.

    Raises:
        CheckpointError: the target is a file, or cannot be written (no permission, disk full).
    """
    target = Path(os.path.abspath(target))
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"'{target}' is a file; a directory is written there: choose another path")
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.{os.getpid()}-", suffix=".tmp", dir=target.parent))
        os.chmod(temporary, 0o777 & ~_umask())
        yield temporary
        if target.exists():
            _carry_over(target, temporary, ours)
        for path in sorted(temporary.rglob("*")):
            _sync(path)
        _sync(temporary)
        _put_in_place(temporary, target)
        _sync(target.parent)
    except OSError as error:
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else str(error)
        raise CheckpointError(
            f"'{target}' could not be written: {reason}; what was there before is unchanged"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    _sync(temporary)
    temporary.replace(path)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write a safetensors file and return its SHA-256."""
    ready = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    try:
        safetensors.torch.save_file(ready, path, metadata=dict(metadata or {}) or None)
    except SafetensorError as error:  # its I/O errors carry no errno
        code = errno.ENOSPC if "os error 28" in str(error) or "No space" in str(error) else errno.EIO
        raise OSError(errno.EFBIG if "os error 27" in str(error) else code, str(error)) from error
    return checksum(path)


def read_tensors(path: Path, expected_checksum: str | None = None) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        CheckpointError: the file is missing, no safetensors file, cut short, or not the one that was written.
    """
    if not path.is_file():
        raise CheckpointError(f"'{path}' is missing")
    with path.open("rb") as file:
        start = file.read(16)
    if not start:
        raise CheckpointError(f"'{path}' is empty; restore it from a copy")
    # safetensors: eight bytes of header length, then the header's brace.
    headed = len(start) > 8 and start[8:9] == b"{"
    if not headed and start.startswith((b"PK", b"\x80")):
        raise CheckpointError(
            f"'{path}' is a pickle, which can run code when it is read; only safetensors files are read here"
        )
    if expected_checksum is not None and checksum(path) != expected_checksum:
        raise CheckpointError(
            f"'{path}' is not the file that was saved (its SHA-256 differs): it is cut short, damaged or exchanged"
        )
    try:
        # Copies: a tensor that is mapped from a file dies with it.
        return {key: tensor.clone() for key, tensor in safetensors.torch.load_file(path).items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"'{path}' cannot be read as safetensors: {error}; it is cut short or damaged") from None


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _carry_over(source: Path, destination: Path, ours: Collection[str]) -> None:
    for entry in source.iterdir():
        there = destination / entry.name
        if entry.name in ours or there.exists():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, there, symlinks=True, copy_function=_link)
        else:
            _link(entry, there)


def _link(source: str | Path, destination: str | Path) -> str:
    try:
        os.link(source, destination, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, destination, follow_symlinks=False)
    return str(destination)


def _put_in_place(temporary: Path, target: Path) -> None:
    """Exchange the two directories in one step; where the system cannot, rename one after the other."""
    if not target.exists():
        os.rename(temporary, target)
        return
    exchange = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    names = os.fsencode(temporary), os.fsencode(target)
    if exchange is not None and exchange(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return
    aside = temporary.with_suffix(".old.tmp")
    os.rename(target, aside)
    os.rename(temporary, target)
    shutil.rmtree(aside, ignore_errors=True)


def _sweep(target: Path) -> None:
    """Remove what writers that were killed left behind."""
    for left in target.parent.glob(f".{target.name}.*-*.tmp"):
        pid = left.name.removeprefix(f".{target.name}.").partition("-")[0]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(path: Path) -> None:
    if path.is_symlink():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
