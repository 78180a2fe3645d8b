"""The cache of lowered adapters: by content, bounded, whole under threads, processes and their death; adapters by name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import peft_core as pc
import peft_export
from peft_core.testing.checks import Trial, randomise, trials
from peft_export import cache as cache_module
from peft_export import serving
from peft_export.cache import Cache

EXACT = next(trial for trial in trials([]) if trial.can.lowrank)


@pytest.fixture
def adapters(make: Callable[..., Any], tmp_path: Path) -> tuple[Path, list[Path]]:
    """A base, and three adapters of it with different values."""
    made = make(EXACT)
    found = [made.adapter]
    for seed in (1, 2):
        randomise(made.handle, seed).save(tmp_path / f"adapter{seed}")
        found.append(tmp_path / f"adapter{seed}")
    return made.base, found


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def entries(cache: Cache) -> set[Path]:
    return {path for path in cache.directory.iterdir() if len(path.name) == 64}


def size(entry: Path) -> int:
    return sum(path.stat().st_size for path in entry.rglob("*") if path.is_file())


def room_for(count: int, base: Path, adapter: Path, scratch: Path) -> int:
    """Bytes that this many lowered adapters take, and half of one more."""
    return int((count + 0.5) * size(Cache(scratch, 10**9, "vllm").lower(base, adapter)))


def test_an_entry_is_the_lowered_adapter(exact: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    made = make(exact)
    entry = Cache(tmp_path / "cache", 10**9, "vllm").lower(made.base, made.adapter)
    report = peft_export.export_lora(made.base, made.adapter, tmp_path / "out", fit="vllm")
    assert same(weights(entry), weights(tmp_path / "out"))
    assert json.loads((entry / "adapter_config.json").read_text())["r"] == report.rank


@pytest.mark.parametrize("missing", ["config.json", "adapter.safetensors"])
def test_an_input_that_is_not_there(missing: str, adapters: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, (adapter, *_) = adapters
    folder = shutil.copytree(base if missing == "config.json" else adapter, tmp_path / "copy")
    (folder / missing).unlink()
    inputs = (folder, adapter) if missing == "config.json" else (base, folder)
    with pytest.raises(pc.CheckpointError, match=f"{missing}' cannot be read: No such file"):
        Cache(tmp_path / "cache", 10**9, "vllm").lower(*inputs)


def test_a_cache_that_cannot_be_made(adapters: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, (adapter, *_) = adapters
    (tmp_path / "file").write_text("mine")
    with pytest.raises(pc.CheckpointError, match=r"the cache '.*file/cache' cannot be used: Not a directory; name a"):
        Cache(tmp_path / "file" / "cache", 10**9, "vllm").lower(base, adapter)
    assert (tmp_path / "file").read_text() == "mine"


def test_what_is_the_same_is_made_once(
    adapters: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, (first, second, _) = adapters
    runs = counted(monkeypatch)
    cache = Cache(tmp_path / "cache", 10**9, "vllm")
    entry = cache.lower(base, first)
    assert cache.lower(base, first) == Cache(tmp_path / "cache", 10**9, "vllm").lower(base, first) == entry
    shutil.copytree(first, tmp_path / "elsewhere" / "copy")
    assert cache.lower(base, tmp_path / "elsewhere" / "copy") == entry
    assert len(runs) == 1
    assert cache.lower(base, second) != entry
    other = tmp_path / "other-base"
    shutil.copytree(base, other)
    config = json.loads((base / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rope_theta": 1.0}))
    assert cache.lower(other, first) not in (entry, cache.lower(base, second))
    assert Cache(tmp_path / "cache", 10**9, "sglang").lower(base, first) != entry
    assert len(runs) == 4


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The adapters that are lowered from now on."""
    runs: list[Path] = []

    def counting(base: Path, adapter: Path, out: Path, **options: Any) -> Any:
        runs.append(adapter)
        return peft_export.export_lora(base, adapter, out, **options)

    monkeypatch.setattr(cache_module, "export_lora", counting)
    return runs


