"""MoS's Triton kernels against the readable reference: interpreted, or on a GPU with TRITON_INTERPRET=0."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft_core as pc
from peft_core import plugins
from peft_core.testing.checks import (
    TOLERANCE,
    assert_near,
    dense,
    far_apart,
    poisoned_memory,
    randomise,
    same_bits,
)
from peft_method_mos import Options, naive, triton_kernels
from peft_method_mos.kernels import gather_factors, gather_group

pytestmark = pytest.mark.usefixtures("in_triton")
DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
ROWS = 5
OPTIONS: list[dict[str, Any]] = [
    {"r": 4, "equivalent_rank": 3, "shards": 3, "private_rank": 2},
    {"r": 4, "equivalent_rank": 3, "shards": 1, "private_rank": 0, "pair_dissociation": False},
    {"r": 5, "equivalent_rank": 2, "shards": 3, "private_rank": 1, "random_scaling": {"mean": 2.0}},
    {"subset_selection": False, "equivalent_rank": 1, "random_scaling": True},
]
EACH = pytest.mark.parametrize("options", OPTIONS, ids=["plain", "together", "scaled", "whole pools"])
LAYERS, IN, OUT = 5, 63, 60


def group(options: dict[str, Any]) -> tuple[list[pc.Site], dict[str, Tensor], list[dict[str, Tensor]]]:
    """The sites of a group, their pools with random values, and each site's binding."""
    given = Options(**options)
    sites = [pc.Site(f"{i}.up", IN, OUT, False, torch.float32, given) for i in range(LAYERS)]
    layout = plugins.call("mos", "peft_init", sites=sites)
    (made,) = layout.groups
    pools = {name: torch.randn(spec.shape, device=DEVICE) for name, spec in made.tensors.items()}
    generator = torch.Generator().manual_seed(0)
    bindings = [
        {name: spec.init.draw(spec.shape, generator).to(DEVICE) for name, spec in layout.bindings[site.path].items()}
        for site in sites
    ]
    return sites, pools, bindings


