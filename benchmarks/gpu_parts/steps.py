"""Training steps against the floor: the frozen base with gradients of its inputs only."""

from __future__ import annotations

import gc
import importlib.util
import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from gpu_parts.bench import Bench
from gpu_parts.models import METHODS, base_model, tokens, with_method
from runs import Run, copy_of, theirs
from torch import Tensor, nn

T = TypeVar("T")

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
    """In the order of importance: those with targets first, compiled ones, which take longest to prepare, last; those of one
    model side by side, so that it is built once for them.
    """
    models, lengths = (("tiny",), (16,)) if tiny else (("8B", "3B"), (1024, 4096))
    extras = itertools.product((False, True), (False, True), models, lengths)
    return [Setting(model, length, checkpointing, compile) for compile, checkpointing, model, length in extras]


def makers(setting: Setting, tiny: bool) -> dict[str, Callable[[nn.Module], Run]]:
    """Label → what builds the run, in the order of importance."""
    made: dict[str, Callable[[nn.Module], Run]] = {}
    last: dict[str, Callable[[nn.Module], Run]] = {}
    ranks = (2,) if tiny else RANKS
    every = tiny or setting == Setting("3B", 1024, False, False)
    thorough = tiny or setting == Setting("8B", 1024, False, False)
    for r in ranks:
        first = r == ranks[0]
        if importlib.util.find_spec("peft"):
            for kind in ("Lora", "Miss"):
                made[f"peft {kind} r {r}"] = partial(theirs, kind=f"{kind}Config", r=r)
            if thorough and first:
                last[f"peft Lora r {r}, 16 bits"] = partial(theirs, kind="LoraConfig", r=r, wide=False)
        for method in METHODS:
            make = partial(with_method, method=method, r=r)
            if method != LARGE_STATE:
                made[f"{method} r {r}"] = make
            elif every and first:
                last[f"{method} r {r}"] = make
            if thorough and first and method in FUSED:
                last[f"{method} r {r}{IN_TORCH}"] = partial(make, kernels="torch")
    return {**made, **last}


def prepared(run: Run, setting: Setting, bench: Bench) -> Run:
    """With checkpointing and compilation as the setting wants them."""
    if setting.checkpointing:
        model: Any = run.model
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if setting.compile:
        run.compiled = torch.compile(run.model, backend=bench.backend)
    return run


def compared(run: Run, floor: Run, ids: Tensor, bench: Bench) -> dict[str, Any]:
    """Wall time and memory of a run's forward, loss and backward against the floor's; they take turns.

    `host_seconds` is the host's part of the step, its waits for a full queue of launches included.
    """
    memory = {}
    for name, one in (("floor", floor), ("run", run)):
        memory[name] = bench.peak(lambda one=one: one.backward(ids))
        one.forget()
    gc.collect()
    gc.disable()
    try:
        turns = _turns(run, floor, ids, bench.clocked, bench.rounds)
    finally:
        gc.enable()
    return {
        "ratio": statistics.median(own / least for (_, own), (_, least) in turns),
        "seconds": statistics.median(own for (_, own), _ in turns),
        "host_seconds": statistics.median(host for (host, _), _ in turns),
        "peak_above_floor": memory["run"] - memory["floor"],
        "parameters": sum(parameter.numel() for parameter in run.parameters),
    }


def profiled(run: Run, floor: Run, ids: Tensor, bench: Bench) -> dict[str, Any]:
    """The device's time of a run's forward, loss and backward against the floor's: the sum over all kernels, without the gaps
    between them. `where`: the longest of them.
    """
    turns = _turns(run, floor, ids, bench.profiled, min(bench.rounds, 3))
    sums = [(sum(own.values()), sum(least.values())) for own, least in turns]
    return {
        "device_ratio": statistics.median(own / least for own, least in sums),
        "device_seconds": statistics.median(own for own, _ in sums),
        "where": dict(itertools.islice(turns[-1][0].items(), 12)),
    }


def _turns(
    run: Run, floor: Run, ids: Tensor, measure: Callable[[Callable[[], Any]], T], rounds: int
) -> list[tuple[T, T]]:
    """(the run's figure, the floor's) of each round."""
    found = []
    for index in range(rounds):
        figures = {}
        for one in (floor, run) if index % 2 else (run, floor):
            figures[id(one)] = measure(lambda one=one: one.backward(ids))  # type: ignore[misc]
            one.forget()
        found.append((figures[id(run)], figures[id(floor)]))
    return found


def steps(bench: Bench) -> None:
    """Time and memory: setting → label → figures."""
    if not importlib.util.find_spec("peft"):
        bench.left_out.append("steps: the PEFT library is not installed")
    _each(bench, "steps", compared, lambda setting, label: True)


def profile(bench: Bench) -> None:
    """The device's time of what `steps` has measured. After all other parts, since a profiler goes on to slow the host down."""
    measured = bench.found.get("steps", {})
    _each(bench, "profile", profiled, lambda setting, label: label in measured.get(setting, {}))


def _each(
    bench: Bench,
    part: str,
    measure: Callable[[Run, Run, Tensor, Bench], dict[str, Any]],
    wanted: Callable[[str, str], bool],
) -> None:
    """Measure every run that is wanted beside its floor: setting → label → figures. What is late, or fails, is noted."""
    found = bench.found.setdefault(part, {})
    base: nn.Module | None = None
    floor: Run | None = None
    run: Run | None = None
    standing = ""
    for setting in settings(bench.tiny):
        labels = {
            label: make
            for label, make in makers(setting, bench.tiny).items()
            if bench.labels.search(label) and wanted(str(setting), label)
        }
        if not labels or not bench.settings.search(str(setting)) or bench.late(f"{part} {setting}"):
            continue
        try:
            if setting.model != standing:
                base, floor, standing = None, None, ""
                torch._dynamo.reset()
                bench.free()
                base, standing = base_model(setting.model, bench.device), setting.model
            assert base is not None
            ids = tokens(base, 1, setting.length, bench)
            floor = prepared(Run(copy_of(base)), setting, bench)
        except Exception as error:
            bench.failed(f"{part} {setting}", error)
            continue
        for label, make in labels.items():
            what = f"{part} {setting}: {label}"
            if bench.late(what, COMPILING * (setting.compile and not bench.tiny)):
                continue
            try:
                run = prepared(make(base), setting, bench)
                for one in (floor, run):
                    one.step(ids)  # caches, compilation
                    one.step(ids)
                found.setdefault(str(setting), {})[label] = measure(run, floor, ids, bench)
            except Exception as error:
                bench.failed(what, error)
            run = None
            bench.free()
            bench.keep()
