"""Each kernel by itself, against a device copy measured in the same run and beside torch's products."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from gpu_parts.bench import Bench

import peft_core as pc
from peft_core import lowrank
from peft_core.kernels import use_triton

LEAST_BANDWIDTH = 0.80  # of a device copy, for a kernel that moves so much that launching it is not what takes time:
LEAST_BYTES = 2**27


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


def orders(bench: Bench) -> dict[str, dict[str, float]]:
    """The base product and an up projection of 16 on top of it, or beneath it: times as ratios to the base product alone.

    Beneath, the base product's own kernel reads what is there while it computes, and no pass over y is left; but another of
    the vendor's kernels may run then, and y is rounded in between.
    """
    found = {}
    sizes = [(64, 96)] if bench.tiny else [(4096, 1024), (4096, 4096), (4096, 14336), (14336, 4096)]
    for tokens, (width, out) in itertools.product((8,) if bench.tiny else (1024, 4096), sizes):
        x, weight, h, B = (
            torch.randn(*size, device=bench.device, dtype=torch.bfloat16)
            for size in ((tokens, width), (out, width), (tokens, 16), (16, out))
        )
        calls = {
            "alone": lambda x=x, weight=weight: x @ weight.t(),
            "on top": lambda x=x, weight=weight, h=h, B=B: (x @ weight.t()).addmm_(h, B),
            "beneath": lambda x=x, weight=weight, h=h, B=B: (h @ B).addmm_(x, weight.t()),
        }
        seconds = {name: bench.per_call(call, 3 if bench.tiny else 50) for name, call in calls.items()}
        ratios = {name: seconds[name] / seconds["alone"] for name in ("on top", "beneath")}
        found[f"{width} → {out}, {tokens} tokens"] = {"seconds": seconds["alone"], **ratios}
    return found


@torch.no_grad()
def kernels(bench: Bench) -> None:
    """Each kernel beside torch's, as a fraction of the copy's rate; and the orders in which a site's products can be taken."""
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
    if not bench.late("kernel orders of products"):
        found["orders"] = orders(bench)
