"""`peft-core train --resume`: a run that was stopped gives what it would have given."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

import peft_core as pc
from peft_core import reporting
from peft_core.trainer import AdapterTrainer
from peft_core.training.config import RunConfig, RunError
from peft_core.training.directory import writing
from tests.train.runs import LABELLED, PAIRS, TEXTS, run_file, started, write

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.mark.parametrize("method, options", [("sound", {}), ("stepper", {"owns": True})], ids=["sound", "stepper"])
def test_an_interrupted_run_is_resumed(
    method: str,
    options: dict[str, Any],
    stepper: Any,
    llama_directory: Path,
    program: Callable[..., Any],
    tmp_path: Path,
    interrupted: Any,
) -> None:
    def made(folder: Path) -> Path:
        write(folder / "data.jsonl", PAIRS)
        adapter = {"method": method, "options": options, **({"dropout": 0.1} if method == "sound" else {})}
        each = {"steps": 9, "save_every": 2, "evaluate_every": 3}
        return run_file(folder, llama_directory, adapter=adapter, training=each)

    whole = started(made(tmp_path / "whole"))
    broken = made(tmp_path / "broken")
    with interrupted(AdapterTrainer, 6):
        ran = program("train", broken)
    assert ran.status == 130
    assert ran.err == "peft-core: interrupted; what was saved is kept: continue with --resume\n"
    ran = program("train", broken)
    assert ran.status == 2 and "holds a run already" in ran.err
    torch.manual_seed(77)
    rest = started(broken, resume=True)
    assert rest.losses == whole.losses and rest.evaluations == whole.evaluations and rest.result == whole.result
    for name in ("adapter.safetensors", *(["state.safetensors"] if method == "stepper" else [])):
        files = [(tmp_path / run / "out" / name).read_bytes() for run in ("whole", "broken")]
        assert files[0] == files[1], f"{name} differs"


def test_an_epochs_evaluation_is_in_its_last_checkpoint(llama_directory: Path, tmp_path: Path) -> None:
    write(tmp_path / "data.jsonl", PAIRS[:10])
    each = {"steps": None, "epochs": 3, "batch_size": 2, "accumulate": 2, "save_every": 3, "keep": 3}
    data = {"train": "data.jsonl", "hold_out": 0.2}
    path = run_file(tmp_path, llama_directory, data, training=each)
    whole = started(path)
    assert [entry["step"] for entry in whole.evaluations] == [0, 2, 4, 6]
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "checkpoint-6")
    assert started(path, resume=True).evaluations == whole.evaluations
    each["save_every"] = 2  # a checkpoint at every epoch's end
    path = run_file(tmp_path, llama_directory, data, training=each, output_dir="ends")
    assert started(path).evaluations == whole.evaluations
    for last in (6, 4):
        shutil.rmtree(tmp_path / "ends" / "checkpoints" / f"checkpoint-{last}")
        assert started(path, resume=True).evaluations == whole.evaluations


def test_resuming_what_was_killed_while_it_saved(llama_directory: Path, tmp_path: Path) -> None:
    write(tmp_path / "data.jsonl", PAIRS)
    path = run_file(tmp_path, llama_directory, training={"steps": 4, "save_every": 2})
    whole = started(path)
    checkpoints = tmp_path / "out" / "checkpoints"
    (checkpoints / "checkpoint-4" / "trainer_state.json").write_text('{"global_step": 4')
    (checkpoints / "checkpoint-4" / "optimizer.pt").unlink()
    again = started(path, resume=True)
    assert again.losses == whole.losses


def test_a_run_is_resumed_from_another_directory(
    llama_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "project" / "data.jsonl", PAIRS)
    run_file(tmp_path / "project", llama_directory, training={"save_every": 1})
    monkeypatch.chdir(tmp_path)
    whole = started(Path("project/RUN.yaml"))
    assert RunConfig.from_file("project/out/run.yaml") == RunConfig.from_file("project/RUN.yaml")
    monkeypatch.chdir(tmp_path / "project")
    assert started(Path("RUN.yaml"), resume=True).losses == whole.losses


@pytest.mark.parametrize("best", [False, True])
@pytest.mark.parametrize("lost", [0, 1])
def test_a_run_whose_directory_was_moved(best: bool, lost: int, llama_directory: Path, tmp_path: Path) -> None:
    """Resumed by the configuration that it left, from where it is now. The trainer's state names the best checkpoint's place."""
    data = write(tmp_path / "data.jsonl", PAIRS)
    each = {"steps": 6, "save_every": 1, "evaluate_every": 1, "best": best, "keep": 2, "lr": 0.5}
    whole = started(run_file(tmp_path / "whole", llama_directory, str(data), training=each))
    expected = (tmp_path / "whole" / "out" / "adapter.safetensors").read_bytes()
    there = tmp_path / "elsewhere"
    (tmp_path / "whole" / "out").rename(there)
    (there / "adapter.safetensors").unlink()
    for last in range(6, 6 - lost, -1):
        shutil.rmtree(there / "checkpoints" / f"checkpoint-{last}")
    again = started(there / "run.yaml", resume=True)
    assert (again.losses, again.result) == (whole.losses, whole.result)
    assert (there / "adapter.safetensors").read_bytes() == expected and not (tmp_path / "whole" / "out").exists()


@pytest.mark.parametrize("changed", [{}, {"best": True}, {"save_every": 1}], ids=str)
def test_a_finished_run_is_not_trained_further(changed: dict[str, Any], llama_directory: Path, tmp_path: Path) -> None:
    """It may have been killed between its last checkpoint and saving."""
    write(tmp_path / "data.jsonl", PAIRS)
    path = run_file(tmp_path, llama_directory, training=changed)
    whole, saved = started(path), tmp_path / "out" / "adapter.safetensors"
    expected = saved.read_bytes()
    saved.unlink()
    again = started(path, resume=True)
    assert (again.losses, again.evaluations, again.result) == (whole.losses, whole.evaluations, whole.result)
    assert (again.steps, again.optimizer) == (3, whole.optimizer) and saved.read_bytes() == expected


def test_a_folder_of_the_users_own_among_the_checkpoints(llama_directory: Path, tmp_path: Path) -> None:
    write(tmp_path / "data.jsonl", PAIRS)
    path = run_file(tmp_path, llama_directory)
    whole = started(path)
    (tmp_path / "out" / "checkpoints" / "checkpoint-old").mkdir()
    assert started(path, resume=True).losses == whole.losses


def _process(rank: int, port: int, path: Path, resume: bool) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    from peft_core.testing.methods import register_sound

    register_sound()
    started(path, resume)
    torch.distributed.destroy_process_group()


def test_several_processes_resume_within_a_later_epoch(llama_directory: Path, tmp_path: Path, refused: Any) -> None:
    training = {"steps": 10, "batch_size": 2, "save_every": 5, "keep": 9}  # of four steps an epoch
    config = {"model": {"path": str(llama_directory), "device": "cpu"}, "data": {"train": "data.jsonl", "hold_out": 0}}
    write(tmp_path / "data.jsonl", TEXTS[:16])
    path = run_file(tmp_path, llama_directory, training=training, **config)

    def losses(resume: bool) -> Any:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        mp.spawn(_process, (port, path, resume), nprocs=2)
        return json.loads((tmp_path / "out" / "metrics.json").read_text())["losses"]

    whole = losses(resume=False)
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "checkpoint-10")
    with refused(RunError, "divided among 2 processes", "this is one of 1", "resume it with 2"):
        started(path, resume=True)
    assert losses(resume=True) == whole


def test_a_checkpoint_is_whole_after_the_last_process(
    llama_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each writes its random states; the trainer's state, by which a checkpoint is told to be whole, waits for them."""
    seen = []

    def wait(self: Any) -> None:
        for folder in (tmp_path / "out" / "checkpoints").glob("checkpoint-*"):
            seen.append([(folder / name).exists() for name in ("rng_state.pth", "trainer_state.json")])

    monkeypatch.setattr("accelerate.Accelerator.wait_for_everyone", wait)
    write(tmp_path / "data.jsonl", PAIRS)
    started(run_file(tmp_path, llama_directory, training={"steps": 1, "save_every": 1}))
    assert [True, False] in seen


