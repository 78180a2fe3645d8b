"""benchmarks/gpu.py on toy sizes: that it runs, what it writes, and how it judges. Its figures mean nothing here."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import peft_core as pc

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu.py"


@pytest.fixture(autouse=True)
def beside_its_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the script is started, it finds the modules of its folder."""
    monkeypatch.syspath_prepend(SCRIPT.parent)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PEFT_CORE_KERNELS")}
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], env=own, capture_output=True, text=True)


def main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """Run it within this process, whose settings of compilation are as before afterwards."""
    config = torch._dynamo.config
    names = ("recompile_limit", "accumulated_recompile_limit", "automatic_dynamic_shapes")
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    with config.patch({name: getattr(config, name) for name in names}):
        runpy.run_path(str(SCRIPT), run_name="__main__")


def test_every_part_runs_and_is_written_down(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    parts = ("kernels", "steps", "switchlora", "adapters")
    common = ("--device", "cpu", "--tiny", "--rounds", "1", "--backend", "eager", "--minutes", "60", "--out", str(out))
    done = run(*common, "--adapters", "2", "--parts", ",".join(parts), "--settings", "(16|checkpointing)$")
    assert done.returncode == 0, done.stderr
    # Compiling takes long: two labels of nine.
    compiled = run(*common, "--parts", "steps", "--settings", "compiled$", "--labels", "^(mos|peft Lora) r 2$", "--add")
    assert compiled.returncode == 0, compiled.stderr
    found = json.loads(out.read_text())
    assert found["left_out"] == []
    assert {"device", "torch", "triton", "cuda", "peft"} <= set(found["environment"])
    assert all(found[part] for part in parts)
    (order,) = found["kernels"]["orders"].values()
    assert {"seconds", "on top", "beneath"} == set(order)
    names = {f"{name} r 2" for name in ("peft Lora", "peft Miss", "miss", "mos", "sharelora", "switchlora")}
    names |= {"peft Lora r 2, 16 bits", "miss r 2, kernels in torch", "mos r 2, kernels in torch"}
    assert {setting: set(runs) for setting, runs in found["steps"].items()} == {
        "tiny sequence 16": names,
        "tiny sequence 16 checkpointing": names,
        "tiny sequence 16 compiled": {"mos r 2", "peft Lora r 2"},
        "tiny sequence 16 checkpointing compiled": {"mos r 2", "peft Lora r 2"},
    }
    assert all(0 < own["host_seconds"] <= own["seconds"] for own in found["steps"]["tiny sequence 16"].values())
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
    assert {setting: list(runs) for setting, runs in found["steps"].items()} == {"tiny sequence 16": ["miss r 2"]}
    assert sum("compiled: " in what and "none" in what for what in found["left_out"]) == 2
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
        "steps tiny sequence 16 checkpointing compiled",
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
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, *arguments)
    assert words in f"{stop.value} {capsys.readouterr().err}"


def test_a_device_needs_no_number(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "a GPU")
    out = tmp_path / "figures.json"
    main(monkeypatch, "--device", "cuda", "--parts", "adapters", "--minutes", "0", "--out", str(out))
    assert json.loads(out.read_text())["left_out"] == ["adapters: out of time"]


def test_time_is_left_to_what_follows(tmp_path: Path, monkeypatch: Any) -> None:
    deadlines: list[float] = []
    for name in ("steps", "profile"):
        monkeypatch.setattr(f"gpu_parts.steps.{name}", lambda bench: deadlines.append(bench.deadline))
    out = tmp_path / "figures.json"
    main(monkeypatch, "--device", "cpu", "--tiny", "--parts", "steps,profile", "--minutes", "8", "--out", str(out))
    assert deadlines[1] - deadlines[0] == pytest.approx(120)


