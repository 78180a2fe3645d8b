"""What other operating systems lack: the ways around it are taken here, too."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import peft_core as pc
from peft_core import files, system


@pytest.fixture(params=["side by side", "one after the other"])
def way(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading and writing at a place as POSIX does it, and as it is done without (on Windows)."""
    if request.param == "one after the other":
        for name in ("pread", "preadv", "pwrite", "pwritev"):
            monkeypatch.delattr(os, name, raising=False)


@pytest.mark.usefixtures("way")
def test_threads_read_and_write_at_their_places(tmp_path: Path) -> None:
    blocks = [bytes([number]) * 4096 for number in range(64)]
    handle = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT | system.BINARY)
    buffer = bytearray(4096)

    def written(number: int) -> int:
        return system.write_at(handle, memoryview(blocks[number]), number * 4096)

    def found(number: int) -> bytes:
        own = bytearray(4096)
        assert system.read_at(handle, memoryview(own), number * 4096) == 4096
        return bytes(own)

    try:
        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(written, range(64))) == {4096}
            assert list(pool.map(found, range(64))) == blocks
        assert system.read_at(handle, memoryview(buffer), 63 * 4096 + 4000) == 96, "the end of the file"
        assert system.read_at(handle, memoryview(buffer), 64 * 4096) == 0
    finally:
        os.close(handle)


@pytest.fixture
def no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "exchange", lambda one, other: False)


def filled(target: Path, text: str) -> None:
    with files.whole_directory(target, ("ours.txt",)) as directory:
        (directory / "ours.txt").write_text(text)


@pytest.mark.usefixtures("no_exchange")
def test_directories_take_each_other_s_place_by_renaming(tmp_path: Path) -> None:
    target = tmp_path / "target"
    for text in ("one", "two"):
        filled(target, text)
        (target / "mine.txt").write_text("kept")
    assert {path.name: path.read_text() for path in target.iterdir()} == {"ours.txt": "two", "mine.txt": "kept"}
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.usefixtures("no_exchange")
def test_a_directory_that_cannot_be_replaced_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., Any]
) -> None:
    target = tmp_path / "target"
    filled(target, "one")
    rename = os.rename

    def busy(old: Path, new: Path) -> None:
        if new == target and not old.name.endswith(".old.tmp"):
            raise PermissionError(13, "used by another process", str(new))
        rename(old, new)

    monkeypatch.setattr(os, "rename", busy)
    with refused(pc.CheckpointError, str(target), "used by another process", "unchanged"):
        filled(target, "two")
    assert (target / "ours.txt").read_text() == "one" and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("exchanges", [True, False])
def test_two_processes_make_the_same_directory(
    exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: Any
) -> None:
    if not exchanges:
        request.getfixturevalue("no_exchange")
    target = tmp_path / "target"
    rename = os.rename

    def late(old: Path, new: Path) -> None:
        monkeypatch.setattr(os, "rename", rename)
        filled(target, "the other's")
        rename(old, new)

    monkeypatch.setattr(os, "rename", late)
    filled(target, "ours")
    assert (target / "ours.txt").read_text() == "ours" and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "copies"])
def test_a_link_is_linked_as_a_link(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not links:

        def refuse(*_: Any, **__: Any) -> None:
            raise OSError("no links here")

        monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "file").write_text("text")
    (tmp_path / "name").symlink_to("file")
    system.link(tmp_path / "name", tmp_path / "second")
    system.link(tmp_path / "file", tmp_path / "copy")
    assert (tmp_path / "second").is_symlink() and (tmp_path / "second").read_text() == "text"
    assert not (tmp_path / "copy").is_symlink() and (tmp_path / "copy").read_text() == "text"


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_what_the_output_has_no_sign_for_is_a_question_mark(errors: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp1252", errors=errors))
    system.show_all_text()
    print("KL ≤ 1e-6 × 2", end="", flush=True)
    assert raw.getvalue().decode("cp1252") == "KL ? 1e-6 × 2"
