"""benchmarks/gpu.py on toy sizes: that it runs, what it writes, and how it judges. Its figures mean nothing here."""

from __future__ import annotations

import importlib
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu.py"


@pytest.fixture(autouse=True)
def beside_its_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the script is started, it finds the modules of its folder."""
    monkeypatch.syspath_prepend(SCRIPT.parent)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PEFT_CORE_KERNELS")}
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], env=own, capture_output=True, text=True)


def test_every_part_runs_and_is_written_down(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    parts = ("kernels", "steps", "switchlora", "adapters")
    arguments = [
        "--device",
        "cpu",
        "--tiny",
        "--rounds",
        "1",
        "--adapters",
        "2",
        "--backend",
        "eager",
        "--minutes",
        "60",
    ]
    done = run(*arguments, "--parts", ",".join(parts), "--out", str(out))
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["left_out"] == []
    assert {"device", "torch", "triton", "cuda", "peft"} <= set(found["environment"])
    assert all(found[part] for part in parts)
    (order,) = found["kernels"]["orders"].values()
    assert {"seconds", "on top", "beneath"} == set(order)
    labels = set(found["steps"]["tiny sequence 16"])
    names = {f"{name} r 2" for name in ("peft Lora", "peft Miss", "miss", "mos", "sharelora", "switchlora")}
    assert labels == {*names, "peft Lora r 2, 16 bits", "miss r 2, kernels in torch", "mos r 2, kernels in torch"}
    assert len(found["steps"]) == 3  # plain, checkpointing, compiled
    assert found["adapters"]["resident"] == 2
    assert "copy" in done.stdout and "µs" in done.stdout and "floor" in done.stdout


def test_more_is_added_to_an_earlier_run_and_failures_are_listed(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    common = ("--device", "cpu", "--tiny", "--rounds", "1", "--backend", "eager", "--out", str(out))
    first = run(*common, "--parts", "steps", "--settings", "16$", "--labels", "^miss r 2$")
    assert first.returncode == 0, first.stderr
    # A backend of torch.compile that does not exist fails in the one setting that compiles.
    again = run(
        *common, "--parts", "steps", "--settings", "compiled", "--labels", "^mos r 2$", "--add", "--backend", "none"
    )
    assert again.returncode == 0, again.stderr
    found = json.loads(out.read_text())
    assert list(found["steps"]["tiny sequence 16"]) == ["miss r 2"]
    assert found["steps"]["tiny sequence 16 compiled"] == {}
    assert any("compiled: " in what and "none" in what for what in found["left_out"])
    figures = json.loads(out.read_text())
    figures["environment"]["torch"] = "1.0"
    out.write_text(json.dumps(figures))
    other = run(*common, "--parts", "adapters", "--add")
    assert other.returncode == 1 and "other versions" in other.stderr and json.loads(out.read_text()) == figures


def test_what_there_is_no_time_for_is_listed(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    done = run("--device", "cpu", "--tiny", "--parts", "steps,adapters", "--minutes", "0", "--out", str(out))
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["steps"] == {} and "adapters" not in found
    assert [what.split(":")[0] for what in found["left_out"]] == [
        "steps tiny sequence 16",
        "steps tiny sequence 16 checkpointing",
        "steps tiny sequence 16 compiled",
        "adapters",
    ]
    assert "not measured" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "cuda"], "needs a CUDA GPU"),
        (["--device", "cpu"], "--tiny"),
        (["--parts", "kernel"], "no part kernel"),
        (["--settings", "8B("], "'8B(' is not a valid regex"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], words: str, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert words in f"{stop.value} {capsys.readouterr().err}"


def test_targets_are_judged_on_the_8b_shapes() -> None:
    report = importlib.import_module("gpu_parts.report")
    case = {"seconds": 1.0, "fraction_of_copy": 0.85, "bytes": 2**28, "streams": True}
    runs = {
        "peft Lora r 16": {"ratio": 1.20, "peak_above_floor": 1000},
        "miss r 16": {"ratio": 1.02, "device_ratio": 1.01, "peak_above_floor": 100},
        "mos r 16": {"ratio": 1.15, "device_ratio": 1.05, "peak_above_floor": 400},
    }
    found = {
        "kernels": {
            "cases": {
                "miss shard_sum": case,
                "miss shard_expand_add_": case | {"fraction_of_copy": 0.79},
                "switchlora switch_update_": case | {"fraction_of_copy": 0.1, "bytes": 2**20},
                "mos gather": case | {"fraction_of_copy": 0.1, "streams": False},
            }
        },
        "steps": {"8B sequence 1024": runs, "3B sequence 1024": {"miss r 16": {"ratio": 9.0, "peak_above_floor": 0}}},
    }
    lines = report.verdicts(found)
    judged = [[word for word in re.split("[ ,;]", line) if word in ("met", "MISSED")] for line in lines]
    assert judged == [["met"], ["MISSED"], ["met"], ["met", "met"], ["MISSED"], ["MISSED", "MISSED"]]
