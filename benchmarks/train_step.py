"""A training step of every installed method and of the field's PEFT library, against the floor, on SmolLM2-135M.

    tox run -e bench -- train_step.py [--rounds 14] [--json FILE] [--short] [--only miss,lora] [--dropout 0.1]
                                      [--dtype float32] [--cpu-time]

The floor is the frozen base with gradients of its inputs only: what no adapter can go below. All runs share one process
and one copy of the base's weights (bfloat16 where the processor has instructions for it). The runs take turns, each
once a round, in an order that rotates.

Time: forward, loss and backward, as the median of the per-round ratios to the floor and as the ratio of the two
shortest times; `+ AdamW` is the median with the step of a fused AdamW.

Memory above the floor's, of forward and backward: `saved` is what lives from the one to the other, by unique storages;
`peak` is the most that is alive at once, counted from every allocation that torch reports; `RSS` is the peak resident
memory of a process of its own (median of three), which also sees what the allocator cannot give back.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import math
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from figures import Figure
from runs import FLOOR, Run, copy_of, in_turn, median_ratio, ours, theirs
from torch import nn

import peft_core as pc
from peft_core.dtypes import dtype_of, name_of
from peft_core.models import fast_dtype, load_base

R = 16
# Label, method, options: of ours, where they are installed.
OURS: list[tuple[str, str, dict[str, Any]]] = [
    ("miss", "miss", {"r": R}),
    ("miss contiguous", "miss", {"r": R, "layout": "contiguous"}),
    ("miss expand", "miss", {"r": R, "variant": "expand"}),
    ("lora", "lora", {"r": R, "alpha": R}),
    ("mos", "mos", {"r": R, "equivalent_rank": 2}),
    ("sharelora", "sharelora", {"r": R, "alpha": R}),
    ("switchlora", "switchlora", {"r": R}),
]
# Label → their configuration's class and whether it keeps float32 parameters, its default.
THEIRS: dict[str, tuple[str, bool]] = {
    "peft MiSS": ("MissConfig", True),
    "peft MiSS bf16": ("MissConfig", False),
    "peft LoRA": ("LoraConfig", True),
    "peft LoRA bf16": ("LoraConfig", False),
}
# Of ours: the limit of its time against the floor, and of its memory above it against theirs.
TARGETS: dict[str, tuple[float, float, str]] = {
    "miss": (1.10, 0.20, "peft MiSS"),
    "lora": (1.15, 0.35, "peft LoRA"),
    "mos": (1.15, 0.35, "peft LoRA"),
    "sharelora": (1.15, 0.35, "peft LoRA"),
}
# What has a target, and what it is compared with.
JUDGED = {FLOOR, *TARGETS, *(against for _, _, against in TARGETS.values())}
MEMORY = ("saved", "peak", "RSS")


def base_model(dtype: torch.dtype) -> nn.Module:
    """SmolLM2-135M, frozen, in training mode."""
    model: nn.Module = load_base("smollm2-135m", dtype=dtype)[0]
    return model.requires_grad_(False).train()


def saved_bytes(run: Run, ids: torch.Tensor) -> int:
    """Bytes that live from forward to backward, by unique storages, without the model's own tensors."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*run.model.parameters(), *run.model.buffers())}
    held: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run.forward(ids)
    del loss
    return sum(held.values())


def peak_bytes(run: Run, ids: torch.Tensor) -> int:
    """The most that is alive at once of what forward and backward allocate."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run.backward(ids)
    run.forget()
    alive = most = 0
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            most = max(most, alive)
    return most


def resident_bytes(label: str, arguments: argparse.Namespace, times: int = 3) -> int:
    """Peak resident memory of a process that takes this run's forward and backward three times."""
    command = [sys.executable, __file__, "--rss-of", label]
    command += ["--batch", str(arguments.batch), "--length", str(arguments.length), "--dropout", str(arguments.dropout)]
    command += ["--dtype", name_of(arguments.dtype)]
    found = [subprocess.run(command, capture_output=True, check=True, text=True) for _ in range(times)]
    return sorted(int(done.stdout.split()[-1]) for done in found)[times // 2]


def makers(base: nn.Module, dropout: float = 0.0) -> dict[str, Callable[[], Run]]:
    """Label → what builds the run, the floor first."""
    made: dict[str, Callable[[], Run]] = {FLOOR: lambda: Run(copy_of(base))}
    for label, method, options in OURS:
        info = pc.methods().get(method)
        if info and (not dropout or info.can(info.options(**options)).dropout):
            spec = pc.AdapterSpec(method=method, options=options, dropout=dropout)
            made[label] = functools.partial(ours, base, spec, fused=True)
    for label, (kind, wide) in THEIRS.items():
        made[label] = functools.partial(theirs, base, kind, R, wide, dropout, fused=True)
    return made


def measure(
    runs: dict[str, Run], ids: torch.Tensor, rounds: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, list[float]]]]:
    """Label → figure → value, and label → part of the step → its seconds in each round."""
    figures: dict[str, dict[str, float]] = {}
    seconds: dict[str, dict[str, list[float]]] = {label: {"backward": [], "AdamW": []} for label in runs}
    for label, run in runs.items():
        run.step(ids)  # caches, optimizer states
        gc.collect()
        figures[label] = {"saved": saved_bytes(run, ids), "peak": peak_bytes(run, ids)}
        figures[label]["parameters"] = sum(parameter.numel() for parameter in run.parameters)
        run.step(ids)
    for number in range(rounds):
        for label in in_turn(runs, number):
            start = clock()
            runs[label].backward(ids)
            middle = clock()
            runs[label].update()
            seconds[label]["backward"].append(middle - start)
            seconds[label]["AdamW"].append(clock() - middle)
    floor = seconds[FLOOR]["backward"]
    for label, found in figures.items():
        own = seconds[label]["backward"]
        whole = [sum(parts) for parts in zip(*seconds[label].values(), strict=True)]
        found["median ratio"] = median_ratio(own, floor)
        found["ratio of minima"] = min(own) / min(floor)
        found["with AdamW"] = median_ratio(whole, floor)
    return figures, seconds


