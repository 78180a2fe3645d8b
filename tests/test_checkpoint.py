"""Saving is whole or not at all; loading refuses what is damaged, foreign or not finite, and names it."""

import hashlib
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peft_core as pc
from peft_core import AdapterSpec, files, plugins
from peft_core.testing.checks import Snapshot, randomise, run, same_bits
from peft_core.testing.families import FAMILIES
from peft_core.testing.methods import Sound

ODD = FAMILIES["odd"]


@pytest.fixture
def adapter(blocks, spec) -> pc.Adapter:
    return randomise(pc.attach(blocks, spec, seed=11))


@pytest.fixture
def weightless() -> nn.Module:
    """The model's shapes, on the meta device."""
    return ODD.build().to("meta")


@pytest.fixture
def saved(adapter, tmp_path) -> Path:
    adapter.save(tmp_path / "adapter")
    return tmp_path / "adapter"


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    # Copies: load_file gives views of the file, which end the process with SIGBUS once it is cut short.
    return {key: tensor.clone() for key, tensor in load_file(directory / "adapter.safetensors").items()}


def header_of(directory: Path) -> dict:
    return json.loads((directory / "adapter.json").read_text())


def write_header(directory: Path, header: dict) -> None:
    (directory / "adapter.json").write_text(json.dumps(header))


