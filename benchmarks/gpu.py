"""Kernels, training steps, SwitchLoRA and many adapters on one GPU.

    python benchmarks/gpu.py [--minutes 8] [--parts tests,kernels,steps,switchlora,adapters] [--out FILE]
    python benchmarks/gpu.py --parts steps --settings "8B.*compiled" --add      # more of an earlier run

- tests: the tests of the Triton kernels, on the device instead of in the interpreter.
- kernels: time and bytes a second of each kernel, as a fraction of a device copy measured in the same run, beside the torch
  products that it stands for.
- steps: forward, loss and backward of Llama-3.2-3B's and Llama-3.1-8B's shapes (random weights, bf16), as a ratio to the floor:
  the frozen base with gradients of its inputs only. Each run takes turns with the floor; the median of the ratios counts. The
  second ratio is that of the device's time, its queue filled beforehand: where it is smaller, the host is slower than the
  device. Memory is the peak above the weights, less the floor's.
- switchlora: SwitchLoRA's whole step against full-rank AdamW's, on the paper's 1.3B shapes, weights in bf16.
- adapters: MoS with many adapters resident: bytes of each, and a forward that switches to the next one every time.

Settings are measured in the order of their importance until the minutes are spent. What was not reached, or failed, is listed;
the file is written anew after every figure. With `--device cpu --tiny` everything runs on toy sizes, to see that it does; such
figures mean nothing.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from shapes import LLAMA_1_3B, LLAMA_3_1_8B, LLAMA_3_2_3B
from torch import Tensor, nn

import peft_core as pc
from peft_core import lowrank
from peft_core.errors import first_line
from peft_core.kernels import use_triton

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("tests", "kernels", "steps", "switchlora", "adapters")
TYPES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Options beside r, by r: what MoS composes from must suffice for its rank.
METHODS: dict[str, dict[int, dict[str, Any]]] = {
    "miss": {},
    "sharelora": {},
    "mos": {64: {"equivalent_rank": 4}},
    "switchlora": {},
}
# Attaching it to the 8B shapes draws 44 GB of candidates: measured on the 3B shapes alone, after all the others.
LARGE_STATE = "switchlora"
RANKS = (16, 64)
# Those whose steps run Triton kernels are measured without them, too.
FUSED, IN_TORCH = ("miss", "mos"), ", kernels in torch"
COMPILING = 90.0  # seconds without which no compiled run is begun
# Limits of the ratio to the floor at r 16, 8B, sequence 1024.
TARGETS = {"miss": 1.03, "mos": 1.08, "sharelora": 1.08}
LEAST_BANDWIDTH = 0.80  # of a device copy, for a kernel that moves so much that launching it is not what takes time:
LEAST_BYTES = 2**28
MOST_OVERHEAD, MOST_MEMORY = 0.5, 0.35  # of that library's LoRA

SHAPES: dict[str, dict[str, Any]] = {
    "8B": LLAMA_3_1_8B,
    "3B": LLAMA_3_2_3B,
    "1.3B": LLAMA_1_3B,
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
    },
}


@dataclass
class Bench:
    """What all parts share: where, how large, until when.

    Attributes:
        out: where the figures go. settings, labels: of training steps, those wanted.
        found: part → its figures. left_out: what was not measured, and why.
    """

    device: torch.device
    tiny: bool
    rounds: int
    backend: str
    deadline: float
    out: Path
    settings: re.Pattern[str] = re.compile("")
    labels: re.Pattern[str] = re.compile("")
    found: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def late(self, what: str, needs: float = 0.0) -> bool:
        """Whether there are not as many seconds left as this needs; it is then noted."""
        if time.monotonic() + needs < self.deadline:
            return False
        self.left_out.append(f"{what}: out of time")
        return True

    def failed(self, what: str, error: Exception) -> None:
        """Note what went wrong, and go on."""
        self.left_out.append(f"{what}: {type(error).__name__}: {first_line(error)}")

    def asked(self, what: str, parts: Sequence[str]) -> bool:
        """Whether this run tries again what an earlier one left out."""
        if not any(what.startswith(part.removesuffix("s")) for part in parts):
            return False
        setting, _, rest = what.removeprefix("steps ").partition(": ")
        wanted = self.settings.search(setting) and self.labels.search(rest.partition(": ")[0])
        return not what.startswith("steps ") or bool(wanted)

    def keep(self) -> None:
        """Write what was found so far."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.out.with_suffix(".unfinished")
        unfinished.write_text(json.dumps({**self.found, "left_out": self.left_out}, indent=2) + "\n")
        os.replace(unfinished, self.out)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, function: Callable[[], Any]) -> float:
        """Wall time of one call, the device's work included."""
        self.synchronize()
        start = time.perf_counter()
        function()
        self.synchronize()
        return time.perf_counter() - start

    def queued(self, function: Callable[[], Any], calls: int = 1) -> float:
        """The device's seconds for a call: it starts late, so that launches wait in its queue and not it for the host. An upper
        bound for what takes more launches than the queue holds (about a thousand).
        """
        if self.device.type != "cuda":
            return self.seconds(lambda: [function() for _ in range(calls)]) / calls
        self.synchronize()
        torch.cuda._sleep(10**9)  # cycles: half a second
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()  # type: ignore[no-untyped-call]
        for _ in range(calls):
            function()
        stop.record()  # type: ignore[no-untyped-call]
        self.synchronize()
        return start.elapsed_time(stop) / 1e3 / calls

    def per_call(self, function: Callable[[], Any], calls: int, rounds: int = 5) -> float:
        """The device's seconds for a call: the median of some rounds of calls."""
        function()
        return statistics.median(self.queued(function, calls) for _ in range(rounds))

    def held(self) -> int:
        """Bytes in use; 0 where the device does not tell."""
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def peak(self, function: Callable[[], Any]) -> int:
        """Bytes at the highest point of a call above what was there before it; 0 where the device does not tell."""
        if self.device.type != "cuda":
            function()
            return 0
        self.synchronize()
        before = self.held()
        torch.cuda.reset_peak_memory_stats(self.device)
        function()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before

    def free(self) -> None:
        """Give memory back that nobody holds."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


# Kernels


@dataclass
class Case:
    """A kernel at one shape: what it moves, how it is called.

    Attributes:
        streams: whether that is more than the caches hold, so that a copy's rate is its limit.
    """

    name: str
    nbytes: int
    call: Callable[[], Any]
    streams: bool = True


def kernel_cases(device: torch.device, tiny: bool) -> Iterator[Case]:
    """Every kernel and its torch composition, on a layer of the 8B shapes, 65536 tokens."""
    from peft_method_miss.kernels import Shards
    from peft_method_mos.kernels import gather_factors, gather_group
    from peft_method_switchlora.kernels import switch_update_

    tokens, width, out = (8, 64, 96) if tiny else (65536, 4096, 14336)
    x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
    for r in (4,) if tiny else (16, 64):
        for layout in (True, False):
            shards = Shards(width, r, layout)
            S = torch.randn(tokens, r, device=device, dtype=torch.bfloat16)
            name = f"r {r} {'interleaved' if layout else 'contiguous'}"
            yield Case(f"miss shard_sum {name}", 2 * x.numel(), lambda shards=shards: shards.sum(x))
            yield Case(
                f"miss shard_expand_add_ {name}",
                4 * x.numel(),
                lambda shards=shards, S=S: shards.expand_add_(S, x, 1e-6),
            )
            if use_triton(x):
                drop = (0.1, 2**40)
                call = lambda shards=shards, drop=drop: shards.sum(x, drop)  # noqa: E731
                yield Case(f"miss shard_sum {name} dropout", 2 * x.numel(), call)
        A, B = (torch.randn(*size, device=device, dtype=torch.bfloat16) for size in ((r, width), (width, r)))
        yield Case(
            f"core lowrank.add_ r {r}", 6 * x.numel(), lambda A=A, B=B: lowrank.add_(x, torch.empty_like(x), A, B, 1e-6)
        )
    sites, r, pieces = (2, 2, 2) if tiny else (32, 16, 4)
    shards_of = sites * 2 * pieces
    pools = {
        "pool_A": torch.randn(shards_of, width // pieces, device=device),
        "pool_B": torch.randn(shards_of, out // pieces, device=device),
    }
    bindings = [
        {"index": torch.randint(shards_of, (2, r, pieces), device=device, dtype=torch.int32)} for _ in range(sites)
    ]
    one = r * (width + out)
    for name, of_sites, call in (
        ("one site", 1, lambda: gather_factors(pools, bindings[0], torch.bfloat16)),
        (f"{sites} sites", sites, lambda: gather_group(pools, bindings, torch.bfloat16)),
    ):
        yield Case(f"mos gather_factors, {name}", 6 * one * of_sites, call, streams=False)
    leaves = [pool.requires_grad_() for pool in pools.values()]
    given = torch.ones(sites, r, width, device=device), torch.ones(sites, out, r, device=device)
    given = tuple(one.bfloat16() for one in given)

    @torch.enable_grad()
    def gather_and_back() -> Any:
        return torch.autograd.grad(gather_group(pools, bindings, torch.bfloat16), leaves, given)

    moved = (6 + 2) * one * sites + 4 * sum(pool.numel() for pool in leaves)
    yield Case(f"mos gather_factors and gradient, {sites} sites", moved, gather_and_back, streams=False)
    for dtype, count in itertools.product((torch.float32, torch.bfloat16), (6, 26)):
        weight = torch.randn(out, width, device=device).to(dtype)
        columns, rows = torch.randn(out, count, device=device), torch.randn(count, width, device=device)
        yield Case(
            f"switchlora switch_update_ {str(dtype)[6:]}, {count} vectors",
            2 * weight.numel() * weight.itemsize,
            lambda weight=weight, columns=columns, rows=rows: switch_update_(weight, columns, rows, 1e-6),
        )


def copy_rate(bench: Bench) -> float:
    """Bytes a second of a device copy, read and written."""
    source = torch.empty(2**10 if bench.tiny else 2**30, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    return 2 * source.numel() / bench.per_call(lambda: target.copy_(source), 10)


def product_rate(bench: Bench) -> float:
    """Floating-point operations a second of a square bf16 product."""
    n = 64 if bench.tiny else 8192
    a, b = (torch.randn(n, n, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / bench.per_call(lambda: a @ b, 10)


@torch.no_grad()
def kernels(bench: Bench) -> None:
    """Each kernel beside torch's, as a fraction of the copy's rate."""
    rate = copy_rate(bench)
    found = bench.found.setdefault("kernels", {})
    found |= {"copy_bytes_per_second": rate, "product_flops": product_rate(bench), "cases": {}}
    calls = 3 if bench.tiny else 20
    for case in kernel_cases(bench.device, bench.tiny):
        if bench.late(f"kernel {case.name}"):
            break
        try:
            seconds = bench.per_call(case.call, calls)
            with pc.kernels("torch"):
                beside = None if "dropout" in case.name else bench.per_call(case.call, calls)
        except Exception as error:
            bench.failed(f"kernel {case.name}", error)
            continue
        found["cases"][case.name] = {
            "seconds": seconds,
            "bytes": case.nbytes,
            "streams": case.streams,
            "fraction_of_copy": case.nbytes / seconds / rate,
            "torch_seconds": beside,
        }
        bench.keep()


# Training steps


@dataclass
class Run:
    """One model that takes training steps."""

    model: nn.Module
    parameters: list[nn.Parameter] = field(default_factory=list)
    optimizer: torch.optim.Optimizer | None = None
    compiled: Any = None
    kernels: str = "auto"

    def backward(self, ids: Tensor) -> None:
        """Forward, loss and backward. Gradients flow to the embedded inputs, through every layer, in every run alike."""
        embedded = self.model.get_input_embeddings()(ids).detach().requires_grad_()  # type: ignore[operator]
        called: Any = self.model if self.compiled is None else self.compiled
        with pc.kernels(self.kernels):
            called(inputs_embeds=embedded, labels=ids, use_cache=False).loss.backward()

    def step(self, ids: Tensor) -> None:
        """A whole training step."""
        self.backward(ids)
        if self.optimizer is not None:
            self.optimizer.step()
        self.forget()

    def forget(self) -> None:
        """No gradients are left."""
        for parameter in self.model.parameters():
            parameter.grad = None


def base_model(name: str, device: torch.device) -> nn.Module:
    """Random weights in bf16, frozen, in training mode."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[name], max_position_embeddings=8192)
    with device:
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.to(device).requires_grad_(False).train()


