"""Adapters lowered when they are first asked for, kept on disk by content, up to a number of bytes.

    DIRECTORY/KEY/         a LoRA adapter in Hugging Face PEFT's format, as `export_lora` writes it
    DIRECTORY/KEY.source/  links to what it was made from, for as long as a process that asked for it lives
    DIRECTORY/lock         held by whoever makes or removes something: one thread of one process at a time

Threads and processes share a directory. A directory in use is locked (flock), so it is not removed, and the lock of a process
ends with the process, however it ends.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

from peft_core import CheckpointError, MergeError, files, plugins
from peft_core.adapter_file import HEADER, read_header
from peft_core.checkpoint import TENSORS

from .lora import export_lora

_SOURCE, _BASE = ".source", "base"
_MAKING, _REMOVING = ".making", ".removing-"
# Nothing else in the directory is ever removed: it may be one that holds other things.
_NAME = re.compile(rf"[0-9a-f]{{64}}({_SOURCE})?")


class Cache:
    """Lowered adapters in one directory.

    Attributes:
        directory: made if need be. limit: bytes that the lowered adapters may take, without the one that is being made.
        fit: the runtime that they are made for. See `export_lora`.
    """

    def __init__(self, directory: str | Path, limit: int, fit: str) -> None:
        self.directory = Path(directory).absolute()
        self.limit = limit
        self.fit = fit
        self._sources: dict[str, int] = {}

    def lower(self, base: Path, adapter: Path) -> Path:
        """The lowered adapter's directory, made now if nobody made it before.

        It can be removed to make room for others: whoever reads it does so within `held`, in whichever process. While this
        process lives, `held` brings it back, even if `adapter` is replaced or removed.

        Raises:
            CheckpointError: an input cannot be read, they do not belong together, or the cache's directory cannot be
                written. PluginError: no such method here.
            MergeError: the method has no exact factors, the runtime cannot serve it, or it is larger than the whole cache.
        """
        key = self.key(base, adapter)
        entry = self.directory / key
        with self._alone():
            if not entry.is_dir():
                self._make(entry, base, adapter)
            os.utime(entry)
            self._keep_source(key, base, adapter)
        return entry

    @contextmanager
    def held(self, entry: Path) -> Iterator[None]:
        """Within the block a directory that `lower` gave is there and stays.

        Raises:
            CheckpointError: it was removed, and what it was made from is gone or has changed.
        """
        while (handle := _shared(entry)) is None:
            self._restore(entry)
        try:
            os.utime(entry)
            yield
        finally:
            os.close(handle)

    def key(self, base: Path, adapter: Path) -> str:
        """What the lowered files are a function of: both inputs, the runtime, and the versions that compute them.

        Of the base that is its configuration: exact factors need no weights.

        Raises:
            CheckpointError: an input cannot be read. PluginError: no such method here.
        """
        header = read_header(adapter)
        try:
            parts = (
                (adapter / HEADER).read_bytes(),
                files.checksum(adapter / TENSORS),
                (base / "config.json").read_bytes(),
                self.fit,
                version("peft-export"),
                plugins.method(header.method.name).version,
            )
        except OSError as error:
            raise CheckpointError(f"'{error.filename}' cannot be read: {error.strerror}") from None
        digest = hashlib.sha256()
        for part in parts:
            digest.update(hashlib.sha256(part if isinstance(part, bytes) else part.encode()).digest())
        return digest.hexdigest()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            file = (self.directory / "lock").open("w")
        except OSError as error:
            raise CheckpointError(
                f"the cache '{self.directory}' cannot be used: {error.strerror}; name a directory that can be written"
            ) from None
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _make(self, entry: Path, base: Path, adapter: Path) -> None:
        making = self.directory / _MAKING
        shutil.rmtree(making, ignore_errors=True)  # of a process that was killed
        try:
            report = export_lora(base, adapter, making, fit=self.fit)
            self._check_unchanged(entry.name, base, adapter)
            if report.problems:
                raise MergeError("; ".join(report.problems))
            size = _size(making)
            if size > self.limit:
                raise MergeError(
                    f"'{adapter}' takes {size:,} bytes when it is lowered, and the cache '{self.directory}' may hold "
                    f"{self.limit:,}: raise its limit"
                )
            self._make_room(size)
            making.rename(entry)
        finally:
            shutil.rmtree(making, ignore_errors=True)

    def _restore(self, entry: Path) -> None:
        source = entry.with_name(entry.name + _SOURCE)
        with self._alone():
            if entry.is_dir():
                return
            try:
                base = Path((source / _BASE).read_text(encoding="utf-8"))
            except OSError as error:
                raise CheckpointError(f"'{entry}' was removed, and what it was made from is gone: {error}") from None
            self._make(entry, base, source)

    def _check_unchanged(self, key: str, base: Path, adapter: Path) -> None:
        if self.key(base, adapter) != key:
            raise CheckpointError(f"'{adapter}' has changed since it was asked for; ask again")

    def _keep_source(self, key: str, base: Path, adapter: Path) -> None:
        """Link what the entry was made from, and lock the links for the rest of this process's life."""
        if key in self._sources:
            return
        source = self.directory / f"{key}{_SOURCE}"
        if not source.is_dir():
            with files.whole_directory(source, ()) as temporary:
                for name in (HEADER, TENSORS):
                    _link(adapter / name, temporary / name)
                (temporary / _BASE).write_text(str(base.absolute()), encoding="utf-8")
                self._check_unchanged(key, base, temporary)
        handle = _shared(source)
        assert handle is not None  # nobody removes it meanwhile: this process is alone
        self._sources[key] = handle

    def _make_room(self, size: int) -> None:
        """Remove what was not used for the longest time and nobody reads, and links that no living process needs."""
        for left in self.directory.glob(f"{_REMOVING}*"):
            shutil.rmtree(left, ignore_errors=True)  # by a process that was killed
        ours = [path for path in self.directory.iterdir() if _NAME.fullmatch(path.name)]
        for source in ours:
            if source.suffix:
                self._remove(source)
        entries = sorted((path for path in ours if not path.suffix), key=lambda entry: entry.stat().st_mtime_ns)
        sizes = {entry: _size(entry) for entry in entries}
        total = sum(sizes.values())
        for entry in entries:
            if total + size <= self.limit:
                return
            if self._remove(entry):
                total -= sizes[entry]

    def _remove(self, path: Path) -> bool:
        """Remove a directory unless it is in use; no half of it is ever seen."""
        handle = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        else:
            removing = path.with_name(_REMOVING + path.name)
            path.rename(removing)
            shutil.rmtree(removing, ignore_errors=True)
            return True
        finally:
            os.close(handle)


def _shared(directory: Path) -> int | None:
    """A lock, shared with others, that keeps a directory from being removed; None where there is none."""
    with suppress(FileNotFoundError):
        handle = os.open(directory, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_SH)
        with suppress(FileNotFoundError):
            # Whoever had it locked until now may have removed it.
            if os.path.samestat(os.fstat(handle), os.stat(directory)):
                return handle
        os.close(handle)
    return None


def _link(source: Path, destination: Path) -> None:
    """A hard link, which outlives the source's name; on another file system a symbolic one."""
    try:
        os.link(source, destination)
    except OSError:
        os.symlink(source.absolute(), destination)


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