def rewrite(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Put other tensors in place, with a header that knows their checksum."""
    save_file(tensors, directory / "adapter.safetensors")
    header = header_of(directory)
    content = (directory / "adapter.safetensors").read_bytes()
    header["checksums"]["adapter.safetensors"] = hashlib.sha256(content).hexdigest()
    write_header(directory, header)


def cut(name: str, keep: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_bytes(keep((directory / name).read_bytes())) and None


def with_tensor(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        tensors = tensors_of(directory)
        change(tensors)
        rewrite(directory, tensors)

    return damage


def with_header(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        header = header_of(directory)
        change(header)
        write_header(directory, header)

    return damage


def exchange_members(header: dict) -> None:
    one, two = (next(g for g in header["groups"] if g["name"] == name) for name in ("0.up", "1.up"))
    one["members"], two["members"] = two["members"], one["members"]


def flip(content: bytes) -> bytes:
    return content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]


def pickled(directory: Path) -> None:
    torch.save(tensors_of(directory), directory / "adapter.safetensors")


def plainly_pickled(directory: Path) -> None:
    (directory / "adapter.safetensors").write_bytes(pickle.dumps({"a": 1}))


DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "tensors cut short": (cut("adapter.safetensors", lambda b: b[:-100]), ["adapter.safetensors"]),
    "tensors cut within their header": (
        cut("adapter.safetensors", lambda b: b[:20]),
        ["adapter.safetensors"],
    ),
    "one bit flipped": (cut("adapter.safetensors", flip), ["adapter.safetensors", "damaged"]),
    "tensors emptied": (cut("adapter.safetensors", lambda b: b""), ["adapter.safetensors", "empty"]),
    "tensors missing": (lambda d: (d / "adapter.safetensors").unlink(), ["adapter.safetensors", "missing"]),
    "tensors of something else": (
        cut("adapter.safetensors", lambda b: b"hello " * 100),
        ["adapter.safetensors"],
    ),
    "a zip pickle": (pickled, ["adapter.safetensors", "pickle", "safetensors"]),
    "a plain pickle": (plainly_pickled, ["adapter.safetensors", "pickle", "safetensors"]),
    "header cut short": (cut("adapter.json", lambda b: b[:-100]), ["adapter.json"]),
    "header emptied": (cut("adapter.json", lambda b: b""), ["adapter.json"]),
    "header missing": (lambda d: (d / "adapter.json").unlink(), ["adapter.json"]),
    "header not UTF-8": (cut("adapter.json", lambda b: b"\xff" + b), ["adapter.json"]),
    "header a list": (lambda d: (d / "adapter.json").write_text("[]"), ["adapter.json"]),
    "header without base": (with_header(lambda h: h.pop("base")), ["adapter.json", "base"]),
    "header with more": (with_header(lambda h: h.update(more=1)), ["adapter.json", "more"]),
    "header with a wrong type": (with_header(lambda h: h.update(seed="x")), ["adapter.json", "seed"]),
    "members exchanged": (with_header(exchange_members), ["'0.up'", "members", "adapter.json"]),
    "a layer left out": (with_header(lambda h: h["sites"].pop()), ["'1.down'", "absent there"]),
    "another option": (
        with_header(lambda h: h["sites"][1]["options"].update(alpha=3.0)),
        ["'0.down'", "alpha 3.0 there"],
    ),
    "a weight that is not owned": (with_header(lambda h: h["owned"].append("0.up")), ["'0.up'", "absent here"]),
    "a newer format": (with_header(lambda h: h.update(format_version=99)), ["99", "upgrade peft-core"]),
    "format without a number": (with_header(lambda h: h.update(format_version=None)), ["format"]),
    "format that never was": (with_header(lambda h: h.update(format_version=0)), ["format_version is 0"]),
    "format as text": (with_header(lambda h: h.update(format_version="1")), ["format_version is '1'"]),
    "no checksum": (
        with_header(lambda h: h.update(checksums={})),
        ["adapter.json", "no checksum of adapter.safetensors"],
    ),
    "a dtype that is none": (
        with_header(lambda h: h["sites"][0].update(dtype="float33")),
        ["'float33' is not a dtype"],
    ),
    "a tensor missing": (with_tensor(lambda t: t.pop("0.down.B")), ["'0.down.B'", "missing"]),
    "a tensor too many": (with_tensor(lambda t: t.update(more=torch.ones(1))), ["'more'", "not expected"]),
    "a tensor of another shape": (
        with_tensor(lambda t: t.update({"0.down.B": torch.ones(4, 63)})),
        ["'0.down.B'", "[4, 63]", "[63, 4]"],
    ),
    "a tensor of another dtype": (
        with_tensor(lambda t: t.update({"0.down.B": t["0.down.B"].half()})),
        ["'0.down.B'", "float16", "float32"],
    ),
    "an emptied tensor": (with_tensor(lambda t: t.update({"0.down.B": torch.ones(0, 4)})), ["'0.down.B'"]),
    "NaN": (with_tensor(lambda t: t["1.up.B"].view(-1)[7].fill_(float("nan"))), ["'1.up.B'", "NaN"]),
    "infinity": (
        with_tensor(lambda t: t["1.up.B"].view(-1)[7].fill_(float("-inf"))),
        ["'1.up.B'", "infinite"],
    ),
    "a binding missing": (
        with_tensor(lambda t: t.pop("binding/0.up.rows")),
        ["binding/0.up.rows", "missing"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_directory_is_refused_and_the_model_left_alone(saved, damage, refused) -> None:
    harm, words = DAMAGE[damage]
    harm(saved)
    fresh = ODD.build()
    before = Snapshot.of(fresh)
    with refused(pc.CheckpointError, *words):
        pc.load(fresh, saved)
    before.assert_restored(fresh)
    assert pc.adapters(fresh) == {}


def test_pickle_is_never_run(saved, tmp_path) -> None:
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (saved / "adapter.safetensors").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(pc.CheckpointError, match="pickle"):
        pc.load(ODD.build(), saved)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("start", [b"\x80", b"PK"], ids=["0x80", "PK"])
def test_safetensors_file_that_starts_like_a_pickle_is_read(tmp_path, start) -> None:
    """A safetensors file starts with the length of its header, which may be any multiple of 8."""
    path = tmp_path / "file.safetensors"
    for length in range(8, 40_000, 8):
        if not length.to_bytes(8, "little").startswith(start):
            continue
        for name in (f"{'x' * (length - 60 + extra)}" for extra in range(-24, 24)):
            save_file({name: torch.ones(2)}, path)
            if path.read_bytes().startswith(start):
                assert torch.equal(files.read_tensors(path)[name], torch.ones(2))
                return
    raise AssertionError("no such file could be made")


@pytest.mark.parametrize(
    "make",
    [lambda p: None, lambda p: p.mkdir(), lambda p: p.write_text("x")],
    ids=["missing", "empty", "file"],
)
def test_directory_that_is_no_adapter(tmp_path, make, refused) -> None:
    make(tmp_path / "place")
    with refused(pc.CheckpointError, "place"):
        pc.load(ODD.build(), tmp_path / "place")


def test_adapter_of_the_other_library_is_recognised(tmp_path, refused) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with refused(pc.CheckpointError, "Hugging Face PEFT"):
        pc.load(ODD.build(), tmp_path)


def test_another_model_is_refused_by_the_first_key_that_differs(saved, refused) -> None:
    wider = ODD.build()
    wider[1].up = nn.Linear(63, 64)
    wider[1].down = nn.Linear(64, 63, bias=False)
    with refused(pc.CheckpointError, "another base model", "'1.up'", "[64, 63]", "[60, 63]"):
        pc.load(wider, saved)
    shorter = nn.Sequential(ODD.build()[0])
    with refused(pc.CheckpointError, "another base model", "no '1.up'"):
        pc.load(shorter, saved)
    longer = ODD.build().append(nn.Linear(63, 5))
    with refused(pc.CheckpointError, "another base model", "'2'"):
        pc.load(longer, saved)
    with refused(pc.CheckpointError, "another base model"):
        pc.load(FAMILIES["llama"].build(), saved)


def test_another_path_of_the_same_model_is_no_error(tmp_path) -> None:
    model = ODD.build()
    pc.attach(model, AdapterSpec(method="sound", base_model="/somewhere/else")).save(tmp_path / "adapter")
    assert pc.load(ODD.build(), tmp_path / "adapter").plan.spec.base_model == "/somewhere/else"


def test_loading_beside_another_adapter(saved, adapter, blocks) -> None:
    output = run(ODD, blocks)
    pc.load(blocks, saved, name="again")
    assert same_bits(run(ODD, blocks), output)
    assert list(pc.adapters(blocks)) == ["default", "again"]


def test_name_that_is_taken_is_refused_before_anything_happens(saved, adapter, blocks, spec, refused) -> None:
    for put in (lambda: pc.load(blocks, saved), lambda: pc.attach(blocks, spec)):
        before = Snapshot.of(blocks)
        with refused(pc.AdapterError, "'default'", "attached already"):
            put()
        before.assert_restored(blocks)


@pytest.mark.parametrize("name", ["", "a/b", "a.b", "ä b", "../up"])
def test_name_that_cannot_be_is_refused(saved, blocks, name, refused) -> None:
    with refused(pc.AdapterError, "name"):
        pc.load(ODD.build(), saved, name=name)


def test_method_that_is_not_installed(tmp_path, refused) -> None:
    class Gone(Sound):
        name = "gone"

    plugins.register(Gone(), "gone")
    try:
        pc.attach(ODD.build(), AdapterSpec(method="gone")).save(tmp_path / "adapter")
    finally:
        plugins.unregister("gone")
    with refused(pc.PluginError, "'gone'", "pip install peft-method-gone"):
        pc.load(ODD.build(), tmp_path / "adapter")


def test_another_layout_of_the_method_is_refused(tmp_path, refused) -> None:
    class Other(Sound):
        name = "changing"

        @pc.hookimpl
        def peft_init(self, sites):
            layout = super().peft_init(sites)
            renamed = [pc.SharingGroup(f"new.{g.name}", g.members, g.tensors) for g in layout.groups]
            return pc.Layout(tuple(renamed), layout.bindings)

    class Before(Sound):
        name = "changing"

    plugins.register(Before(), "changing")
    try:
        pc.attach(ODD.build(), AdapterSpec(method="changing")).save(tmp_path / "adapter")
    finally:
        plugins.unregister("changing")
    plugins.register(Other(), "changing")
    try:
        with refused(pc.CheckpointError, "has another layout"):
            pc.load(ODD.build(), tmp_path / "adapter")
    finally:
        plugins.unregister("changing")


def test_other_files_stay(saved, adapter) -> None:
    (saved / "notes.txt").write_text("mine")
    (saved / "logs").mkdir()
    (saved / "logs" / "one").write_text("1")
    adapter.save(saved)
    assert (saved / "notes.txt").read_text() == "mine"
    assert (saved / "logs" / "one").read_text() == "1"


def test_somebody_elses_readme_stays(adapter, tmp_path) -> None:
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / "README.md").write_text("mine")
    adapter.save(tmp_path / "place")
    assert (tmp_path / "place" / "README.md").read_text() == "mine"


def test_a_file_in_the_way(adapter, tmp_path, refused) -> None:
    (tmp_path / "place").write_text("mine")
    with refused(pc.CheckpointError, "place", "is a file"):
        adapter.save(tmp_path / "place")
    assert (tmp_path / "place").read_text() == "mine"


def in_child(work: Callable[[], None]) -> tuple[int, str]:
    """Run in a real process of its own: (exit status, or minus the signal that ended it; its report)."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reading)
            try:
                work()
                status = 0
            except BaseException as error:
                report = str(error) if isinstance(error, pc.PeftCoreError) else traceback.format_exc()
                os.write(writing, f"{type(error).__name__}: {report}".encode()[:60_000])
        finally:
            os._exit(status)
    os.close(writing)
    with open(reading, "rb") as pipe:
        report = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), report