def copy_of(base: nn.Module) -> nn.Module:
    """A model of its own on the same weights."""
    shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    return copy.deepcopy(base, shared)


def ours(base: nn.Module, method: str, r: int, kernels: str = "auto") -> Run:
    """A run of one of our methods."""
    spec = pc.AdapterSpec(method=method, targets=TYPES, options={"r": r, **METHODS[method].get(r, {})})
    model = copy.deepcopy(base) if spec.capabilities.owns_base_weight else copy_of(base)
    adapter = pc.attach(model, spec, keep="none")
    adapter.total_steps = 1000
    make = spec.info.optimizer
    parameters = list(adapter.parameters())
    optimizer = make(parameters, lr=1e-4) if make else torch.optim.AdamW(parameters, lr=1e-4)
    return Run(model, parameters, optimizer, kernels=kernels)


def theirs(base: nn.Module, kind: str, r: int, wide: bool = True) -> Run:
    """A run of the PEFT library. `wide`: with float32 parameters, its default, through which all that they meet is cast."""
    import peft

    settings = {"lora_alpha": r} if kind == "LoraConfig" else {}
    config = getattr(peft, kind)(r=r, target_modules=TYPES, **settings)
    model = peft.get_peft_model(copy_of(base), config, autocast_adapter_dtype=wide).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Run(model, parameters, torch.optim.AdamW(parameters, lr=1e-4))


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


