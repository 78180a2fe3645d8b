"""Training steps against the floor: the frozen base with gradients of its inputs only."""

from __future__ import annotations

import gc
import importlib.util
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gpu_parts.bench import Bench
from gpu_parts.models import METHODS, Run, base_model, copy_of, ours, theirs, tokens
from torch import Tensor, nn

# Attaching it to the 8B shapes draws 44 GB of candidates: measured on the 3B shapes alone, after all the others.
LARGE_STATE = "switchlora"
RANKS = (16, 64)
# Those whose steps run Triton kernels are measured without them, too.
FUSED, IN_TORCH = ("miss", "mos"), ", kernels in torch"
COMPILING = 90.0  # seconds without which no compiled run is begun
# Limits of the ratio to the floor at r 16, 8B, sequence 1024.
TARGETS = {"miss": 1.03, "mos": 1.08, "sharelora": 1.08}


@dataclass(frozen=True)
class Setting:
    """What is measured together, against one floor."""

    model: str
    length: int
    checkpointing: bool
    compile: bool

    def __str__(self) -> str:
        extras = " checkpointing" * self.checkpointing + " compiled" * self.compile
        return f"{self.model} sequence {self.length}{extras}"


def settings(tiny: bool) -> list[Setting]:
    """Those with targets first, compiled ones, which take longest to prepare, last."""
    models, lengths = (("tiny",), (16,)) if tiny else (("8B", "3B"), (1024, 4096))
    plain = [Setting(m, n, checkpointing, False) for m in models for checkpointing in (False, True) for n in lengths]
    return [*plain, *(Setting(m, lengths[0], False, True) for m in models)]


def makers(setting: Setting, tiny: bool) -> dict[str, Callable[[nn.Module], Run]]:
    """Label → what builds the run, in the order of importance."""
    made: dict[str, Callable[[nn.Module], Run]] = {}
    last: dict[str, Callable[[nn.Module], Run]] = {}
    ranks = (2,) if tiny else RANKS
    every = tiny or setting == Setting("3B", 1024, False, False)
    thorough = tiny or setting == Setting("8B", 1024, False, False)
    for r in ranks:
        if importlib.util.find_spec("peft"):
            for kind in ("LoraConfig", "MissConfig"):
                made[f"peft {kind.removesuffix('Config')} r {r}"] = lambda base, kind=kind, r=r: theirs(base, kind, r)
            if thorough and r == ranks[0]:
                last[f"peft Lora r {r}, 16 bits"] = lambda base, r=r: theirs(base, "LoraConfig", r, wide=False)
        for method in METHODS:
            if method == LARGE_STATE and not (every and r == ranks[0]):
                continue
            (last if method == LARGE_STATE else made)[f"{method} r {r}"] = lambda base, method=method, r=r: ours(
                base, method, r
            )
            if thorough and r == ranks[0] and method in FUSED:
                last[f"{method} r {r}{IN_TORCH}"] = lambda base, method=method, r=r: ours(base, method, r, "torch")
    return {**made, **last}


def prepared(run: Run, setting: Setting, bench: Bench) -> Run:
    """With checkpointing and compilation as the setting wants them."""
    if setting.checkpointing:
        enable: Any = (
            getattr(run.model, "activation_checkpointing_enable", None) or run.model.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})
    if setting.compile:
        run.compiled = torch.compile(run.model, backend=bench.backend)
    return run


def compared(run: Run, floor: Run, ids: Tensor, bench: Bench) -> dict[str, float]:
    """Time and memory of a run's forward, loss and backward against the floor's; they take turns."""
    for one in (floor, run):
        one.step(ids)  # caches, compilation
        one.step(ids)
    memory = {}
    for name, one in (("floor", floor), ("run", run)):
        memory[name] = bench.peak(lambda one=one: one.backward(ids))
        one.forget()
    gc.collect()
    gc.disable()
    try:
        walls = _turns(run, floor, ids, bench.seconds, bench.rounds)
        device = _turns(run, floor, ids, bench.queued, min(bench.rounds, 3))
    finally:
        gc.enable()
    return {
        "ratio": statistics.median(own / least for own, least in walls),
        "device_ratio": statistics.median(own / least for own, least in device),
        "seconds": statistics.median(own for own, _ in walls),
        "device_seconds": statistics.median(own for own, _ in device),
        "peak_above_floor": memory["run"] - memory["floor"],
        "parameters": sum(parameter.numel() for parameter in run.parameters),
    }


def _turns(
    run: Run, floor: Run, ids: Tensor, clock: Callable[[Callable[[], Any]], float], rounds: int
) -> list[tuple[float, float]]:
    """(the run's seconds, the floor's) of each round."""
    found = []
    for index in range(rounds):
        seconds = {}
        for one in (floor, run) if index % 2 else (run, floor):
            seconds[id(one)] = clock(lambda one=one: one.backward(ids))
            one.forget()
        found.append((seconds[id(run)], seconds[id(floor)]))
    return found


def hot_spots(run: Run, ids: Tensor, rows: int = 15) -> str:
    """Where a step's time goes: the profiler's table."""
    cuda = ids.is_cuda
    activities = [torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        run.backward(ids)
    run.forget()
    order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    return str(profiler.key_averages().table(sort_by=order, row_limit=rows))


def steps(bench: Bench) -> None:
    """Setting → label → figures."""
    found = bench.found.setdefault("steps", {})
    base: nn.Module | None = None
    floor: Run | None = None
    run: Run | None = None
    standing = ""
    missed: list[tuple[Setting, str]] = []
    if not importlib.util.find_spec("peft"):
        bench.left_out.append("steps: the PEFT library is not installed")
    for setting in settings(bench.tiny):
        if not bench.settings.search(str(setting)) or bench.late(f"steps {setting}"):
            continue
        if setting.model != standing:
            base = floor = None
            torch._dynamo.reset()
            bench.free()
            base, standing = base_model(setting.model, bench.device), setting.model
        assert base is not None
        ids = tokens(base, 1, setting.length, bench)
        figures = found.setdefault(str(setting), {})
        try:
            floor = prepared(Run(copy_of(base)), setting, bench)
        except Exception as error:
            bench.failed(f"steps {setting}", error)
            continue
        for label, make in makers(setting, bench.tiny).items():
            what = f"steps {setting}: {label}"
            if not bench.labels.search(label) or bench.late(what, COMPILING * (setting.compile and not bench.tiny)):
                continue
            try:
                run = prepared(make(base), setting, bench)
                figures[label] = compared(run, floor, ids, bench)
                if figures[label]["ratio"] > TARGETS.get(label.removesuffix(f" r {RANKS[0]}"), float("inf")):
                    missed.append((setting, label))
            except Exception as error:
                bench.failed(what, error)
            run = None
            bench.free()
            bench.keep()
    # Last, since a profiler slows down what comes after it.
    for setting, label in missed:
        if (
            base is not None
            and setting.model == standing
            and not bench.late(f"where the time goes, {setting}: {label}")
        ):
            run = prepared(makers(setting, bench.tiny)[label](base), setting, bench)
            run.step(ids)
            found[str(setting)][label]["where"] = hot_spots(run, tokens(base, 1, setting.length, bench))
            run = None
            bench.free()
