"""Pre-train a small Llama on Python's standard library: full rank, LoRA, SwitchLoRA, and SwitchLoRA that never switches.

    python examples/pretrain/pretrain.py            # the four runs, then table, curves and singular values, in out/
    python examples/pretrain/pretrain.py --grid     # which learning rate is the best of three for each, on another seed
    python examples/pretrain/pretrain.py --text     # only the text

All runs start from the same weights and see the same batches; each is `peft-core train` in a process of its own, with
RUN.yaml but for adapter and learning rate, and without autocast where the hardware does not multiply bfloat16. What is
reported is of test modules and seed 1; learning rates are chosen on validation modules and seed 0.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import statistics
import subprocess
import sys
import sysconfig
import time
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import peft_core as pc
from peft_core.models import fast_dtype
from peft_core.training.examples import prepare_stream
from peft_core.training.rows import Row, read_rows

HERE = Path(__file__).resolve().parent
RUN: dict[str, Any] = yaml.safe_load((HERE / "RUN.yaml").read_text(encoding="utf-8"))
RUN["training"]["autocast"] = fast_dtype("cuda" if torch.cuda.is_available() else "cpu") == torch.bfloat16
SWITCHLORA = RUN["adapter"]
LORA = {**SWITCHLORA, "method": "lora", "options": {"r": 32, "alpha": 32}}
NEVER = {**SWITCHLORA, "options": {**SWITCHLORA["options"], "interval": 1e12}}

RUNS: dict[str, tuple[dict[str, Any] | None, float]] = {
    "full rank": (None, 1.25e-4),
    "LoRA": (LORA, 1e-3),
    "SwitchLoRA": (SWITCHLORA, RUN["training"]["lr"]),
    "SwitchLoRA, never switching": (NEVER, RUN["training"]["lr"]),
}
"""Name → its adapter and its learning rate: the best of `GRIDS` in 250 steps (`--grid --steps 250`)."""

GRIDS = {
    "full rank": (1.25e-4, 2.5e-4, 5e-4),
    "LoRA": (5e-4, 1e-3, 2e-3),
    "SwitchLoRA": (1e-3, 2.5e-3, 5e-3),
}
"""`never switching` takes SwitchLoRA's rate: it is SwitchLoRA but for one option."""

STYLES = ("ko-", "C1o-", "C0o-", "C2o--")
FLOOR = 1e-5  # of the plot: below it, float32 weights hold nothing but rounding


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "out")
    parser.add_argument("--steps", type=int, default=RUN["training"]["steps"])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=40, help="steps of each kind that are timed, in turn")
    parser.add_argument("--grid", nargs="*", metavar="NAME", help="find learning rates instead (default: of all)")
    parser.add_argument("--text", action="store_true", help="only write the text")
    given = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    write_text(given.out / "text", Path(sysconfig.get_paths()["stdlib"]))
    if given.text:
        return
    if given.grid is not None:
        search(given.out, given.grid or list(GRIDS), given.steps)
        return
    start = time.perf_counter()
    reports = {name: train(given.out, name, rate, given.steps, given.seed) for name, (_, rate) in RUNS.items()}
    check_same_start(given.out)
    spectra = {name: singular_values(folder(given.out, name)) for name in RUNS}
    times = step_times(given.out, given.rounds)
    results = {
        "setting": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "steps": given.steps,
            "tokens_per_step": RUN["training"]["batch_size"] * RUN["data"]["max_length"],
            "seed": given.seed,
            "autocast": RUN["training"]["autocast"],
            "minutes": round((time.perf_counter() - start) / 60, 1),
        },
        "runs": {
            name: {"learning_rate": RUNS[name][1], **summary(reports[name], spectra[name], times[name])}
            for name in RUNS
        },
    }
    (given.out / "pretrain.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    plot_curves(results["runs"], given.out / "perplexity.png")
    plot_spectra(spectra, given.out / "singular-values.png")
    Console(width=140).print(table(results))
    print(f"perplexity.png, singular-values.png and pretrain.json: {given.out}")


# The text


def write_text(out: Path, library: Path) -> None:
    """The standard library's modules: 98 % to train, 1 % to choose learning rates on, 1 % to test; whole packages each."""
    files = dict(modules(library))
    sizes: Counter[str] = Counter()
    for path, text in files.items():
        sizes[top(path)] += len(text)
    parts: dict[str, set[str]] = {"validation": set(), "test": set()}
    order = sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest())
    for chosen in parts.values():
        room = sum(sizes.values()) // 100
        for name in order:
            if sizes[name] <= room and not any(name in part for part in parts.values()):
                chosen.add(name)
                room -= sizes[name]
    out.mkdir(parents=True, exist_ok=True)
    parts["train"] = sizes.keys() - parts["validation"] - parts["test"]
    for part, names in parts.items():
        rows = (json.dumps({"text": text}) + "\n" for path, text in files.items() if top(path) in names)
        (out / f"{part}.jsonl").write_text("".join(rows), encoding="utf-8")