def test_what_was_not_used_longest_makes_room(adapters: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, (first, second, third) = adapters
    cache = Cache(tmp_path / "cache", room_for(2, base, first, tmp_path / "scratch"), "vllm")
    (cache.directory / "0123" / "precious").mkdir(parents=True)
    one, two = cache.lower(base, first), cache.lower(base, second)
    assert entries(cache) == {one, two}
    cache.lower(base, first)
    three = cache.lower(base, third)
    assert entries(cache) == {one, three}
    with cache.held(one):
        pass
    cache.lower(base, second)
    assert entries(cache) == {one, two}
    assert sum(map(size, entries(cache))) <= cache.limit
    assert (cache.directory / "0123" / "precious").is_dir()


def test_what_is_read_stays(adapters: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, (first, second, third) = adapters
    cache = Cache(tmp_path / "cache", room_for(1, base, first, tmp_path / "scratch"), "vllm")
    one = cache.lower(base, first)
    with cache.held(one):
        two = cache.lower(base, second)
        assert entries(cache) == {one, two}
    assert entries(cache) - {one, two} == set()
    three = cache.lower(base, third)
    assert entries(cache) == {three}


@pytest.mark.parametrize("change", ["nothing", "replaced", "removed"])
def test_what_was_removed_comes_back(adapters: tuple[Path, list[Path]], change: str, tmp_path: Path) -> None:
    """From the files as they were, whatever became of the adapter's directory."""
    base, (first, second, _) = adapters
    adapter = tmp_path / "served"
    shutil.copytree(first, adapter)
    cache = Cache(tmp_path / "cache", room_for(1, base, first, tmp_path / "scratch"), "vllm")
    one = cache.lower(base, adapter)
    before = weights(one)
    if change != "nothing":
        shutil.rmtree(adapter)
    if change == "replaced":
        shutil.copytree(second, adapter)
    cache.lower(base, second)
    assert not one.exists()
    with Cache(cache.directory, cache.limit, "vllm").held(one):
        assert same(weights(one), before)


def test_what_cannot_come_back(adapters: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, (first, _, _) = adapters
    adapter = tmp_path / "served"
    shutil.copytree(first, adapter)
    cache = Cache(tmp_path / "cache", 10**9, "vllm")
    entry = cache.lower(base, adapter)
    shutil.rmtree(entry)
    header = adapter / "adapter.json"
    header.write_text(header.read_text().replace('"seed": 0', '"seed": 1').replace('"seed":0', '"seed":1'))
    with pytest.raises(pc.CheckpointError, match="has changed since"), cache.held(entry):
        raise AssertionError("not reached")
    shutil.rmtree(cache.directory / f"{entry.name}.source")
    with pytest.raises(pc.CheckpointError, match="made from is gone"), cache.held(entry):
        raise AssertionError("not reached")


def test_replaced_while_it_is_lowered(
    adapters: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new values must not be kept under the old ones' key."""
    base, (first, second, _) = adapters
    adapter = tmp_path / "served"
    shutil.copytree(first, adapter)
    cache = Cache(tmp_path / "cache", 10**9, "vllm")

    def replacing(*arguments: Any, **options: Any) -> Any:
        shutil.rmtree(adapter)
        shutil.copytree(second, adapter)
        return peft_export.export_lora(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "export_lora", replacing)
        with pytest.raises(pc.CheckpointError, match="has changed since it was asked for"):
            cache.lower(base, adapter)
    assert entries(cache) == set()
    assert cache.lower(base, adapter) == cache.lower(base, second)


def test_larger_than_the_cache(adapters: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, (first, _, _) = adapters
    cache = Cache(tmp_path / "cache", 1000, "vllm")
    with pytest.raises(pc.MergeError, match="may hold 1,000: raise its limit"):
        cache.lower(base, first)
    assert [path.name for path in cache.directory.iterdir()] == ["lock"]


def test_what_the_runtime_cannot_serve(make: Callable[..., Any], tmp_path: Path) -> None:
    made = make(EXACT, train_modules=("lm_head",))
    cache = Cache(tmp_path / "cache", 10**9, "vllm")
    with pytest.raises(pc.MergeError, match="trained in full"):
        cache.lower(made.base, made.adapter)
    assert [path.name for path in cache.directory.iterdir()] == ["lock"]


def test_methods_without_factors(inexact: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    made = make(inexact)
    cache = Cache(tmp_path / "cache", 10**9, "vllm")
    with pytest.raises(pc.MergeError, match="factors"):
        cache.lower(made.base, made.adapter)
    assert [path.name for path in cache.directory.iterdir()] == ["lock"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "header"])
def test_a_damaged_adapter(adapters: tuple[Path, list[Path]], damage: str, tmp_path: Path) -> None:
    base, (first, _, _) = adapters
    adapter = tmp_path / "damaged"
    shutil.copytree(first, adapter)
    tensors = adapter / "adapter.safetensors"
    stored = tensors.read_bytes()
    if damage == "cut":
        tensors.write_bytes(stored[:-10])
    elif damage == "flipped":
        tensors.write_bytes(stored[:-1] + bytes([stored[-1] ^ 1]))
    elif damage == "missing":
        tensors.unlink()
    else:
        (adapter / "adapter.json").write_text("{")
    cache = Cache(tmp_path / "cache", 10**9, "vllm")
    entry = cache.lower(base, first)
    with pytest.raises((pc.CheckpointError, OSError)) as error:
        cache.lower(base, adapter)
    assert "\n" not in str(error.value)
    assert entries(cache) == {entry}


def test_threads_ask_at_once(
    adapters: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, found = adapters
    runs = counted(monkeypatch)
    cache = Cache(tmp_path / "cache", 10**9, "vllm")
    start, answers = threading.Barrier(9), []

    def ask(adapter: Path) -> None:
        start.wait()
        answers.append((adapter, cache.lower(base, adapter)))

    threads = [threading.Thread(target=ask, args=(adapter,)) for adapter in found * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 9 and len(set(answers)) == 3
    assert sorted(runs) == sorted(found)


# Asks for two adapters in turn, in a cache with room for one, and reads each: a half-written or removed one would show.
READER = """
import sys
from pathlib import Path
from safetensors.torch import load_file
from peft_export.cache import Cache
directory, limit, base, *adapters = sys.argv[1:]
cache = Cache(directory, int(limit), "vllm")
for turn in range(6):
    for adapter in adapters:
        entry = cache.lower(Path(base), Path(adapter))
        with cache.held(entry):
            sums = [float(tensor.sum()) for tensor in load_file(entry / "adapter_model.safetensors").values()]
            print(adapter, entry.name, sums, flush=True)
"""


def test_processes_ask_at_once(adapters: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, (first, second, _) = adapters
    limit = room_for(1, base, first, tmp_path / "scratch")
    command = [sys.executable, "-c", READER, tmp_path / "cache", str(limit), base]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([*command, *order], stdout=subprocess.PIPE, text=True, env=environment)
        for order in ((first, second), (second, first), (first, second))
    ]
    lines = [line for process in processes for line in process.communicate(timeout=300)[0].splitlines()]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(lines) == 36 and len(set(lines)) == 2


HOLDER = """
import sys, time
from pathlib import Path
from peft_export.cache import Cache
directory, limit, base, adapter = sys.argv[1:]
cache = Cache(directory, int(limit), "vllm")
with cache.held(cache.lower(Path(base), Path(adapter))):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_killed_process_holds_nothing(adapters: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, (first, second, third) = adapters
    cache = Cache(tmp_path / "cache", room_for(1, base, first, tmp_path / "scratch"), "vllm")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, cache.directory, str(cache.limit), base, first],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    held = cache.directory / cache.key(base, first)
    two = cache.lower(base, second)
    assert entries(cache) == {held, two}
    holder.kill()
    holder.communicate()
    (cache.directory / ".making").mkdir()  # what a process that is killed while it lowers leaves
    three = cache.lower(base, third)
    assert entries(cache) == {three}
    left = {path.name for path in cache.directory.iterdir()}
    assert left == {"lock", three.name, f"{three.name}.source", f"{two.name}.source"}


def test_names(tmp_path: Path) -> None:
    adapters = tmp_path / "adapters"
    for name in ("plain", "team/one", ".hidden"):
        (adapters / name).mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    (adapters / "file").write_text("")
    (adapters / "latest").symlink_to(adapters / "plain")
    (adapters / "away").symlink_to(tmp_path / "secret")
    for name in ("plain", "team/one", "latest"):
        assert serving.find_adapter(adapters, name) == adapters / name
    for name in ("absent", "file", "plain/absent", "gpt-4", "x" * 300):
        assert serving.find_adapter(adapters, name) is None
    outside = [
        "../secret",
        "team/../../secret",
        "plain/..",
        "..",
        ".",
        "./plain",
        "",
        str(tmp_path / "secret"),
        "/",
        "team//one",
    ]
    for name in [*outside, "plain/", ".hidden", "team/.hidden", "plain\n", "pl\0ain"]:
        with pytest.raises(pc.CheckpointError, match="is not an adapter's name") as error:
            serving.find_adapter(adapters, name)
        assert "\n" not in str(error.value)
    with pytest.raises(pc.CheckpointError, match="leads out of"):
        serving.find_adapter(adapters, "away")


def test_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (serving.ADAPTERS, serving.CACHE, serving.LIMIT):
        monkeypatch.delenv(name, raising=False)
    assert serving.settings() is None
    monkeypatch.setenv(serving.ADAPTERS, str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert serving.settings() == serving.Settings(tmp_path, tmp_path / "home/peft-core/lowered", 20 * 10**9)
    monkeypatch.setenv(serving.CACHE, str(tmp_path / "own"))
    monkeypatch.setenv(serving.LIMIT, "500MB")
    assert serving.settings() == serving.Settings(tmp_path, tmp_path / "own", 500 * 10**6)
    monkeypatch.setenv(serving.LIMIT, "many")
    with pytest.raises(pc.SpecError, match=r"PEFT_CORE_ADAPTER_CACHE_BYTES: 'many' is not a size"):
        serving.settings()
    monkeypatch.setenv(serving.ADAPTERS, str(tmp_path / "absent"))
    with pytest.raises(pc.SpecError, match=r"PEFT_CORE_ADAPTERS: '.*absent' is not a directory"):
        serving.settings()


def test_where_the_base_lies(
    adapters: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _ = adapters
    assert serving.base_directory(str(base)) == base
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    downloaded = tmp_path / "hub/models--owner--name"
    shutil.copytree(base, downloaded / "snapshots/0123")
    (downloaded / "refs").mkdir()
    (downloaded / "refs/main").write_text("0123")
    assert serving.base_directory("owner/name") == downloaded / "snapshots/0123"
    for model in (str(tmp_path), "nobody/nothing-of-this-name", "a/b/c"):
        with pytest.raises(pc.CheckpointError, match="not a checkpoint directory and not in the hub's cache"):
            serving.base_directory(model)