def bench_of(tmp_path: Path, **fields: Any) -> Any:
    module = importlib.import_module("gpu_parts.bench")
    values = {"device": torch.device("cpu"), "tiny": True, "rounds": 1, "backend": "eager", "deadline": float("inf")}
    return module.Bench(**{**values, "out": tmp_path / "figures.json", **fields})


def test_what_was_measured_is_profiled_on_every_model(tmp_path: Path, monkeypatch: Any) -> None:
    models, steps = (importlib.import_module(f"gpu_parts.{name}") for name in ("models", "steps"))
    for name in ("8B", "3B"):
        monkeypatch.setitem(models.SHAPES, name, models.SHAPES["tiny"])
    chosen = [steps.Setting(name, 16, checkpointing, False) for checkpointing in (False, True) for name in ("8B", "3B")]
    monkeypatch.setattr(steps, "settings", lambda tiny: chosen)
    bench = bench_of(tmp_path, labels=re.compile("^(miss|mos) r 2$"))
    steps.steps(bench)
    del bench.found["steps"][str(chosen[-1])]["mos r 2"]
    steps.profile(bench)
    profiles = bench.found["profile"]
    assert bench.left_out == []
    assert {setting: set(runs) for setting, runs in profiles.items()} == {
        setting: set(runs) for setting, runs in bench.found["steps"].items()
    }
    own = profiles[str(chosen[0])]["miss r 2"]
    assert 0 < sum(own["where"].values()) <= own["device_seconds"] * (1 + 1e-9)
    assert list(own["where"].values()) == sorted(own["where"].values(), reverse=True)


def test_kernels_alone_count_as_the_time_of_a_gpu(tmp_path: Path, monkeypatch: Any) -> None:
    kinds = torch.autograd.DeviceType
    events = [
        SimpleNamespace(key="cudaLaunchKernel", device_type=kinds.CPU, self_device_time_total=50.0),
        SimpleNamespace(key="short", device_type=kinds.CUDA, self_device_time_total=1e6),
        SimpleNamespace(key="long", device_type=kinds.CUDA, self_device_time_total=2e6),
    ]

    class Profiler(contextlib.nullcontext[Any]):
        def key_averages(self) -> Any:
            return events

    monkeypatch.setattr("torch.profiler.profile", lambda activities: Profiler(Profiler()))
    monkeypatch.setattr("torch.cuda.synchronize", lambda device: None)
    bench = bench_of(tmp_path, device=torch.device("cuda"))
    assert list(bench.profiled(lambda: None).items()) == [("long", 2.0), ("short", 1.0)]
    events.clear()
    with pytest.raises(RuntimeError, match="no kernels"):
        bench.profiled(lambda: None)


def test_a_round_of_a_kernel_waits_as_long_as_the_host_needs(tmp_path: Path, monkeypatch: Any) -> None:
    bench = bench_of(tmp_path)
    pauses = []
    monkeypatch.setattr(bench, "clocked", lambda function: (0.25, 9.0))
    monkeypatch.setattr(bench, "_after", lambda pause, function: pauses.append(pause) or 6.0)
    assert bench.per_call(lambda: None, calls=3, rounds=2) == 2.0
    assert pauses == [0.5, 0.5]


def test_what_an_earlier_run_left_out_is_tried_again_if_asked_for(tmp_path: Path) -> None:
    bench = bench_of(tmp_path, settings=re.compile("^8B"), labels=re.compile("^miss"))
    left = [
        "profile 8B sequence 1024: miss r 16",
        "profile 8B sequence 1024: mos r 16",
        "steps 3B sequence 1024: miss r 16",
    ]
    assert [bench.asked(f"{what}: out of time", ["steps", "profile"]) for what in left] == [True, False, False]
    assert not bench.asked(left[0], ["steps"])


