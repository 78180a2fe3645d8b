"""Kernels, training steps, SwitchLoRA and many adapters on one GPU.

    python benchmarks/gpu.py [--minutes 8] [--parts kernels,steps,switchlora,adapters,tests] [--out FILE]

- tests: the tests of the Triton kernels, on the device instead of in the interpreter.
- kernels: time and bytes a second of each kernel, as a fraction of a device copy measured in the same run, beside the torch
  products that it stands for.
- steps: forward, loss and backward of Llama-3.2-3B's and Llama-3.1-8B's shapes (random weights, bf16), as a ratio to the floor:
  the frozen base with gradients of its inputs only. Each run takes turns with the floor; the median of the ratios counts.
  Memory is the peak above the weights, less the floor's.
- switchlora: SwitchLoRA's whole step against full-rank AdamW's, on the paper's 1.3B shapes.
- adapters: MoS with many adapters resident: bytes of each, and a forward that switches to the next one every time.

Settings are measured in the order of their importance until the minutes are spent; what was not reached is listed. With
`--device cpu --tiny` everything runs on toy sizes, to see that it does; such figures mean nothing.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from shapes import LLAMA_1_3B, LLAMA_3_1_8B, LLAMA_3_2_3B
from torch import Tensor, nn

import peft_core as pc
from peft_core import lowrank
from peft_core.kernels import use_triton

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("kernels", "steps", "switchlora", "adapters", "tests")
TYPES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
METHODS = ("miss", "sharelora", "mos", "switchlora")
# Attaching it to the 8B shapes draws 44 GB of candidates: measured on the 3B shapes alone, after all the others.
LARGE_STATE = "switchlora"
RANKS = (16, 64)
# Limits of the ratio to the floor at r 16, 8B, sequence 1024.
TARGETS = {"miss": 1.03, "mos": 1.08, "sharelora": 1.08}
LEAST_BANDWIDTH = 0.80  # of a device copy, for a kernel that moves so much that launching it is not what takes time:
LEAST_BYTES = 2**25
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
        left_out: what was not measured, and why.
    """

    device: torch.device
    tiny: bool
    rounds: int
    backend: str
    deadline: float
    left_out: list[str] = field(default_factory=list)

    def late(self, what: str) -> bool:
        """Whether there is no time for this any more; it is then noted."""
        if time.monotonic() < self.deadline:
            return False
        self.left_out.append(f"{what}: out of time")
        return True

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

    def per_call(self, function: Callable[[], Any], calls: int) -> float:
        """Median seconds of a call on the device, in a row of calls between two events each."""
        function()
        if self.device.type != "cuda":
            return statistics.median(self.seconds(function) for _ in range(calls))
        torch.cuda._sleep(10**8)  # the device starts when all calls wait in its queue, and never waits for the host
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        for start, stop in pairs:
            start.record()  # type: ignore[no-untyped-call]
            function()
            stop.record()  # type: ignore[no-untyped-call]
        self.synchronize()
        return statistics.median(start.elapsed_time(stop) for start, stop in pairs) / 1e3

    def peak(self, function: Callable[[], Any]) -> int:
        """Bytes at the highest point of a call above what was there before it; 0 where the device does not tell."""
        if self.device.type != "cuda":
            function()
            return 0
        self.synchronize()
        before = torch.cuda.memory_allocated(self.device)
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
    """A kernel at one shape: what it moves, how it is called, and the torch code beside it."""

    name: str
    nbytes: int
    call: Callable[[], Any]


