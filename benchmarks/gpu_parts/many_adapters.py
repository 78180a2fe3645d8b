"""Many adapters on one model."""

from __future__ import annotations

import statistics
import time

import torch
from gpu_parts.bench import Bench
from gpu_parts.models import base_model, tokens
from runs import TYPES

import peft_core as pc


@torch.no_grad()
def adapters(bench: Bench, count: int) -> None:
    """MoS with many adapters resident: what each costs, and a forward that switches to another one every time."""
    if bench.late("adapters"):
        return
    name, length = ("tiny", 4) if bench.tiny else ("3B", 16)
    model = base_model(name, bench.device).eval()
    ids = tokens(model, 1, length, bench)
    base = statistics.median(bench.seconds(lambda: model(ids)) for _ in range(5))
    options = {"r": 2 if bench.tiny else 16, "equivalent_rank": 2, "shards": 4}
    spec = pc.AdapterSpec(method="mos", targets=TYPES, options=options, dtype="bfloat16")
    before = bench.held()
    start = time.monotonic()
    resident: list[str] = []
    for number in range(count):
        if bench.late(f"adapters: {count - number} of {count}"):
            break
        resident.append(pc.attach(model, spec, name=f"a{number}", seed=number).name)
    attaching = (time.monotonic() - start) / max(len(resident), 1)
    held = bench.held() - before
    chosen = resident[:: max(len(resident) // 10, 1)]

    def switched(name: str) -> None:
        pc.activate(model, name)
        model(ids)

    for name in chosen[:2]:
        switched(name)
    times = [bench.seconds(lambda name=name: switched(name)) for name in chosen]
    bench.found["adapters"] = {
        "resident": len(resident),
        "bytes_per_adapter": held / max(len(resident), 1),
        "bytes_of_parameters": 2 * pc.plan(model, spec).num_trainable,
        "seconds_to_attach_one": attaching,
        "base_forward_seconds": base,
        "switched_forward_seconds": statistics.median(times) if times else None,
    }
