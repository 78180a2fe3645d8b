"""Directories that appear whole or not at all, and tensor files that are read with suspicion."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import platform
import re
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from . import system
from .errors import CheckpointError, reason

_ASIDE = ".old.tmp"
_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file would be larger than the system allows (see ulimit -f)",
}
_SAID = {
    "os error 28": errno.ENOSPC,
    "os error 112": errno.ENOSPC,
    "No space": errno.ENOSPC,
    "os error 27": errno.EFBIG,
}
"""What safetensors says of the system's errors, 112 being Windows'."""


@contextmanager
def whole_directory(target: str | Path, ours: Collection[str]) -> Iterator[Path]:
    """A temporary directory that takes the place of `target` in one step when the block ends well.

    What stands in `target` under other names than `ours` is carried over. If the block fails, or the process dies in it,
    `target` is as it was. A mount point cannot be renamed: there the files are moved in one by one, the first of `ours` last.

    Raises:
        CheckpointError: the target is a file, or cannot be written (no permission, disk full).
    """
    target = Path(target).resolve()  # a link stays, what it leads to is replaced
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"'{target}' is a file, but a directory must be written there; choose another path")
    mounted = os.path.ismount(target)
    beside = target if mounted else target.parent
    temporary = None
    outcome = "what was there before is unchanged"
    try:
        beside.mkdir(parents=True, exist_ok=True)
        _sweep(target, beside)
        temporary = beside / f".{target.name}.{_writer()}-{secrets.token_hex(4)}.tmp"
        temporary.mkdir()
        yield temporary
        if target.exists() and not mounted:
            _carry_over(target, temporary, ours)
        for path in sorted(temporary.rglob("*")):
            system.sync(path)
        system.sync(temporary)
        if mounted:
            outcome = "some of its files may be new and others old: write it again"
            _move_in(temporary, target, ours)
        else:
            _put_in_place(temporary, target)
        outcome = "the new files are there, but not yet known to be on the disk"
        system.sync(beside)
    except OSError as error:
        # NumPy's own error of a short write, which names no reason.
        short = error.errno is None and re.fullmatch(r"\d+ requested and \d+ written", str(error))
        why = _REASONS.get(errno.ENOSPC if short else error.errno or 0, str(error))
        raise CheckpointError(f"'{target}' could not be written: {why}; {outcome}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all. What was read with `errors="surrogateescape"` is written as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")
        system.sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    system.sync(path.parent)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write a safetensors file and return its SHA-256."""
    ready = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    path.touch()
    mode = path.stat().st_mode  # of any new file; safetensors lets nobody else read its own
    try:
        safetensors.torch.save_file(ready, path, metadata=dict(metadata or {}) or None)
    except SafetensorError as error:  # its I/O errors carry no errno
        codes = (code for said, code in _SAID.items() if said in str(error))
        raise OSError(next(codes, errno.EIO), str(error)) from error
    os.chmod(path, mode)
    return checksum(path)


def read_tensors(path: Path, expected_checksum: str | None = None) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        CheckpointError: the file is missing, not a safetensors file, truncated, or not the one that was written.
    """
    if not path.is_file():
        raise CheckpointError(f"'{path}' is missing")
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read: {reason(error)}") from None
    if not start:
        raise CheckpointError(f"'{path}' is empty; restore it from a copy")
    # safetensors: eight bytes of header length, then the header's brace.
    headed = len(start) > 8 and start[8:9] == b"{"
    if not headed and start.startswith((b"PK", b"\x80")):
        raise CheckpointError(
            f"'{path}' is a pickle, which can run code when it is read; only safetensors files are read here"
        )
    if expected_checksum is not None:
        check_saved(path, expected_checksum)
    try:
        # Copies: a tensor that is mapped from a file dies with it.
        return {key: tensor.clone() for key, tensor in safetensors.torch.load_file(path).items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"'{path}' cannot be read as safetensors: {error}; it is truncated or damaged") from None


def check_saved(path: Path, recorded: str) -> None:
    """Make sure that a file is the one with the recorded checksum.

    Raises:
        CheckpointError: it is missing, cannot be read, or is another one.
    """
    if not path.is_file():
        raise CheckpointError(f"'{path}' is missing")
    try:
        found = checksum(path)
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read: {reason(error)}") from None
    if found != recorded:
        raise CheckpointError(
            f"'{path}' is not the file that was saved (its SHA-256 differs): it was truncated, damaged or replaced"
        )


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
            shutil.copytree(entry, there, symlinks=True, copy_function=system.link)
        else:
            system.link(entry, there)


def _put_in_place(temporary: Path, target: Path) -> None:
    """Exchange the two directories in one step; where the system cannot, rename one after the other."""
    if not target.exists():
        try:
            os.rename(temporary, target)
            return
        except OSError:
            if not target.exists():  # nor did another process make it meanwhile
                raise
    if system.exchange(temporary, target):
        return
    aside = temporary.with_suffix(_ASIDE)
    os.rename(target, aside)
    try:
        os.rename(temporary, target)
    except OSError:
        os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _move_in(temporary: Path, target: Path, ours: Collection[str]) -> None:
    """Move what was written into a directory that must stay where it is; the first of `ours` last."""
    last = next(iter(ours), "")
    new = {entry.name for entry in temporary.iterdir()}
    for name in sorted(new | set(ours), key=lambda name: name == last):
        if (target / name).is_dir():
            shutil.rmtree(target / name)
        if name in new:
            os.replace(temporary / name, target / name)
        else:
            (target / name).unlink(missing_ok=True)


def _writer() -> str:
    """This process among all that may write to a shared disk."""
    return f"{re.sub(r'[^A-Za-z0-9]', '_', platform.node())}.{os.getpid()}"


def _sweep(target: Path, beside: Path) -> None:
    """Remove what writers on this machine left behind that were killed, and bring back what one of them had put aside."""
    host = _writer().partition(".")[0]
    for left in sorted(beside.glob(f".{glob.escape(target.name)}.{host}.*-*.tmp")):
        pid = left.name.removeprefix(f".{target.name}.{host}.").partition("-")[0]
        if not pid.isdigit() or psutil.pid_exists(int(pid)):
            continue
        if left.name.endswith(_ASIDE) and not target.exists():
            os.rename(left, target)
        else:
            shutil.rmtree(left, ignore_errors=True)