def kernel_cases(device: torch.device, tiny: bool) -> Iterator[Case]:
    """Every kernel and its torch composition, on a layer of the 8B shapes, 16384 tokens."""
    from peft_method_miss.kernels import Shards
    from peft_method_mos.kernels import gather_factors, gather_group
    from peft_method_switchlora.kernels import switch_update_

    tokens, width, out = (8, 64, 96) if tiny else (16384, 4096, 14336)
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
    yield Case("mos gather_factors, one site", 6 * one, lambda: gather_factors(pools, bindings[0], torch.bfloat16))
    yield Case(
        f"mos gather_factors, {sites} sites", 6 * one * sites, lambda: gather_group(pools, bindings, torch.bfloat16)
    )
    leaves = [pool.requires_grad_() for pool in pools.values()]
    given = torch.ones(sites, r, width, device=device), torch.ones(sites, out, r, device=device)
    given = tuple(one.bfloat16() for one in given)

    @torch.enable_grad()
    def gather_and_back() -> Any:
        return torch.autograd.grad(gather_group(pools, bindings, torch.bfloat16), leaves, given)

    moved = (6 + 2) * one * sites + 4 * sum(pool.numel() for pool in leaves)
    yield Case(f"mos gather_factors and gradient, {sites} sites", moved, gather_and_back)
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(out, width, device=device).to(dtype)
        columns, rows = torch.randn(out, 6, device=device), torch.randn(6, width, device=device)
        yield Case(
            f"switchlora switch_update_ {str(dtype)[6:]}",
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
def kernels(bench: Bench) -> dict[str, Any]:
    """Each kernel beside torch's, as a fraction of the copy's rate."""
    rate = copy_rate(bench)
    found: dict[str, Any] = {"copy_bytes_per_second": rate, "product_flops": product_rate(bench), "cases": {}}
    calls = 3 if bench.tiny else 50
    for case in kernel_cases(bench.device, bench.tiny):
        if bench.late(f"kernel {case.name}"):
            break
        seconds = bench.per_call(case.call, calls)
        with pc.kernels("torch"):
            beside = None if "dropout" in case.name else bench.per_call(case.call, calls)
        found["cases"][case.name] = {
            "seconds": seconds,
            "bytes": case.nbytes,
            "fraction_of_copy": case.nbytes / seconds / rate,
            "torch_seconds": beside,
        }
    return found


# Training steps


@dataclass
class Run:
    """One model that takes training steps."""

    model: nn.Module
    parameters: list[nn.Parameter] = field(default_factory=list)
    optimizer: torch.optim.Optimizer | None = None
    compiled: Any = None

    def backward(self, ids: Tensor) -> None:
        """Forward, loss and backward. Gradients flow to the embedded inputs, through every layer, in every run alike."""
        embedded = self.model.get_input_embeddings()(ids).detach().requires_grad_()  # type: ignore[operator]
        called: Any = self.model if self.compiled is None else self.compiled
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


def ours(base: nn.Module, method: str, r: int) -> Run:
    """A run of one of our methods."""
    spec = pc.AdapterSpec(method=method, targets=TYPES, options={"r": r})
    model = copy.deepcopy(base) if spec.capabilities.owns_base_weight else copy_of(base)
    adapter = pc.attach(model, spec, keep="none")
    adapter.total_steps = 1000
    make = spec.info.optimizer
    parameters = list(adapter.parameters())
    return Run(model, parameters, make(parameters, lr=1e-4) if make else torch.optim.AdamW(parameters, lr=1e-4))


def theirs(base: nn.Module, kind: str, r: int) -> Run:
    """A run of the PEFT library."""
    import peft

    settings = {"lora_alpha": r} if kind == "LoraConfig" else {}
    model = peft.get_peft_model(copy_of(base), getattr(peft, kind)(r=r, target_modules=TYPES, **settings)).train()
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
    every = tiny or setting == Setting("3B", 1024, False, False)
    for r in (2,) if tiny else RANKS:
        for kind in ("LoraConfig", "MissConfig"):
            made[f"peft {kind.removesuffix('Config')} r {r}"] = lambda base, kind=kind, r=r: theirs(base, kind, r)
        for method in METHODS:
            if method in pc.methods() and (every or method != LARGE_STATE):
                made[f"{method} r {r}"] = lambda base, method=method, r=r: ours(base, method, r)
    return dict(sorted(made.items(), key=lambda item: LARGE_STATE in item[0]))


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
    ratios, own = [], []
    for index in range(bench.rounds):
        pair = [floor, run] if index % 2 else [run, floor]
        seconds = {}
        for one in pair:
            seconds[id(one)] = bench.seconds(lambda one=one: one.backward(ids))
            one.forget()
        ratios.append(seconds[id(run)] / seconds[id(floor)])
        own.append(seconds[id(run)])
    return {
        "ratio": statistics.median(ratios),
        "seconds": statistics.median(own),
        "peak_above_floor": memory["run"] - memory["floor"],
        "parameters": sum(parameter.numel() for parameter in run.parameters),
    }


def hot_spots(run: Run, ids: Tensor, rows: int = 15) -> str:
    """Where a step's time goes: the profiler's table."""
    cuda = ids.is_cuda
    activities = [torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        run.backward(ids)
    run.forget()
    order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    return str(profiler.key_averages().table(sort_by=order, row_limit=rows))


def steps(bench: Bench) -> dict[str, Any]:
    """Setting → label → figures."""
    found: dict[str, Any] = {}
    base: nn.Module | None = None
    floor: Run | None = None
    run: Run | None = None
    standing = ""
    for setting in settings(bench.tiny):
        if bench.late(f"steps {setting}"):
            continue
        if setting.model != standing:
            base = floor = None
            torch._dynamo.reset()
            bench.free()
            base, standing = base_model(setting.model, bench.device), setting.model
        assert base is not None
        ids = torch.randint(0, base.config.vocab_size, (1, setting.length), device=bench.device)  # type: ignore[union-attr]
        floor = prepared(Run(copy_of(base)), setting, bench)
        figures = found.setdefault(str(setting), {})
        for label, make in makers(setting, bench.tiny).items():
            if bench.late(f"steps {setting}: {label}"):
                continue
            try:
                run = prepared(make(base), setting, bench)
                figures[label] = compared(run, floor, ids, bench)
                limit = TARGETS.get(label.split()[0])
                if limit is not None and figures[label]["ratio"] > limit:
                    figures[label]["where"] = hot_spots(run, ids)
            except (torch.OutOfMemoryError, pc.PeftCoreError) as error:
                bench.left_out.append(f"steps {setting}: {label}: {str(error).splitlines()[0]}")
            run = None
            bench.free()
    return found


def switchlora(bench: Bench) -> dict[str, Any]:
    """SwitchLoRA's whole step, optimizer included, against full-rank training with AdamW."""
    name, r, length = ("tiny", 8, 16) if bench.tiny else ("1.3B", 512, 512)
    if "switchlora" not in pc.methods() or bench.late("switchlora"):
        return {}
    base = base_model(name, bench.device)
    ids = torch.randint(0, base.config.vocab_size, (2 if bench.tiny else 8, length), device=bench.device)  # type: ignore[union-attr]
    full = copy.deepcopy(base).requires_grad_(True)
    parameters = list(full.parameters())
    runs = {
        "full-rank AdamW": Run(full, parameters, torch.optim.AdamW(parameters, lr=1e-4)),
        f"switchlora r {r}": ours(base, "switchlora", r),
    }
    found = {}
    for label, run in runs.items():
        run.step(ids)
        run.step(ids)
        peak = bench.peak(lambda run=run: run.step(ids))
        found[label] = {"peak": peak, "parameters": sum(p.numel() for p in run.parameters), "seconds": []}
    for _ in range(bench.rounds):
        for label, run in runs.items():
            found[label]["seconds"].append(bench.seconds(lambda run=run: run.step(ids)))
    for figures in found.values():
        figures["seconds"] = statistics.median(figures["seconds"])
    return found


@torch.no_grad()
def adapters(bench: Bench, count: int) -> dict[str, Any]:
    """MoS with many adapters resident: what each costs, and a forward that switches to another one every time."""
    if "mos" not in pc.methods() or bench.late("adapters"):
        return {}
    name, tokens = ("tiny", 4) if bench.tiny else ("3B", 16)
    model = base_model(name, bench.device).eval()
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), device=bench.device)  # type: ignore[union-attr]
    base = statistics.median(bench.seconds(lambda: model(ids)) for _ in range(5))
    options = {"r": 2 if bench.tiny else 16, "equivalent_rank": 2, "shards": 4}
    spec = pc.AdapterSpec(method="mos", targets=TYPES, options=options, dtype="bfloat16")
    before = torch.cuda.memory_allocated(bench.device) if bench.device.type == "cuda" else 0
    start = time.monotonic()
    resident: list[str] = []
    for number in range(count):
        if bench.late(f"adapters: {count - number} of {count}"):
            break
        resident.append(pc.attach(model, spec, name=f"a{number}", seed=number).name)
    attaching = (time.monotonic() - start) / max(len(resident), 1)
    held = torch.cuda.memory_allocated(bench.device) - before if bench.device.type == "cuda" else 0
    chosen = resident[:: max(len(resident) // 10, 1)]

    def switched(name: str) -> None:
        pc.activate(model, name)
        model(ids)

    for name in chosen[:2]:
        switched(name)
    times = [bench.seconds(lambda name=name: switched(name)) for name in chosen]
    return {
        "resident": len(resident),
        "bytes_per_adapter": held / max(len(resident), 1),
        "bytes_of_parameters": 2 * pc.plan(model, spec).num_trainable,
        "seconds_to_attach_one": attaching,
        "base_forward_seconds": base,
        "switched_forward_seconds": statistics.median(times) if times else None,
    }


def tests(bench: Bench) -> dict[str, Any]:
    """The tests of the methods' kernels, on this device."""
    paths = sorted(map(str, ROOT.glob("packages/method-*/tests/test_kernels.py")))
    environment = os.environ | {"TRITON_INTERPRET": "0" if bench.device.type == "cuda" else "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return {"exit": done.returncode, "last_lines": done.stdout.strip().splitlines()[-8:]}


# Report


def verdicts(found: dict[str, Any]) -> list[str]:
    """Every target beside its figure."""
    lines = []
    for name, case in found.get("kernels", {}).get("cases", {}).items():
        if name.split()[0] != "core" and "dropout" not in name and case["bytes"] >= LEAST_BYTES:
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
        lines.append(f"{method}: {own['ratio']:.3f} of the floor (target ≤ {limit}) {_met(own['ratio'] <= limit)}")
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
        lines.append(f"\n{setting:48} {'ratio':>7} {'ms':>9} {'above floor':>12} {'parameters':>12}")
        for label, own in runs.items():
            memory = f"{own['peak_above_floor'] / 1e6:9.0f} MB"
            lines.append(f"{label:48} {own['ratio']:7.3f} {own['seconds'] * 1e3:9.1f} {memory} {own['parameters']:12,}")
    for label, own in found.get("switchlora", {}).items():
        lines.append(f"{label}: step {own['seconds'] * 1e3:.1f} ms, peak {own['peak'] / 1e9:.2f} GB")
    many = found.get("adapters")
    if many:
        lines.append(
            f"MoS: {many['resident']} adapters resident, {many['bytes_per_adapter'] / 1e6:.2f} MB each; forward "
            f"{many['base_forward_seconds'] * 1e3:.1f} ms without, "
            f"{(many['switched_forward_seconds'] or 0) * 1e3:.1f} ms with another one every time"
        )
    if "tests" in found:
        lines.append("\ntests: " + found["tests"]["last_lines"][-1])
    lines += ["", *verdicts(found)]
    if found["left_out"]:
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
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"no part {', '.join(unknown)}; there are: {', '.join(PARTS)}")
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA GPU; '--device cpu --tiny' shows whether it runs")
    if device.type != "cuda" and not arguments.tiny:
        raise SystemExit(f"on '{device}' only toy sizes are sensible: add --tiny")
    warnings.filterwarnings("ignore")
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = (
        1000  # many models, one code
    )
    bench = Bench(
        device, arguments.tiny, arguments.rounds, arguments.backend, time.monotonic() + 60 * arguments.minutes
    )
    found: dict[str, Any] = {"environment": environment(device)}
    functions: dict[str, Callable[[], Any]] = {
        "kernels": lambda: kernels(bench),
        "steps": lambda: steps(bench),
        "switchlora": lambda: switchlora(bench),
        "adapters": lambda: adapters(bench, arguments.adapters),
        "tests": lambda: tests(bench),
    }
    whole = bench.deadline
    for part in [part for part in PARTS if part in parts]:
        # Steps have by far the most to measure; they leave a fifth of the time to what follows them.
        bench.deadline = whole - 12 * arguments.minutes if part == "steps" else whole
        found[part] = functions[part]()
        bench.free()
    found["left_out"] = bench.left_out
    print(report(found))
    name = re.sub(r"[^a-z0-9]+", "-", found["environment"]["device"].lower()).strip("-")
    out = arguments.out or ROOT / "benchmarks" / "results" / f"gpu-{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=2) + "\n")
    print(f"\nfigures: {out}")


if __name__ == "__main__":
    main()
