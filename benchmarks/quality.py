"""Quality at equal budget: held-out loss after the same number of steps, for methods and ranks, on the quickstart's task.

python benchmarks/quality.py                  # goes on where it was stopped; writes docs/quality.json and docs/quality.md
python benchmarks/quality.py --table          # only the table, from what there is

For each configuration the learning rate is chosen on seed 0 from one grid of three, then seeds 1 and 2 run with it. Every run
starts from the same base and sees the same batches for the same seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import peft_core as pc
from peft_core import models, reporting
from peft_core.quickstart import docstrings, loop
from peft_core.training.examples import pair_tokens
from peft_core.training.losses import evaluate

ROOT = Path(__file__).resolve().parent.parent
GRID = (5e-4, 2e-3, 8e-3)
SEEDS = (0, 1, 2)
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA r=2": ("lora", {"r": 2, "alpha": 2}),
    "LoRA r=8": ("lora", {"r": 8, "alpha": 8}),
    "LoRA r=16": ("lora", {"r": 16, "alpha": 16}),
    "LoRA r=64": ("lora", {"r": 64, "alpha": 64}),
    "MoS e=2 r=8": ("mos", {"r": 8, "equivalent_rank": 2, "alpha": 8}),
    "MoS e=8 r=32": ("mos", {"r": 32, "equivalent_rank": 8, "alpha": 32}),
    "ShareLoRA A r=16": ("sharelora", {"r": 16, "alpha": 16, "share": "A"}),
    "ShareLoRA AB r=16": ("sharelora", {"r": 16, "alpha": 16, "share": "AB"}),
    "MiSS r=16": ("miss", {"r": 16}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=128, help="tokens of an example")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "quality.json")
    parser.add_argument("--table", action="store_true", help="print what there is, run nothing")
    arguments = parser.parse_args()
    setting = {name: getattr(arguments, name) for name in ("steps", "batch_size", "held_out", "max_length")}
    results = read(arguments.results, setting)
    if not arguments.table:
        run_all(results, arguments.results)
    text = table(results)
    arguments.results.with_suffix(".md").write_text(page(results, text), encoding="utf-8")
    print(text)


def read(path: Path, setting: dict[str, int]) -> dict[str, Any]:
    """Results of earlier calls with the same setting."""
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found["setting"] == setting:
            return found
        raise SystemExit(
            f"{path} holds results of another setting, {found['setting']}; name another file with --results"
        )
    return {"setting": setting, "runs": []}


def run_all(results: dict[str, Any], path: Path) -> None:
    """Every run that is not there yet; the file is written after each."""
    setting, console = results["setting"], Console(stderr=True)
    base, tokenizer = models.load_base("smollm2-135m", torch.bfloat16)
    examples, unseen = docstrings.split_by_module(docstrings.docstring_pairs())
    step = max(1, len(unseen) // setting["held_out"])
    train, held_out = (
        [pair_tokens(pair.prompt, pair.completion, tokenizer, setting["max_length"]) for pair in chosen]
        for chosen in (examples, unseen[::step][: setting["held_out"]])
    )
    if "base" not in results:
        results["base"] = evaluate(base, held_out, tokenizer.pad_token_id)
        results["versions"] = {"torch": torch.__version__, "peft-core": pc.__version__}
    for name, (method, options) in CONFIGURATIONS.items():
        for seed, rate in still_to_do(results, name):
            start = time.perf_counter()
            adapter = pc.attach(base, pc.AdapterSpec(method=method, options=options), seed=seed)
            adapter.total_steps = setting["steps"]
            torch.manual_seed(seed)
            batches = loop.batches(train, setting["batch_size"], tokenizer.pad_token_id, seed)
            optimizer = torch.optim.AdamW(adapter.parameters(), lr=rate, weight_decay=0.0)
            try:
                loop.train(base, optimizer, batches, steps=setting["steps"])
                loss: float | None = evaluate(base, held_out, tokenizer.pad_token_id)
            except reporting.TrainingError:  # it diverged: a result, too
                loss = None
            run = {"name": name, "seed": seed, "lr": rate, "loss": loss, "parameters": adapter.num_trainable}
            adapter.detach()
            results["runs"].append(run)
            path.write_text(json.dumps(results, indent=1), encoding="utf-8")
            shown = "diverged" if loss is None else f"{loss:.4f}"
            console.print(f"{name:20} seed {seed} lr {rate:g}: {shown} ({time.perf_counter() - start:.0f} s)")


def still_to_do(results: dict[str, Any], name: str) -> Iterator[tuple[int, float]]:
    """(seed, learning rate) of the runs that are not there: the grid on the first seed, then the other seeds."""
    done = {(run["seed"], run["lr"]) for run in results["runs"] if run["name"] == name}
    yield from ((SEEDS[0], rate) for rate in GRID if (SEEDS[0], rate) not in done)
    rate = best(results, name)  # the grid is complete by now
    yield from ((seed, rate) for seed in SEEDS[1:] if (seed, rate) not in done)


def best(results: dict[str, Any], name: str) -> float:
    """The learning rate with the lowest held-out loss on the first seed."""
    runs = [
        run for run in results["runs"] if run["name"] == name and run["seed"] == SEEDS[0] and run["loss"] is not None
    ]
    return float(min(runs, key=lambda run: run["loss"])["lr"])


def table(results: dict[str, Any]) -> str:
    """Markdown: one row per configuration, best first."""
    rows = []
    for name in CONFIGURATIONS:
        runs = [run for run in results["runs"] if run["name"] == name]
        if not any(run["loss"] is not None for run in runs):
            continue
        rate = best(results, name)
        losses = [run["loss"] for run in runs if run["lr"] == rate and run["loss"] is not None]
        spread = max(losses) - min(losses)
        rows.append((statistics.mean(losses), spread, len(losses), name, runs[0]["parameters"], rate))
    lines = [
        "| configuration | trainable | learning rate | held-out loss, mean | spread (max − min) | seeds |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for mean, spread, count, name, parameters, rate in sorted(rows):
        lines.append(f"| {name} | {parameters:,} | {rate:g} | {mean:.4f} | {spread:.4f} | {count} |")
    return "\n".join(lines)


def page(results: dict[str, Any], text: str) -> str:
    """docs/quality.md: what was run, and the table as it came out. Remarks below the marker are kept by hand."""
    path, marker = ROOT / "docs" / "quality.md", "## What we make of it"
    remarks = path.read_text(encoding="utf-8").partition(marker)[2] if path.exists() else "\n"
    setting = results["setting"]
    return (
        "# Quality at equal budget\n\n"
        f"SmolLM2-135M-Instruct in bfloat16 on the quickstart's task (docstrings for functions of Python's standard library, "
        f"held out by module): {setting['steps']} steps of {setting['batch_size']} examples "
        f"of at most {setting['max_length']} tokens, AdamW, linear warm-up and decay, "
        f"gradients clipped to 1. Loss in nats per completion token on {setting['held_out']} held-out examples; the base reads "
        f"{results['base']:.4f}. The learning rate is the best of {', '.join(f'{rate:g}' for rate in GRID)} on seed 0.\n\n"
        "    python benchmarks/quality.py\n\n"
        f"{text}\n\n{marker}{remarks}"
    )


if __name__ == "__main__":
    main()