def modules(root: Path) -> Iterator[tuple[Path, str]]:
    """(path, source) of the library itself, without tests and what is installed beside it."""
    skipped = {"test", "tests", "idle_test", "pydoc_data", "site-packages", "dist-packages", "lib2to3", "__phello__"}
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts):
        place = path.relative_to(root)
        if skipped.isdisjoint(place.parts):
            with tokenize.open(path) as file:
                if text := file.read():
                    yield place, text


def top(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


# Training


def train(out: Path, name: str, rate: float, steps: int, seed: int, part: str = "test") -> dict[str, Any]:
    """What `peft-core train` reports of a run; one that is there already, with the same settings, is not repeated."""
    where = folder(out, name) if part == "test" else folder(out / "grid", f"{name} {rate:g}")
    run = {
        **RUN,
        "data": {**RUN["data"], "train": str(out / "text/train.jsonl"), "evaluation": str(out / f"text/{part}.jsonl")},
        "adapter": RUNS[name][0],
        "training": {
            **RUN["training"],
            "steps": steps,
            "save_every": steps,
            "evaluate_every": max(1, steps // 5),
            "lr": rate,
            "seed": seed,
        },
        "output_dir": str(where),
    }
    file, text = where / "RUN.yaml", yaml.safe_dump(run, sort_keys=False)
    if not (where / "metrics.json").exists():
        where.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        print(f"{name}, learning rate {rate:g}", flush=True)
        begun = ["--resume"] if (where / "run.yaml").exists() else []
        command = [sys.executable, "-m", "peft_core", "train", file, "--json", *begun]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    elif file.read_text(encoding="utf-8") != text:
        raise SystemExit(f"{where} holds a run with other settings; remove it, or use another --out")
    return json.loads((where / "metrics.json").read_text(encoding="utf-8"))


def search(out: Path, names: list[str], steps: int) -> None:
    """Perplexity on the validation modules for every learning rate of the grids."""
    found = {
        name: {rate: perplexity(train(out, name, rate, steps, 0, "validation")) for rate in GRIDS[name]}
        for name in names
    }
    (out / "grid.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name, by_rate in found.items():
        print(f"{name}: " + ", ".join(f"{rate:g} → {value:.1f}" for rate, value in by_rate.items()))


def perplexity(report: dict[str, Any]) -> float:
    return math.exp(report["result"]["loss"])


def folder(out: Path, name: str) -> Path:
    return out / name.replace(",", "").replace(" ", "-").lower()


def check_same_start(out: Path) -> None:
    """That all runs started from the same weights and tokenizer, to the byte."""
    for file in ("model.safetensors", "tokenizer.json"):
        found = {hashlib.sha256((folder(out, name) / "base" / file).read_bytes()).digest() for name in RUNS}
        if len(found) > 1:
            raise SystemExit(f"the runs in {out} did not start from the same {file}; use another --out")


# What came out


def singular_values(run: Path) -> torch.Tensor:
    """Of ΔW = W − W₀ of every adapted layer, each over its largest: [layers, 256]."""
    base = AutoModelForCausalLM.from_pretrained(run / "base")
    before = base.state_dict()
    if (run / "adapter.json").exists():
        trained = pc.load(AutoModelForCausalLM.from_pretrained(run / "base"), run).merge_and_detach()
    else:
        trained = AutoModelForCausalLM.from_pretrained(run)
    after = trained.state_dict()
    sites = pc.plan(base, pc.AdapterSpec(method="lora", options={"r": 1})).sites
    changes = (after[f"{site.path}.weight"].double() - before[f"{site.path}.weight"].double() for site in sites)
    values = torch.stack([torch.linalg.svdvals(change) for change in changes])
    return values / values[:, :1]


def step_times(out: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Mean CPU and wall-clock seconds of a training step of each run, measured in turn.

    The rounds are a run of their own to SwitchLoRA, so that they have as many exchanges as its mean step has.
    """
    rows, base = read_rows(str(out / "text/test.jsonl")), folder(out, "full rank") / "base"
    warming = 3
    steppers = {}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in RUNS}
    for name, (adapter, _) in RUNS.items():
        steppers[name] = stepper(base, adapter, rows, warming + rounds)
    for _ in range(warming + rounds):
        for name, step in steppers.items():
            cpu, wall = time.process_time(), time.perf_counter()
            step()
            times[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    means = {
        name: [statistics.mean(kind) for kind in zip(*found[warming:], strict=True)] for name, found in times.items()
    }
    return {name: {"cpu": cpu, "wall": wall} for name, (cpu, wall) in means.items()}


def stepper(base: Path, spec: dict[str, Any] | None, rows: list[Row], steps: int) -> Callable[[], None]:
    """A training step as the trainer makes it: clipping, and the optimizer it would choose."""
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    size, length = RUN["training"]["batch_size"], RUN["data"]["max_length"]
    examples = prepare_stream(rows[:20], tokenizer, length).tokens[:size]
    ids = torch.tensor([example.input_ids for example in examples])
    parameters, make = list(model.parameters()), None
    if spec is not None:
        adapter = pc.attach(model, pc.AdapterSpec(**spec))
        adapter.total_steps = steps
        parameters, make = list(adapter.parameters()), adapter.plan.spec.info.optimizer
    optimizer = (make or torch.optim.AdamW)(parameters, lr=1e-3, fused=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=RUN["training"]["autocast"]):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def summary(report: dict[str, Any], values: torch.Tensor, times: dict[str, float]) -> dict[str, Any]:
    """The figures of a run: energy is of ΔW, as a part of its squared norm."""
    energy = values.square().cumsum(1) / values.square().sum(1, keepdim=True)
    return {
        "perplexity": perplexity(report),
        "trainable_parameters": report["trainable_parameters"],
        "gradient_bytes_per_step": 4 * report["trainable_parameters"],  # float32
        "peak_memory_bytes": report["peak_memory_bytes"],
        "seconds_per_step": times,
        "energy_beyond_32_singular_values": max(0.0, 1 - energy[:, 31].mean().item()),
        "singular_values_for_99_percent": (energy < 0.99).sum(1).double().mean().item() + 1,
        "curve": [(int(entry["step"]), math.exp(entry["loss"])) for entry in report["evaluations"]],
    }


def table(results: dict[str, Any]) -> Table:
    """The figures, and each run's against full rank and LoRA."""
    runs, setting = results["runs"], results["setting"]
    full, lora = runs["full rank"], runs["LoRA"]
    title = f"{setting['steps']:,} steps of {setting['tokens_per_step']:,} tokens, seed {setting['seed']}"
    shown = Table(title=title, title_justify="left")
    headings = (
        "perplexity",
        "of full rank's",
        "gradient MB/step",
        "of full",
        "peak GB",
        "s/step (CPU)",
        "of LoRA's",
        "ΔW beyond 32",
    )
    for heading in ("", "learning rate", *headings):
        shown.add_column(heading, justify="right" if heading else "left", no_wrap=not heading)
    for name, run in runs.items():
        bytes_ = run["gradient_bytes_per_step"]
        seconds = run["seconds_per_step"]["cpu"]
        shown.add_row(
            name,
            f"{run['learning_rate']:g}",
            f"{run['perplexity']:.2f}",
            f"{run['perplexity'] / full['perplexity']:.3f}",
            f"{bytes_ / 1e6:.1f}",
            f"{bytes_ / full['gradient_bytes_per_step'] - 1:+.0%}",
            f"{run['peak_memory_bytes'] / 1e9:.2f}",
            f"{seconds:.3f}",
            f"{seconds / lora['seconds_per_step']['cpu']:.3f}",
            f"{run['energy_beyond_32_singular_values']:.1%}",
        )
    return shown


def plot_curves(runs: dict[str, Any], path: Path) -> None:
    """Perplexity on the test modules over the steps."""
    figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
    axes = figure.subplots()
    for (name, run), style in zip(runs.items(), STYLES, strict=True):
        steps, values = zip(*(point for point in run["curve"] if point[0]), strict=True)
        axes.plot(steps, values, style, markersize=4, label=f"{name}: {values[-1]:.1f}")
    axes.set(
        xlabel="step",
        ylabel="perplexity, test modules",
        yscale="log",
        title="A small Llama on Python's standard library",
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path)


def plot_spectra(spectra: dict[str, torch.Tensor], path: Path) -> None:
    """Singular values of ΔW over the largest: geometric mean over the adapted layers."""
    figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
    axes = figure.subplots()
    for (name, values), style in zip(spectra.items(), STYLES, strict=True):
        middle = values.clamp(min=FLOOR).log().mean(0).exp()
        axes.plot(range(1, len(middle) + 1), middle, style.replace("o", ""), label=name)
    axes.set(
        xlabel="number of the singular value",
        ylabel="singular value over the largest",
        yscale="log",
        ylim=(FLOOR, 1.5),
        title="What training changed: W − W₀, mean of the adapted layers",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:  # the run has said why
        sys.exit(error.returncode)
    except KeyboardInterrupt:
        sys.exit(130)