def test_what_cannot_be_resumed(llama_directory: Path, tmp_path: Path, refused: Any) -> None:
    write(tmp_path / "data.jsonl", PAIRS)
    with refused(RunError, "nothing to resume", "without --resume"):
        started(run_file(tmp_path, llama_directory), resume=True)
    started(run_file(tmp_path, llama_directory))
    with refused(RunError, "training.lr was 0.01, now 0.5, training.seed was 0, now 1", "another output_dir"):
        started(run_file(tmp_path, llama_directory, training={"lr": 0.5, "seed": 1}), resume=True)
    with refused(RunError, "adapter.method was"):
        started(run_file(tmp_path, llama_directory, method="miss" if "miss" in pc.methods() else "sound"), resume=True)
    with refused(RunError, "holds a run already", "--resume", "output_dir"):
        started(run_file(tmp_path, llama_directory))
    for text, word in (("", "run.yaml"), ("model: {path: [", "not YAML"), ("model: 3", "model")):
        (tmp_path / "out" / "run.yaml").write_text(text)
        with refused(RunError, "run.yaml", word):
            started(run_file(tmp_path, llama_directory), resume=True)


@pytest.mark.parametrize(
    "edited, found",
    [
        (LABELLED[:20], "it had 24 rows, and has 20"),
        (
            [{**row, "label": row["label"].replace("yes", "aye")} for row in LABELLED],
            "its labels were no, yes, and are aye",
        ),
        (LABELLED[::-1], "24 rows as before, with other values"),
    ],
    ids=["rows deleted", "labels renamed", "rows moved"],
)
def test_a_run_goes_on_with_the_data_that_it_began_with(
    edited: list[dict[str, Any]], found: str, bert_directory: Path, tmp_path: Path, refused: Any
) -> None:
    """Other rows would be held out, and a label's name says which class it is."""
    for key in ("train", "evaluation"):
        write(tmp_path / f"{key}.csv", LABELLED)
    data = {"train": "train.csv", "evaluation": "evaluation.csv"}
    path = run_file(tmp_path, bert_directory, data)
    whole = started(path)
    for key in data:
        write(tmp_path / f"{key}.csv", edited)
        with refused(RunError, f"data.{key}", f"{key}.csv' has changed", found, "put it back", "another output_dir"):
            started(path, resume=True)
        write(tmp_path / f"{key}.csv", LABELLED)
    (tmp_path / "train.csv").write_text((tmp_path / "train.csv").read_text().replace("\n", "\r\n"))  # the same rows
    assert started(path, resume=True).losses == whole.losses
    (tmp_path / "out" / "data.json").write_text("{}")
    with refused(RunError, "data.json", "damaged"):
        started(path, resume=True)