def test_kill_in_the_middle_of_saving_leaves_a_whole_adapter(saved, adapter, tmp_path) -> None:
    """Killed at the first thing that saving does to the file system, then at the second, and so on."""
    model = ODD.build()
    old = pc.load(model, saved)
    versions = [[p.detach().clone() for p in old.parameters()]]
    randomise(adapter, seed=99)
    versions.append([p.detach().clone() for p in adapter.parameters()])
    old.detach()
    watched = ("open", "os.", "shutil.", "ctypes.", "tempfile.")

    def killed_at(number: int) -> Callable[[], None]:
        def work() -> None:
            left = number

            def count(event: str, arguments: object) -> None:
                nonlocal left
                if event.startswith(watched):
                    left -= 1
                    if left == 0:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(count)
            adapter.save(saved)

        return work

    seen = set()
    for number in range(1, 500):
        status, report = in_child(killed_at(number))
        loaded = pc.load(model, saved)
        found = [p.detach().clone() for p in loaded.parameters()]
        loaded.detach()
        match = [v for v, values in enumerate(versions) if all(map(same_bits, values, found))]
        assert match, f"killed at event {number}: neither the old adapter nor the new one is there"
        seen.update(match)
        if status == 0:
            break
        assert status == -signal.SIGKILL, report
    assert number > 10 and seen == {0, 1}
    adapter.save(saved)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"], (
        "what the killed processes left was not cleared away"
    )