def expected_factors(pools: dict[str, Tensor], bindings: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    pairs = [naive.factors(pools, binding, torch.float64) for binding in bindings]
    A, B = zip(*pairs, strict=True)
    return torch.stack(A), torch.stack(B)


@DTYPES
@EACH
def test_gathered_factors_are_the_reference(options: dict[str, Any], dtype: torch.dtype) -> None:
    _, pools, bindings = group(options)
    wide = {name: pool.repeat(1, 2)[:, : pool.shape[1]] for name, pool in pools.items()}
    for what, given in {"pools": pools, "parts of wider pools": wide}.items():
        with poisoned_memory():
            A, B = gather_group(given, bindings, dtype)
        assert A.dtype == B.dtype == dtype
        expected_A, expected_B = expected_factors(pools, bindings)
        assert_near(A, expected_A, TOLERANCE[dtype], f"A from {what}")
        assert_near(B, expected_B, TOLERANCE[dtype], f"B from {what}")
        one_A, one_B = gather_factors(given, bindings[2], dtype)
        assert same_bits(one_A, A[2]) and same_bits(one_B, B[2])


@DTYPES
@EACH
def test_gradients_of_the_pools_are_the_reference(options: dict[str, Any], dtype: torch.dtype) -> None:
    _, pools, bindings = group(options)
    doubles = {name: pool.double().requires_grad_() for name, pool in pools.items()}
    found = {name: pool.clone().requires_grad_() for name, pool in pools.items()}
    with torch.enable_grad():
        expected = expected_factors(doubles, bindings)
        given = [torch.randn(factor.shape, device=DEVICE).to(dtype) for factor in expected]
        torch.autograd.backward(expected, [gradient.double() for gradient in given])
        with poisoned_memory():
            torch.autograd.backward(gather_group(found, bindings, dtype), given)
    for name in pools:
        assert_near(found[name].grad, doubles[name].grad, TOLERANCE[dtype], f"gradient of '{name}'")


def test_shards_that_nobody_draws_get_zeros_and_shared_ones_the_sum() -> None:
    index = torch.tensor([[[[0, 3]], [[1, 1]]], [[[3, 3]], [[1, 0]]]], dtype=torch.int32, device=DEVICE)  # [2, 2, 1, 2]
    dA = torch.tensor([[[1.0, 2.0]], [[4.0, 8.0]]], device=DEVICE)  # [sites, r, in]: shards of one column
    dBt = torch.tensor([[[1.0, 2.0]], [[4.0, 8.0]]], device=DEVICE)
    with poisoned_memory():
        pool_A, pool_B = triton_kernels.sum_factors(dA, dBt, index, None, 5, 3, torch.float32)
    assert pool_A.flatten().tolist() == [1, 0, 0, 14, 0]
    assert pool_B.flatten().tolist() == [8, 7, 0]


def test_sums_have_the_same_bits_every_time() -> None:
    index = torch.zeros(40, 2, 3, 1, dtype=torch.int32, device=DEVICE)  # everybody draws shard 0
    dA, dBt = torch.randn(40, 3, 8, device=DEVICE), torch.randn(40, 3, 8, device=DEVICE)
    first = triton_kernels.sum_factors(dA, dBt, index, None, 2, 2, torch.float32)
    again = triton_kernels.sum_factors(dA, dBt, index, None, 2, 2, torch.float32)
    in_order = torch.zeros(8, device=DEVICE)
    for row in dA.flatten(0, 1):
        in_order += row
    assert same_bits(first[0], again[0]) and same_bits(first[1], again[1])
    assert same_bits(first[0][0], in_order)


def test_widths_beyond_one_block_and_sides_of_unequal_width() -> None:
    pools = {"pool_A": torch.randn(3, 1500, device=DEVICE), "pool_B": torch.randn(4, 7, device=DEVICE)}
    index = torch.tensor([[[2, 0]], [[3, 1]]], dtype=torch.int32, device=DEVICE)
    A, B = gather_factors(pools, {"index": index}, torch.float32)
    expected_A, expected_B = naive.factors(pools, {"index": index}, torch.float32)
    assert torch.equal(A, expected_A) and torch.equal(B, expected_B)
    dpool_A, _ = triton_kernels.sum_factors(A[None], B.T[None], index[None], None, 3, 4, torch.float32)
    assert torch.equal(dpool_A[[2, 0]], pools["pool_A"][[2, 0]]) and not dpool_A[1].any()


def test_offsets_beyond_32_bits() -> None:
    pool = torch.randn(2, 16, device=DEVICE).bfloat16()
    index = torch.tensor([[[1, 0]]], dtype=torch.int32, device=DEVICE)
    far = {"pool_A": far_apart(pool), "pool_B": far_apart(pool)}
    A, B = gather_factors(far, {"index": index}, torch.bfloat16)
    assert same_bits(A[0], pool[[1, 0]].flatten()) and same_bits(B[:, 0], A[0])


@DTYPES
@EACH
@pytest.mark.parametrize("rows", [ROWS, 0])
def test_output_and_each_gradient_are_the_reference_s(options: dict[str, Any], dtype: torch.dtype, rows: int) -> None:
    sites, pools, bindings = group(options)
    functions: pc.Forward = plugins.call("mos", "peft_forward", site=sites[1])
    binding = bindings[1]
    x, dy = (torch.randn(rows, size, device=DEVICE).to(dtype) for size in (IN, OUT))
    doubles = {name: pool.to(dtype).double().requires_grad_() for name, pool in pools.items()}
    x64 = x.double().requires_grad_()
    with torch.enable_grad(), pc.kernels("naive"):
        expected = functions.naive(x64, doubles, binding)
        expected.backward(dy.double())
    assert functions.add_ is not None and functions.grad_ is not None
    y, dx = torch.zeros_like(dy), torch.zeros_like(x)
    with poisoned_memory():
        saved = functions.add_(x, y, pools, binding)
        found = functions.grad_(dy, dx, saved, pools, binding)
    assert_near(y, expected, TOLERANCE[dtype], "output")
    assert_near(dx, x64.grad, TOLERANCE[dtype], "input gradient")
    for name, pool in pools.items():
        assert_near(dense(found[name], pool), doubles[name].grad, TOLERANCE[dtype], f"gradient of '{name}'")


def test_compiled_model_calls_the_operators(called_when_compiled: Any) -> None:
    model = nn.Sequential(nn.Linear(12, 18), nn.Linear(18, 12)).to(DEVICE)
    options = {"r": 2, "equivalent_rank": 2, "shards": 3, "private_rank": 1, "random_scaling": True}
    adapter = randomise(pc.attach(model, pc.AdapterSpec(method="mos", options=options)))
    called = called_when_compiled(model, adapter, torch.randn(6, 12, device=DEVICE, requires_grad=True))
    assert called.count("peft_method_mos.gather_factors.default") == 2, called


def test_operators_keep_torch_s_rules() -> None:
    pool_A, pool_B = torch.randn(3, 4, device=DEVICE), torch.randn(3, 2, device=DEVICE)
    index = torch.tensor([[[[2, 0]], [[1, 1]]]], dtype=torch.int32, device=DEVICE)
    scaling = torch.tensor([[1.5]], device=DEVICE)
    dA, dBt = torch.randn(1, 1, 8, device=DEVICE), torch.randn(1, 1, 4, device=DEVICE)
    gather, sums = triton_kernels.gather_factors.operator, triton_kernels.sum_factors.operator
    with torch.enable_grad():
        pools = pool_A.requires_grad_(), pool_B.requires_grad_()
        torch.library.opcheck(gather, (*pools, index, scaling, torch.float32))
        torch.library.opcheck(sums, (dA, dBt, index, scaling, 3, 3, torch.float32))