def test_a_run_that_is_interrupted_before_it_begins(
    llama_directory: Path, tmp_path: Path, program: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("peft_core.training.run.read_rows", interrupted)
    ran = program("train", run_file(tmp_path, llama_directory))
    assert ran == (130, "", "peft-core: interrupted; nothing was trained yet: start again\n")


@pytest.mark.parametrize("what", ["torch.save", "matplotlib.figure.Figure.savefig"])
def test_a_run_that_finds_no_room_loses_nothing(
    what: str,
    llama_directory: Path,
    tmp_path: Path,
    program: Callable[..., Any],
    clear: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("whole", "broken"):
        write(tmp_path / name / "data.jsonl", PAIRS)
        run_file(tmp_path / name, llama_directory, training={"steps": 4, "save_every": 2})
    whole = started(tmp_path / "whole" / "RUN.yaml")
    save, asked = torch.save, []

    def full(value: Any, *place: Any, **more: Any) -> None:
        asked.append(place)
        if what != "torch.save":
            raise OSError(28, "No space left on device")
        if len(asked) > 3:  # in the second checkpoint
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 192 vs 84")
        save(value, *place, **more)

    monkeypatch.setattr(what, full)
    ran = program("train", tmp_path / "broken" / "RUN.yaml")
    assert ran.status == 2 and ran.err.count("\n") == 1
    clear(ran.err, f"'{tmp_path / 'broken' / 'out'}'", "is there room?", "what was saved is kept", "--resume")
    monkeypatch.undo()
    rest = started(tmp_path / "broken" / "RUN.yaml", resume=True)
    assert (rest.losses, rest.result) == (whole.losses, whole.result)


def test_a_checkpoint_that_waits_for_a_process_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Any
) -> None:
    config = RunConfig.from_file(run_file(tmp_path, tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refused(reporting.TrainingError, "do all processes still run?", "start again"), writing(config):
        raise RuntimeError("Connection closed by peer")
    with refused(reporting.TrainingError, "(is there room?)"), writing(config):
        raise OSError(28, "No space left on device")


def test_how_many_checkpoints_are_kept_may_change(
    llama_directory: Path, tmp_path: Path, program: Callable[..., Any]
) -> None:
    write(tmp_path / "data.jsonl", PAIRS)
    whole = started(run_file(tmp_path, llama_directory, training={"save_every": 1, "keep": 2}))
    ran = program("train", run_file(tmp_path, llama_directory, training={"save_every": 1, "keep": 9}), "--resume")
    assert ran.status == 0 and "continuing from step 3" in ran.out
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert report["losses"] == whole.losses
    last = json.loads((tmp_path / "out" / "checkpoints" / "checkpoint-3" / "trainer_state.json").read_text())
    assert report["seconds"] > last["log_history"][-1]["seconds"] > 0