def test_files_are_for_whom_the_umask_says(adapter, tmp_path) -> None:
    def work() -> None:
        os.umask(0o027)
        adapter.save(tmp_path / "adapter")
        assert {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "adapter").iterdir()} == {"0o640"}
        assert oct((tmp_path / "adapter").stat().st_mode & 0o777) == "0o750"

    assert in_child(work) == (0, "")


def test_a_file_that_cannot_be_written_leaves_the_previous_adapter(saved, blocks, adapter, tmp_path, clear) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    randomise(adapter, seed=99)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        adapter.save(saved)

    status, report = in_child(work)
    assert status == 1 and report.startswith("CheckpointError: "), report
    clear(report, str(saved), "larger than the system allows", "unchanged")
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_text_that_cannot_be_written_leaves_nothing(tmp_path) -> None:
    (tmp_path / "run.yaml").write_text("before")

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        files.write_text(tmp_path / "run.yaml", "x" * 10_000)

    status, report = in_child(work)
    assert status == 1 and report.startswith("OSError"), report
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]
    assert (tmp_path / "run.yaml").read_text() == "before"


def test_a_short_write_of_numpy_is_a_full_disk(tmp_path, refused) -> None:
    """Its error says how many numbers it wrote (of ONNX weights, say), and not why."""
    with (
        refused(pc.CheckpointError, "out'", "the disk is full", "unchanged"),
        files.whole_directory(tmp_path / "out", ()),
    ):
        np.zeros(1 << 16).tofile("/dev/full")
    assert not list(tmp_path.iterdir())


def test_loaded_adapter_does_not_hang_on_its_file(saved) -> None:
    model = ODD.build()
    pc.load(model, saved, trainable=True)
    output = run(ODD, model)

    def work() -> None:
        (saved / "adapter.safetensors").write_bytes(b"")
        assert same_bits(run(ODD, model), output)

    assert in_child(work) == (0, "")


def test_an_adapter_without_its_training_state_is_told_from_a_damaged_one(blocks, stepper, tmp_path, refused) -> None:
    pc.attach(blocks, AdapterSpec(method="stepper")).save(tmp_path / "trained")
    before = {path.name: path.read_bytes() for path in (tmp_path / "trained").iterdir()}
    used = pc.load(ODD.build(), tmp_path / "trained")
    used.save(tmp_path / "used")
    with refused(pc.CheckpointError, "no training state", "loaded for inference"):
        pc.load(ODD.build(), tmp_path / "used", trainable=True)
    with refused(pc.CheckpointError, str(tmp_path / "trained"), "another directory", "trainable=True"):
        used.save(tmp_path / "trained")
    assert {path.name: path.read_bytes() for path in (tmp_path / "trained").iterdir()} == before
    (tmp_path / "trained" / "state.safetensors").unlink()
    with refused(pc.CheckpointError, "state.safetensors"):
        pc.load(ODD.build(), tmp_path / "trained", trainable=True)


def test_card_names_what_there_is(saved) -> None:
    text = (saved / "README.md").read_text()
    assert text.startswith("---\n")
    for word in ("library_name: peft-core", "sound", "up (2)", "down (2)", "pc.load"):
        assert word in text


def test_saved_spec_loads_with_complete_options(saved) -> None:
    assert AdapterSpec.model_validate(header_of(saved)["spec"]) == AdapterSpec(method="sound")


