"""Kernels, training steps, SwitchLoRA and many adapters on one GPU.

    python benchmarks/gpu.py [--minutes 8] [--parts tests,kernels,steps,switchlora,adapters,profile] [--out FILE]
    python benchmarks/gpu.py --parts steps --settings "8B.*compiled" --add      # more of an earlier run

- tests: the tests of the Triton kernels, on the device instead of in the interpreter.
- kernels: time and bytes a second of each kernel, as a fraction of a device copy measured in the same run, beside the torch
  products that it stands for.
- steps: forward, loss and backward of Llama-3.2-3B's and Llama-3.1-8B's shapes (random weights, bf16), as a ratio to the floor:
  the frozen base with gradients of its inputs only. Each run takes turns with the floor; the median of the ratios counts.
  Memory is the peak above the weights, less the floor's.
- switchlora: SwitchLoRA's whole step against full-rank AdamW's, on the paper's 1.3B shapes, weights in bf16.
- adapters: MoS with many adapters resident: bytes of each, and a forward that switches to the next one every time.
- profile: the device's time of the measured steps, as the sum over their kernels, and the longest of these. Where a step takes
  longer than its kernels, and about as long as the host's part of it, the host is slower than the device.

Settings are measured in the order of their importance until the minutes are spent. What was not reached, or failed, is listed;
the file is written anew after every figure. With `--device cpu --tiny` everything runs on toy sizes, to see that it does; such
figures mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_parts.bench import Bench
from gpu_parts.full_rank import switchlora
from gpu_parts.kernels import kernels
from gpu_parts.many_adapters import adapters
from gpu_parts.models import METHODS
from gpu_parts.report import report
from gpu_parts.steps import profile, steps

import peft_core as pc

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("tests", "kernels", "steps", "switchlora", "adapters", "profile")
# What part of all the time is left to those that follow; steps have by far the most to measure.
LEFT = {"steps": 1 / 4, "switchlora": 1 / 8, "adapters": 1 / 8}


def tests(bench: Bench) -> None:
    """The tests of the methods' kernels, on this device."""
    paths = sorted(map(str, ROOT.glob("packages/method-*/tests/test_kernels.py")))
    environment = os.environ | {"TRITON_INTERPRET": "0" if bench.device.type == "cuda" else "1"}
    parallel = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *parallel, *paths]
    limit = max(30.0, (bench.deadline - time.monotonic()) / 2)
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        bench.left_out.append(f"tests: not finished within {limit:.0f} s")
        return
    lines = [*done.stderr.strip().splitlines(), *done.stdout.strip().splitlines()]
    bench.found["tests"] = {"exit": done.returncode, "last_lines": lines[-30:]}


def environment(device: torch.device) -> dict[str, Any]:
    """What the figures hold for."""
    from importlib.metadata import PackageNotFoundError, version

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    packages = ("torch", "triton", "transformers", "peft", "peft-core")
    return {
        "device": name,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "when": time.strftime("%Y-%m-%d"),
        **{package: installed(package) for package in packages},
    }


def expression(pattern: str) -> re.Pattern[str]:
    """A regex of the command line."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"'{pattern}' is not a valid regex: {error}") from None


def measure(bench: Bench, parts: list[str], minutes: float, count: int) -> None:
    """These parts, in their order, each in its share of the minutes; `count` adapters."""
    functions: dict[str, Callable[[], Any]] = {
        "tests": lambda: tests(bench),
        "kernels": lambda: kernels(bench),
        "steps": lambda: steps(bench),
        "switchlora": lambda: switchlora(bench),
        "adapters": lambda: adapters(bench, count),
        "profile": lambda: profile(bench),
    }
    whole = bench.deadline
    chosen = [part for part in PARTS if part in parts]
    for part in chosen:
        left = 0 if part == chosen[-1] else LEFT.get(part, 0)
        bench.deadline = whole - 60 * minutes * left
        try:
            functions[part]()
        except Exception as error:
            bench.failed(part, error)
        bench.free()
        bench.keep()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: does it run?")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)} (all)")
    parser.add_argument("--minutes", type=float, default=8, help="when to stop starting measurements (8)")
    parser.add_argument("--rounds", type=int, default=7, help="times that a run and the floor take turns (7)")
    parser.add_argument("--adapters", type=int, default=1000, help="adapters to hold at once (1000)")
    parser.add_argument("--backend", default="inductor", help="of torch.compile (inductor)")
    parser.add_argument("--out", type=Path, help="where the figures go (benchmarks/results/gpu-NAME.json)")
    parser.add_argument(
        "--add", action="store_true", help="to the figures that are there, of the same device and versions"
    )
    parser.add_argument(
        "--settings", type=expression, default="", help="of steps and profile: those that this expression finds"
    )
    parser.add_argument("--labels", type=expression, default="", help="of both: likewise, the methods")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"no part {', '.join(unknown)}; there are: {', '.join(PARTS)}")
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA GPU; '--device cpu --tiny' shows whether it runs")
    if device.type != "cuda" and not arguments.tiny:
        raise SystemExit(f"on '{device}' only toy sizes are sensible: add --tiny")
    if absent := sorted(METHODS.keys() - pc.methods().keys()):
        raise SystemExit(f"{', '.join(absent)} not installed: python tools/packages.py install --editable")
    if device.index is not None:
        torch.cuda.set_device(device)
    warnings.filterwarnings("ignore")
    compiling = torch._dynamo.config  # many models, one code: each is compiled anew, and for its own shapes
    compiling.recompile_limit = compiling.accumulated_recompile_limit = 1000
    compiling.automatic_dynamic_shapes = False
    here = environment(device)
    name = re.sub(r"[^a-z0-9]+", "-", here["device"].lower()).strip("-")
    bench = Bench(
        device,
        arguments.tiny,
        arguments.rounds,
        arguments.backend,
        time.monotonic() + 60 * arguments.minutes,
        arguments.out or ROOT / "benchmarks" / "results" / f"gpu-{name}.json",
        arguments.settings,
        arguments.labels,
    )
    bench.found["environment"] = here
    if arguments.add and bench.out.is_file():
        earlier = json.loads(bench.out.read_text())
        if {**earlier["environment"], "when": ""} != {**here, "when": ""}:
            raise SystemExit(f"'{bench.out}' has figures of another device or other versions; choose another --out")
        bench.left_out = [what for what in earlier.pop("left_out") if not bench.asked(what, parts)]
        bench.found = earlier
    measure(bench, parts, arguments.minutes, arguments.adapters)
    print(report({**bench.found, "left_out": bench.left_out}))
    print(f"\nfigures: {bench.out}")


if __name__ == "__main__":
    main()