def token_ids(base: nn.Module, batch: int, length: int) -> torch.Tensor:
    """Random tokens [batch, length]."""
    vocabulary = base.get_input_embeddings().num_embeddings  # type: ignore[operator]
    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))


def short() -> list[Figure]:
    """Five rounds of what has a target, and of what it is compared with."""
    warnings.filterwarnings("ignore")
    base = base_model(fast_dtype())
    ids = token_ids(base, 4, 256)
    found, _ = measure({label: make() for label, make in makers(base).items() if label in JUDGED}, ids, rounds=5)
    out = []
    for label, run in found.items():
        if label == FLOOR:
            continue
        limit, share, against = TARGETS.get(label, (None, None, ""))
        out.append(Figure(f"training step, {label}", run["median ratio"], limit))
        if against in found:
            above = (figures["saved"] - found[FLOOR]["saved"] for figures in (run, found[against]))
            out.append(Figure(f"memory above the floor, {label}", next(above) / next(above), share, f"× {against}"))
    return out


def show(figures: dict[str, dict[str, float]], floor: list[float], arguments: argparse.Namespace) -> None:
    """Print the table, and the targets beside their figures. `floor`: its seconds in each round."""
    how = "processor time of one thread" if arguments.cpu_time else f"{torch.get_num_threads()} threads"
    print(
        f"SmolLM2-135M {name_of(arguments.dtype)}, {arguments.batch} × {arguments.length} tokens, dropout {arguments.dropout}, "
        f"{arguments.rounds} rounds, {how}; "
        f"floor: median {statistics.median(floor):.3f} s, shortest {min(floor):.3f} s, "
        f"peak {figures[FLOOR]['peak'] / 1e6:.0f} MB"
    )
    print(f"{'':16} {'parameters':>10} {'median':>7} {'minima':>7} {'+ AdamW':>7} {'saved':>9} {'peak':>9} {'RSS':>9}")
    for label, found in figures.items():
        memory = [f"{found[f'{what} above floor'] / 1e6:6.1f} MB" if what in found else f"{'–':>9}" for what in MEMORY]
        print(
            f"{label:16} {found['parameters']:10,.0f} {found['median ratio']:7.3f} {found['ratio of minima']:7.3f} "
            f"{found['with AdamW']:7.3f} {' '.join(memory)}"
        )
    for label, (limit, memory, against) in TARGETS.items():
        if label in figures and not arguments.dropout:
            line = f"{label}: time {figures[label]['median ratio']:.3f} (target ≤ {limit})"
            if against in figures:
                above = [f"{what} above floor" for what in MEMORY if what in figures[label]]
                shares = [f"{name} {figures[label][name] / (figures[against][name] or math.nan):.2f}" for name in above]
                line += f"; against {against}: {', '.join(shares)} (target ≤ {memory})"
            print(line)


def main() -> None:
    """Print the table; the figures go to --json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=14, help="rounds in which every run takes a step (14)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--short", action="store_true", help="2 rounds of 1 × 64 tokens: does it run?")
    parser.add_argument("--batch", type=int, default=4, help="sequences (4)")
    parser.add_argument("--length", type=int, default=256, help="tokens in each (256)")
    parser.add_argument("--dropout", type=float, default=0.0, help="of the adapters' inputs (0)")
    parser.add_argument("--dtype", type=dtype_of, default=fast_dtype(), help="of the base (the processor's fast one)")
    parser.add_argument("--only", default="", help="labels of the runs beside the floor, separated by commas")
    parser.add_argument("--rss", action="store_true", help="measure RSS, too, of the runs that have a target")
    parser.add_argument("--rss-of", help=argparse.SUPPRESS)
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="one thread, its processor time: for a machine that does other work",
    )
    arguments = parser.parse_args()
    if arguments.short:
        arguments.rounds, arguments.batch, arguments.length = 2, 1, 64
    warnings.filterwarnings("ignore")
    clock: Callable[[], float] = time.perf_counter
    if arguments.cpu_time:
        torch.set_num_threads(1)
        clock = time.process_time

    base = base_model(arguments.dtype)
    ids = token_ids(base, arguments.batch, arguments.length)
    makes = makers(base, arguments.dropout)
    if arguments.rss_of:
        import peft  # noqa: F401  so that every run has loaded it

        run = makes[arguments.rss_of]()
        for _ in range(3):
            run.backward(ids)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return
    wanted = [label for label in arguments.only.split(",") if label]
    runs = {label: make() for label, make in makes.items() if not wanted or label in [FLOOR, *wanted]}
    figures, seconds = measure(runs, ids, arguments.rounds, clock)
    if arguments.rss:
        for label in JUDGED & runs.keys():
            figures[label]["RSS"] = resident_bytes(label, arguments)

    for found in figures.values():
        for what in MEMORY:
            if what in found:
                found[f"{what} above floor"] = found[what] - figures[FLOOR][what]
    show(figures, seconds[FLOOR]["backward"], arguments)
    if arguments.json:
        settings = {name: str(value) for name, value in vars(arguments).items()}
        arguments.json.write_text(json.dumps({"settings": settings, "figures": figures, "seconds": seconds}, indent=2))


if __name__ == "__main__":
    main()
