"""The command line, as a user meets it: a real process for its mistakes, in-process for the rest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

import peft_core as pc
from peft_core import models, prompts


@pytest.fixture(scope="module")
def adapter(
    checkpoint: Path, method: str, options: dict[str, object], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    model, _ = models.load_base(checkpoint)
    folder = tmp_path_factory.mktemp("adapter")
    pc.attach(model, pc.AdapterSpec(method=method, options=options), seed=0).save(folder)
    return folder


@pytest.fixture
def spec(method: str, options: dict[str, object], tmp_path: Path) -> Path:
    file = tmp_path / "spec.yaml"
    file.write_text(yaml.safe_dump({"method": method, "options": options}))
    return file


def test_methods(program, method: str) -> None:
    status, out, _ = program("methods")
    assert status == 0 and method in out
    status, out, _ = program("methods", "--json")
    assert status == 0
    assert sorted(json.loads(out)) == sorted(pc.methods())
    assert json.loads(out)[method]["options"]["type"] == "object"


def test_plan(program, checkpoint: Path, spec: Path) -> None:
    status, out, _ = program("plan", "--model", checkpoint, "--spec", spec)
    assert status == 0 and "q_proj" in out
    status, out, _ = program("plan", "--model", checkpoint, "--spec", spec, "--json")
    expected = pc.plan(checkpoint, pc.AdapterSpec.from_file(spec))
    assert json.loads(out)["trainable_parameters"] == expected.num_trainable


def test_inspect(program, adapter: Path, method: str) -> None:
    status, out, _ = program("inspect", adapter)
    assert status == 0 and method in out and "LlamaForCausalLM" in out
    status, out, _ = program("inspect", adapter, "--json")
    assert json.loads(out)["method"]["name"] == method


def test_generate(program, checkpoint: Path, adapter: Path) -> None:
    model, tokenizer = models.load_base(checkpoint, torch.float32)
    pc.load(model, adapter)
    expected = prompts.complete(model, tokenizer, "w1 w2", 5)
    common = ("generate", "--base", checkpoint, "--adapter", adapter, "--prompt", "w1 w2")
    status, out, _ = program(*common, "--max-new-tokens", 5, "--dtype", "float32", "--json")
    assert status == 0 and json.loads(out) == {"prompt": "w1 w2", "completion": expected}
    status, _, err = program(*common, "--chat")
    assert status == 2 and "no chat template" in err


@pytest.fixture
def quickstart(checkpoint: Path, examples: Path, tmp_path: Path, fitting) -> Callable[..., list[object]]:
    """``(method, folder, ...)`` → the arguments of a quickstart on the tiny checkpoint."""

    def arguments(method: str, folder: str, *more: object) -> list[object]:
        options = [f"--options={name}={json.dumps(value)}" for name, value in fitting(method).items()]
        where = ["--model", checkpoint, "--data", examples, "--out", tmp_path / folder]
        return ["quickstart", "--method", method, *options, *where, "--dtype", "float32", *more]

    return arguments


@pytest.mark.parametrize("method", sorted(pc.methods()))
def test_quickstart(program, quickstart, checkpoint: Path, tmp_path: Path, method: str) -> None:
    def report(folder: str) -> dict[str, object]:
        arguments = quickstart(method, folder, "--steps", 40, "--lr", 2e-2, "--json")
        status, out, err = program(*arguments)
        assert status == 0, err
        return json.loads(out)

    first, second = report("first"), report("second")
    assert first["held_out_after"] < first["held_out_before"]
    assert first["merge_error"] < 1e-3
    assert first["failures"] == [] and len(first["samples"]) == 3
    for name in ("losses", "held_out_before", "held_out_after", "samples", "merge_error"):
        assert first[name] == second[name], f"the same seed gave another {name}"
    assert json.loads((tmp_path / "first" / "metrics.json").read_text()) == first
    assert {path.name for path in (tmp_path / "first").iterdir()} == {"adapter", "loss.png", "metrics.json"}
    pc.load(models.load_base(checkpoint)[0], tmp_path / "first" / "adapter")


def test_a_failed_check_is_one_line_and_status_1(program, quickstart, method: str) -> None:
    status, out, err = program(*quickstart(method, "out", "--steps", 1, "--lr", 0.0))
    assert status == 1
    assert err.strip().startswith("peft-core: the held-out loss did not fall") and err.count("\n") == 1
    assert "trainable parameters" in out  # the table is shown all the same


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("quickstart", "--method", "no-such"), "method 'no-such' is not installed"),
        (("quickstart", "--method", "METHOD", "--options", "r"), "expected NAME=VALUE"),
        (("quickstart", "--method", "METHOD", "--options", "no_such=1"), "no_such"),
        (("quickstart", "--method", "METHOD", "--model", "smollm3"), "no base model 'smollm3'"),
        (
            ("quickstart", "--method", "METHOD", "--model", "CHECKPOINT", "--data", "absent.jsonl"),
            "there is no file 'absent.jsonl'",
        ),
        (("quickstart", "--method", "METHOD", "--dtype", "float33"), "did you mean 'float32'"),
        (("quickstart", "--method", "METHOD", "--device", "cuda:99"), "device cuda:99 is not available"),
        (("plan", "--model", "CHECKPOINT", "--spec", "absent.yaml"), "absent.yaml"),
        (("inspect", "absent"), "does not exist"),
        (("generate", "--base", "CHECKPOINT", "--adapter", "absent", "--prompt", "a"), "does not exist"),
        (("inspect",), "Missing argument"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    monkeypatch,
    program,
    arguments: tuple[str, ...],
    message: str,
    checkpoint: Path,
    method: str,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"METHOD": method, "CHECKPOINT": str(checkpoint)}
    status, _, err = program(*(names.get(argument, argument) for argument in arguments))
    assert status == 2, err
    assert message in err and "Traceback" not in err


def test_the_installed_program_starts_without_transformers() -> None:
    check = (
        "import sys; from peft_core import cli; cli.program(); "
        "sys.exit('transformers is imported at the start' if 'transformers' in sys.modules else 0)"
    )
    subprocess.run([sys.executable, "-c", check], check=True, timeout=120)
    program = Path(sys.executable).with_name("peft-core")
    shown = subprocess.run(
        [program, "--help"],
        env={**os.environ, "COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout
    for command in ("methods", "plan", "inspect", "quickstart", "generate"):
        assert command in shown


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [("methods", "--json"), ("--version",)], ids=str)
def test_output_that_cannot_be_written_is_one_line_and_status_2(arguments: tuple[str, ...], unbuffered: str) -> None:
    command = [sys.executable, "-m", "peft_core", *arguments]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        ran = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment, timeout=120)
    assert ran.returncode == 2
    assert ran.stderr == "peft-core: the output could not be written: No space left on device\n"


def test_a_reader_who_has_seen_enough_is_no_error() -> None:
    command = [sys.executable, "-m", "peft_core", "methods", "--json"]
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as ran:
        assert ran.stdout is not None and ran.stderr is not None
        ran.stdout.close()
        assert ran.stderr.read() == "" and ran.wait(120) == 1