def test_a_link_to_a_directory_stays_a_link(saved, adapter, tmp_path) -> None:
    (saved / "notes.txt").write_text("mine")
    link = tmp_path / "latest"
    link.symlink_to(saved, target_is_directory=True)
    adapter.save(link)
    assert link.is_symlink() and link.resolve() == saved.resolve()
    assert {"adapter.json", "adapter.safetensors", "notes.txt"} <= {entry.name for entry in saved.iterdir()}
    assert not [entry for entry in (*tmp_path.iterdir(), *saved.parent.iterdir()) if entry.name.endswith(".tmp")]


def test_a_mount_point_is_filled_where_it_is(saved, adapter, blocks, tmp_path, monkeypatch) -> None:
    """It can be neither renamed nor replaced, and what is above it may not be writable."""
    volume = tmp_path / "volume"
    volume.mkdir()
    (volume / "notes.txt").write_text("mine")
    order, replace = [], os.replace
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == volume)
    monkeypatch.setattr(files, "_put_in_place", None)
    monkeypatch.setattr(os, "replace", lambda old, new: (order.append(Path(new).name), replace(old, new)))
    for _ in range(2):
        adapter.save(volume)
        assert order[-1] == "adapter.json", "a save that is killed must not look whole"
    assert {entry.name for entry in volume.iterdir()} == {entry.name for entry in saved.iterdir()} | {"notes.txt"}
    pc.load(blocks, volume, name="again")


@pytest.mark.parametrize("name", ["adapter", "adapter[1]"])
def test_what_a_killed_save_had_put_aside_is_brought_back(saved, adapter, name) -> None:
    """Where two directories cannot be exchanged in one step, a process may die between two renames."""
    saved = saved.rename(saved.with_name(name))
    (saved / "notes.txt").write_text("mine")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    writer = files._writer().replace(str(os.getpid()), str(gone.pid))
    saved.rename(saved.parent / f".{saved.name}.{writer}-x.old.tmp")
    (saved.parent / f".{saved.name}.{writer}-x.tmp").mkdir()
    other = saved.parent / f".{saved.name}.elsewhere.{gone.pid}-x.tmp"  # of another machine that writes to this disk
    other.mkdir()
    adapter.save(saved)
    assert (saved / "notes.txt").read_text() == "mine"
    assert [entry for entry in saved.parent.iterdir() if entry.name.endswith(".tmp")] == [other]


def test_a_base_without_weights_takes_the_saved_values(blocks, adapter, saved, weightless, tmp_path) -> None:
    weights = {name: tensor for name, tensor in blocks.state_dict().items() if "peft_core" not in name}
    pc.load(weightless, saved).save(tmp_path / "again")
    first, again = (directory / "adapter.safetensors" for directory in (saved, tmp_path / "again"))
    assert again.read_bytes() == first.read_bytes()
    weightless.load_state_dict(weights, assign=True, strict=False)
    assert same_bits(run(ODD, weightless), run(ODD, blocks))


def test_what_has_diverged_does_not_replace_what_was_saved(adapter, saved, refused) -> None:
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    with torch.no_grad():
        next(adapter.parameters())[0, 0] = torch.nan
    with refused(pc.CheckpointError, "'default'", "NaN", "diverged", "nothing was written"):
        adapter.save(saved)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before


def test_a_layer_that_was_replaced_costs_no_training(tmp_path) -> None:
    """What is saved fits the base as it was; the replaced layer had no part in what came after."""
    model = FAMILIES["llama"].build()
    adapter = randomise(pc.attach(model, AdapterSpec(method="sound", targets=["q_proj", "lm_head"])))
    model.resize_token_embeddings(model.config.vocab_size + 8)
    with pytest.warns(UserWarning, match=r"'lm_head' was replaced .* saved for the base as that was then"):
        adapter.save(tmp_path / "adapter")
    again = pc.load(FAMILIES["llama"].build(), tmp_path / "adapter")
    values = zip(again.parameters(), adapter.parameters(), strict=True)
    assert all(same_bits(loaded.detach(), own.detach()) for loaded, own in values)


def test_an_adapter_without_values_is_not_saved_and_takes_none(weightless, spec, saved, tmp_path, refused) -> None:
    adapter = pc.attach(weightless, spec)
    for move in (lambda: adapter.save(tmp_path / "new"), lambda: adapter.restore(saved)):
        with refused(pc.CheckpointError, "on the meta device", "attach to a model that has its weights"):
            move()
    assert not (tmp_path / "new").exists()
