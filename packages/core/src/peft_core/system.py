"""What operating systems do differently: files brought to the disk, exchanged, linked, read and written at a place; text."""

from __future__ import annotations

import ctypes
import io
import os
import shutil
import sys
import threading
from pathlib import Path

WINDOWS = sys.platform == "win32"
BINARY: int = getattr(os, "O_BINARY", 0)
"""For `os.open`: Windows translates the ends of lines otherwise."""

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_place = threading.Lock()


def sync(path: Path) -> None:
    """Wait until a file or directory is on the disk. Windows does this for files only, which must be open for writing."""
    if path.is_symlink() or (WINDOWS and (path.is_dir() or not os.access(path, os.W_OK))):
        return
    handle = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two directories in one step; False where the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    names = os.fsencode(one), os.fsencode(other)
    return rename is not None and rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0


def link(source: str | Path, destination: str | Path) -> str:
    """A second name for a file (of a symbolic link: for the link), or a copy where the file system has no such thing."""
    try:
        os.link(source, destination, follow_symlinks=os.link not in os.supports_follow_symlinks)
    except OSError:
        shutil.copy2(source, destination, follow_symlinks=False)
    return str(destination)


def show_all_text() -> None:
    """Let standard output show a question mark for a sign that it has none for (≤ in Windows' code pages), and go on."""
    if isinstance(sys.stdout, io.TextIOWrapper) and not sys.stdout.encoding.lower().startswith("utf"):
        sys.stdout.reconfigure(errors="replace")


def read_at(handle: int, into: memoryview, place: int) -> int:
    """Read from a place in a file, threads side by side. Returns how many bytes there were; 0 at the end of the file."""
    if hasattr(os, "preadv"):
        return os.preadv(handle, [into], place)
    with _place:
        os.lseek(handle, place, os.SEEK_SET)
        found = os.read(handle, len(into))
    into[: len(found)] = found
    return len(found)


def write_at(handle: int, data: memoryview | bytes, place: int) -> int:
    """Write at a place in a file, threads side by side. Returns how many bytes were written."""
    if hasattr(os, "pwrite"):
        return os.pwrite(handle, data, place)
    with _place:
        os.lseek(handle, place, os.SEEK_SET)
        return os.write(handle, data)
