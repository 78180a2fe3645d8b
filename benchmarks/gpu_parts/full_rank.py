"""SwitchLoRA's whole step against full-rank training."""

from __future__ import annotations

import copy
import statistics

import torch
from gpu_parts.bench import Bench
from gpu_parts.models import base_model, tokens, with_method
from runs import Run
from torch import nn

NOT_LINEAR = ("embed_tokens", "input_layernorm", "post_attention_layernorm", "norm", "lm_head")


def full(base: nn.Module) -> Run:
    """All of it trained with AdamW."""
    model = copy.deepcopy(base).requires_grad_(True)
    parameters = list(model.parameters())
    return Run(model, parameters, torch.optim.AdamW(parameters, lr=1e-4))


def switched(base: nn.Module, r: int) -> Run:
    """SwitchLoRA on the linear layers, all else trained in full, in the base's dtype as there."""
    return with_method(base, "switchlora", r, train_modules=NOT_LINEAR, dtype="bfloat16")


def switchlora(bench: Bench) -> None:
    """SwitchLoRA's whole step, optimizer included, against full-rank training with AdamW; all that is trained is in bf16.

    `held` is what stays between steps (weights, gradients are gone, optimizer state, candidates), `peak` what a step adds.
    """
    name, r, length = ("tiny", 8, 16) if bench.tiny else ("1.3B", 512, 512)
    if bench.late("switchlora"):
        return
    found = bench.found.setdefault("switchlora", {})
    base = base_model(name, bench.device)
    ids = tokens(base, 2 if bench.tiny else 8, length, bench)
    makers = {"full-rank AdamW": lambda: full(base), f"switchlora r {r}": lambda: switched(base, r)}
    runs: dict[str, Run] = {}
    sizes: dict[str, dict[str, int]] = {}
    for label, make in makers.items():
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