@pytest.mark.parametrize("label", ["floor", "miss", "peft"])
def test_no_step_waits_for_the_device(label: str) -> None:
    models, runs = (importlib.import_module(name) for name in ("gpu_parts.models", "runs"))
    base = models.base_model("tiny", torch.device("cpu"))
    make = {"floor": runs.Run, "miss": lambda base: models.with_method(base, "miss", 2)}
    run = make.get(label, lambda base: runs.theirs(base, "LoraConfig", 2))(base)
    ids = torch.arange(16)[None]
    run.step(ids)

    class Waits(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert "_local_scalar_dense" not in str(function)
            return function(*args, **(kwargs or {}))

    with Waits():
        run.backward(ids)


def test_switchlora_and_full_rank_training_differ_in_the_linear_layers_alone() -> None:
    models, full_rank = (importlib.import_module(f"gpu_parts.{name}") for name in ("models", "full_rank"))
    base = models.base_model("tiny", torch.device("cpu"))
    ids = torch.arange(16)[None]
    full, switched = full_rank.full(base), full_rank.switched(base, 8)
    for run in (full, switched):
        run.backward(ids)
        assert all(parameter.grad is not None for parameter in run.parameters)
        assert {parameter.dtype for parameter in run.parameters} == {torch.bfloat16}
    linear = [weight for name, weight in base.named_parameters() if name.split(".")[-2] in models.TYPES]
    others = sum(weight.numel() for weight in base.parameters()) - sum(weight.numel() for weight in linear)
    factors = sum(8 * sum(weight.shape) for weight in linear)
    assert sum(parameter.numel() for parameter in full.parameters) == sum(
        weight.numel() for weight in base.parameters()
    )
    assert sum(parameter.numel() for parameter in switched.parameters) == others + factors


def test_the_papers_number_of_parameters_is_trained() -> None:
    models, full_rank = (importlib.import_module(f"gpu_parts.{name}") for name in ("models", "full_rank"))
    model = models.base_model("1.3B", torch.device("meta"))
    spec = pc.AdapterSpec(
        method="switchlora", targets=models.TYPES, train_modules=full_rank.NOT_LINEAR, options={"r": 512}
    )
    assert sum(weight.numel() for weight in model.parameters()) == 1_339_492_352
    assert pc.plan(model, spec).num_trainable == 609_720_320


def test_every_kernel_that_streams_is_judged() -> None:
    kernels = importlib.import_module("gpu_parts.kernels")
    cases = kernels.kernel_cases(torch.device("meta"), tiny=False)
    assert all(case.nbytes >= kernels.LEAST_BYTES for case in cases if case.streams)


def test_targets_are_judged_on_the_8b_shapes() -> None:
    report = importlib.import_module("gpu_parts.report")
    case = {"seconds": 1.0, "fraction_of_copy": 0.85, "bytes": 2**28, "streams": True}
    runs = {
        "peft Lora r 16": {"ratio": 1.20, "peak_above_floor": 1000},
        "miss r 16": {"ratio": 1.02, "seconds": 0.1, "host_seconds": 0.02, "peak_above_floor": 100},
        "mos r 16": {"ratio": 1.15, "seconds": 0.12, "host_seconds": 0.11, "peak_above_floor": 400},
    }
    profile = {"device_ratio": 1.05, "device_seconds": 0.08, "where": {"a product": 0.06, "a gather": 0.02}}
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
        "profile": {"8B sequence 1024": {"miss r 16": profile, "mos r 16": profile}},
    }
    lines = report.verdicts(found)
    # Of the miss alone, where the time goes.
    where = [line.strip() for line in lines if line.startswith("  ")]
    assert (
        where[0] == "of 120.0 ms the host's part is 110.0 ms, the kernels' 80.0 ms (1.050 of the floor's), the longest:"
    )
    assert where[1:] == ["60.00 ms a product", "20.00 ms a gather"]
    lines = [line for line in lines if not line.startswith("  ")]
    judged = [[word for word in re.split("[ ,;]", line) if word in ("met", "MISSED")] for line in lines]
    assert judged == [["met"], ["MISSED"], ["met"], ["met", "met"], ["MISSED"], ["MISSED", "MISSED"]]