def tokens(model: nn.Module, rows: int, length: int, bench: Bench) -> Tensor:
    """Random token ids."""
    return torch.randint(0, model.config.vocab_size, (rows, length), device=bench.device)  # type: ignore[union-attr]


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


# Report


def verdicts(found: dict[str, Any]) -> list[str]:
    """Every target beside its figure."""
    lines = []
    if "tests" in found:
        lines.append(f"tests of the kernels: {_met(found['tests']['exit'] == 0)}")
    for name, case in found.get("kernels", {}).get("cases", {}).items():
        if name.split()[0] != "core" and "dropout" not in name and case["streams"] and case["bytes"] >= LEAST_BYTES:
            share = case["fraction_of_copy"]
            lines.append(
                f"{name}: {share:.2f} of the copy's rate (target ≥ {LEAST_BANDWIDTH}) {_met(share >= LEAST_BANDWIDTH)}"
            )
    figures = found.get("steps", {}).get(str(Setting("8B", 1024, False, False)), {})
    lora = figures.get("peft Lora r 16")
    for method, limit in TARGETS.items():
        own = figures.get(f"{method} r 16")
        if own is None:
            continue
        lines.append(
            f"{method}: {own['ratio']:.3f} of the floor (target ≤ {limit}) {_met(own['ratio'] <= limit)}; "
            f"of the device's time {own['device_ratio']:.3f}"
        )
        if lora is not None:
            overhead = (own["ratio"] - 1) / (lora["ratio"] - 1) if lora["ratio"] > 1 else float("inf")
            memory = (
                own["peak_above_floor"] / lora["peak_above_floor"] if lora["peak_above_floor"] > 0 else float("inf")
            )
            lines.append(
                f"{method} against peft's LoRA: overhead {overhead:.2f} (target ≤ {MOST_OVERHEAD}) "
                f"{_met(overhead <= MOST_OVERHEAD)}, memory {memory:.2f} (target ≤ {MOST_MEMORY}) {_met(memory <= MOST_MEMORY)}"
            )
    return lines


