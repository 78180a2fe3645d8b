"""How long plan, attach, save and load take on the shapes of large models, and what a hundred adapters cost.

    tox run -e bench -- attach.py [--json FILE] [--adapters 100]

The models are real configurations on the meta device, so that no weights are needed; the adapters of the hundredfold
part stand on a small model in memory. Everything runs once to warm up (imports, plugins) and the best of three counts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from figures import Figure
from shapes import LLAMA_2_7B, LLAMA_3_1_8B
from torch import nn

import peft_core as pc

# Method and options, as users of these models choose them. Those that are not installed are left out.
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("miss", {"r": 64}),
    ("lora", {"r": 16}),
    ("mos", {"r": 8, "equivalent_rank": 2}),
    ("sharelora", {"r": 16}),
]
SHAPES = {"llama-3.1-8b": LLAMA_3_1_8B, "llama-2-7b": LLAMA_2_7B}
# Seconds that each may take: plan, attach, load.
LIMITS = {"llama-3.1-8b": {"plan": 1.0, "attach": 1.0, "load": 1.0}, "llama-2-7b": {"plan": 1.0}}
# The last of many adapters against the first.
LIMIT_LAST = 1.2


def meta_model(name: str) -> nn.Module:
    """The model's shapes, on the meta device."""
    import transformers

    config = transformers.LlamaConfig(**SHAPES[name])
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


def small_model() -> nn.Module:
    """Eight layers of a Llama, a few megabytes."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=8, num_attention_heads=4, vocab_size=512
    )
    return transformers.LlamaForCausalLM(config).eval()


def best(action: Callable[[], Any], undo: Callable[[Any], Any] = lambda made: None, times: int = 3) -> float:
    """The shortest of some runs, in seconds; what `undo` takes is not counted."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        made = action()
        seconds.append(time.perf_counter() - start)
        undo(made)
    return min(seconds)


def large(name: str, method: str, options: dict[str, Any]) -> dict[str, float]:
    """Seconds of plan, attach, save and load on a large model's shapes."""
    model = meta_model(name)
    spec = pc.AdapterSpec(method=method, options=options)
    pc.plan(model, spec)
    found = {"plan": best(lambda: pc.plan(model, spec))}
    found["attach"] = best(lambda: pc.attach(model, spec), lambda adapter: adapter.detach())
    adapter = pc.attach(model, spec)
    # What is loaded has values; only the base is without.
    held = model._parameters
    for key in [key for key in held if key.startswith("peft_core/")]:
        held[key] = nn.Parameter(torch.zeros(held[key].shape))
    for key in [key for key in model._buffers if key.startswith("peft_core/")]:
        model._buffers[key] = torch.zeros(model._buffers[key].shape, dtype=model._buffers[key].dtype)
    with tempfile.TemporaryDirectory() as directory:
        found["save"] = best(lambda: adapter.save(directory))
        found["MB"] = sum(file.stat().st_size for file in Path(directory).iterdir()) / 1e6
        adapter.detach()
        found["load"] = best(lambda: pc.load(model, directory), lambda loaded: loaded.detach())
    return found


def many(count: int, method: str, options: dict[str, Any], rounds: int = 5) -> dict[str, float]:
    """The last of `count` adapters against the first: seconds to attach, to switch, and of a forward.

    Switches and forwards take turns on two models, one with two adapters and one with all of them.
    """
    spec = pc.AdapterSpec(method=method, options=options)
    ids = torch.randint(0, 512, (1, 64))
    models = {"first": small_model(), "last": small_model()}
    attach: list[list[float]] = []
    for _ in range(3):
        for adapter in pc.adapters(models["last"]).values():
            adapter.detach()
        seconds = []
        for index in range(count):
            start = time.perf_counter()
            pc.attach(models["last"], spec, name=f"a{index}")
            seconds.append(time.perf_counter() - start)
        attach.append(seconds)
    for index in range(2):
        pc.attach(models["first"], spec, name=f"a{index}")
    shortest = [min(times) for times in zip(*attach, strict=True)]
    found = {
        "attach first": shortest[1],  # the very first also dresses the layers
        "attach last": min(shortest[-3:]),
    }
    times: dict[str, list[float]] = {f"{what} {which}": [] for what in ("switch", "forward") for which in models}
    with torch.no_grad():
        for _ in range(rounds * 4):
            for which, model in models.items():
                times[f"forward {which}"].append(best(lambda m=model: m(ids)))  # type: ignore[misc]
                # To and fro, so that neither finds its objects out of the caches.
                for name in 2 * list(pc.adapters(model))[-2:]:
                    times[f"switch {which}"].append(best(lambda m=model, n=name: pc.activate(m, n), times=1))  # type: ignore[misc]
    found |= {what: min(seconds) for what, seconds in times.items()}
    full = models["last"]
    trainable = sum(adapter.plan.trainable_bytes for adapter in pc.adapters(full).values())
    held = sum(p.nbytes for key, p in full._parameters.items() if p is not None and key.startswith("peft_core/"))
    found["bytes held / their own"] = held / trainable
    return found


def short() -> list[Figure]:
    """Llama-3.1-8B's shapes, and thirty adapters of the first method."""
    out = []
    installed = [(method, options) for method, options in METHODS if method in pc.methods()]
    for method, options in installed:
        found = large("llama-3.1-8b", method, options)
        for what, limit in LIMITS["llama-3.1-8b"].items():
            out.append(Figure(f"{what} on Llama-3.1-8B, {method}", found[what], limit, "s"))
    method, options = installed[0]
    found = many(30, method, options, rounds=2)
    for what in ("attach", "switch", "forward"):
        ratio = found[f"{what} last"] / found[f"{what} first"]
        out.append(Figure(f"{what}, the last of 30 adapters, {method}", ratio, LIMIT_LAST, "× the first"))
    return out


def main() -> int:
    """Print a table; exit 1 if a limit is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--adapters", type=int, default=100, help="how many adapters the second part attaches")
    arguments = parser.parse_args()
    installed = [(method, options) for method, options in METHODS if method in pc.methods()]
    missed: list[str] = []
    figures: dict[str, Any] = {}
    for name, limits in LIMITS.items():
        for method, options in installed:
            found = figures[f"{name} {method}"] = large(name, method, options)
            shown = "  ".join(f"{what} {value:.3f} s" for what, value in found.items() if what != "MB")
            print(f"{name:14} {method:10} {shown}  ({found['MB']:.0f} MB)", flush=True)
            missed += [
                f"{name} {method}: {what} {found[what]:.2f} s > {limit} s"
                for what, limit in limits.items()
                if found[what] > limit
            ]
    for method, options in installed:
        found = figures[f"{arguments.adapters} adapters {method}"] = many(arguments.adapters, method, options)
        ratios = {what: found[f"{what} last"] / found[f"{what} first"] for what in ("attach", "switch", "forward")}
        shown = "  ".join(
            f"{what} {1e3 * found[f'{what} first']:.2f} → {1e3 * found[f'{what} last']:.2f} ms (× {ratio:.2f})"
            for what, ratio in ratios.items()
        )
        held = found["bytes held / their own"]
        print(f"{arguments.adapters} × {method:10} {shown}  bytes × {held:.3f}", flush=True)
        missed += [
            f"{method}: {what} of the last is {ratio:.2f} × the first"
            for what, ratio in ratios.items()
            if ratio > LIMIT_LAST
        ]
    for line in missed:
        print("missed:", line)
    if arguments.json:
        arguments.json.write_text(json.dumps({"figures": figures, "missed": missed}, indent=2))
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
