"""SwitchLoRA's whole step against full-rank training."""

from __future__ import annotations

import copy
import statistics

import torch
from gpu_parts.bench import Bench
from gpu_parts.models import Run, base_model, ours, tokens


def switchlora(bench: Bench) -> None:
    """SwitchLoRA's whole step, optimizer included, against full-rank training with AdamW; both with weights in bf16.

    `held` is what stays between steps (weights, gradients are gone, optimizer state, candidates), `peak` what a step adds.
    """
    name, r, length = ("tiny", 8, 16) if bench.tiny else ("1.3B", 512, 512)
    if bench.late("switchlora"):
        return
    found = bench.found.setdefault("switchlora", {})
    base = base_model(name, bench.device)
    ids = tokens(base, 2 if bench.tiny else 8, length, bench)

    def full() -> Run:
        model = copy.deepcopy(base).requires_grad_(True)
        parameters = list(model.parameters())
        return Run(model, parameters, torch.optim.AdamW(parameters, lr=1e-4))

    runs: dict[str, Run] = {}
    sizes: dict[str, dict[str, int]] = {}
    for label, make in {"full-rank AdamW": full, f"switchlora r {r}": lambda: ours(base, "switchlora", r)}.items():
        before = bench.held()
        try:
            run = make()
            run.step(ids)
            run.step(ids)
            peak = bench.peak(lambda run=run: run.step(ids))
        except Exception as error:
            bench.failed(f"switchlora: {label}", error)
            continue
        runs[label] = run
        parameters = sum(parameter.numel() for parameter in run.parameters)
        sizes[label] = {"held": bench.held() - before, "peak": peak, "parameters": parameters}
    seconds: dict[str, list[float]] = {label: [] for label in runs}
    for _ in range(bench.rounds):
        for label, run in runs.items():
            seconds[label].append(bench.seconds(lambda run=run: run.step(ids)))
    found |= {label: {**sizes[label], "seconds": statistics.median(seconds[label])} for label in runs}