def _met(met: bool) -> str:
    return "met" if met else "MISSED"


def report(found: dict[str, Any]) -> str:
    """The tables, for people."""
    where = found["environment"]
    lines = [
        f"{where['device']}; torch {where['torch']}, CUDA {where['cuda']}, Triton {where['triton']}, peft {where['peft']}"
    ]
    kernels_found = found.get("kernels", {})
    if kernels_found:
        lines.append(
            f"\ncopy {kernels_found['copy_bytes_per_second'] / 1e9:.1f} GB/s, "
            f"bf16 product {kernels_found['product_flops'] / 1e12:.2f} Tflop/s"
        )
        lines.append(f"{'kernel':48} {'µs':>9} {'of copy':>8} {'torch µs':>9}")
        for name, case in kernels_found["cases"].items():
            beside = f"{case['torch_seconds'] * 1e6:9.1f}" if case["torch_seconds"] else f"{'–':>9}"
            lines.append(f"{name:48} {case['seconds'] * 1e6:9.1f} {case['fraction_of_copy']:8.2f} {beside}")
    for setting, runs in found.get("steps", {}).items():
        lines.append(f"\n{setting:40} {'ratio':>7} {'device':>7} {'ms':>9} {'above floor':>12} {'parameters':>12}")
        for label, own in runs.items():
            times = f"{own['ratio']:7.3f} {own['device_ratio']:7.3f} {own['seconds'] * 1e3:9.1f}"
            lines.append(f"{label:40} {times} {own['peak_above_floor'] / 1e6:9.0f} MB {own['parameters']:12,}")
    for label, own in found.get("switchlora", {}).items():
        lines.append(
            f"{label}: step {own['seconds'] * 1e3:.1f} ms, {own['held'] / 1e9:.2f} GB held, "
            f"{own['peak'] / 1e9:.2f} GB more in a step"
        )
    many = found.get("adapters")
    if many:
        lines.append(
            f"MoS: {many['resident']} adapters resident, {many['bytes_per_adapter'] / 1e6:.2f} MB each; forward "
            f"{many['base_forward_seconds'] * 1e3:.1f} ms without, "
            f"{(many['switched_forward_seconds'] or 0) * 1e3:.1f} ms with another one every time"
        )
    if "tests" in found:
        lines.append("\ntests: " + (found["tests"]["last_lines"] or ["nothing was printed"])[-1])
    lines += ["", *verdicts(found)]
    if found.get("left_out"):
        lines += ["", "not measured:", *(f"  {what}" for what in found["left_out"])]
    return "\n".join(lines)


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
    parser.add_argument("--settings", type=re.compile, default="", help="of steps: those that this expression finds")
    parser.add_argument("--labels", type=re.compile, default="", help="of steps: likewise, the methods")
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
    if device.type == "cuda":
        torch.cuda.set_device(device)
    warnings.filterwarnings("ignore")
    limits = torch._dynamo.config  # many models, one code
    limits.recompile_limit = limits.accumulated_recompile_limit = 1000
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
    functions: dict[str, Callable[[], Any]] = {
        "tests": lambda: tests(bench),
        "kernels": lambda: kernels(bench),
        "steps": lambda: steps(bench),
        "switchlora": lambda: switchlora(bench),
        "adapters": lambda: adapters(bench, arguments.adapters),
    }
    whole = bench.deadline
    for part in [part for part in PARTS if part in parts]:
        # Steps have by far the most to measure; they leave a fifth of the time to what follows them.
        bench.deadline = whole - 12 * arguments.minutes if part == "steps" else whole
        try:
            functions[part]()
        except Exception as error:
            bench.failed(part, error)
        bench.free()
        bench.keep()
    print(report({**bench.found, "left_out": bench.left_out}))
    print(f"\nfigures: {bench.out}")


if __name__ == "__main__":
    main()
