"""MiSS's Triton kernels against the readable reference: interpreted, or on a GPU with TRITON_INTERPRET=0."""

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
    far_apart,
    gradients,
    poisoned_memory,
    randomise,
    same_bits,
    weighted,
)
from peft_method_miss import Options, naive, triton_kernels
from peft_method_miss.kernels import Shards

pytestmark = pytest.mark.usefixtures("in_triton")
DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
ROWS, SEED = 5, 2**40 + 3

# r that divides the columns or not, more shards than a tile holds, one shard, as many as columns, any lengths.
SHARDS = [
    Shards(64, 16, True),
    Shards(63, 7, True),
    Shards(60, 7, False),
    Shards(64, 8, False),
    Shards(63, 1, True),
    Shards(63, 1, False),
    Shards(63, 63, False),
    Shards(300, 150, True),
    Shards(300, 140, False),
    Shards(63, 4, False, (1, 50, 2, 10)),
]
EACH = pytest.mark.parametrize("shards", SHARDS, ids=lambda s: f"{s.count}-{s.r}-{s.interleaved}-{s.sizes}")


def which(shards: Shards) -> Tensor:
    return naive.shard_of(shards.count, shards.r, shards.interleaved, shards.sizes).to(DEVICE)


def strided(rows: int, columns: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same values with all kinds of strides."""
    x = torch.randn(rows, columns, device=DEVICE).to(dtype)
    wide = torch.empty(rows, 3 * columns + 1, dtype=dtype, device=DEVICE)
    return {
        "contiguous": x,
        "transposed": x.T.contiguous().T,
        "every third column": wide[:, 1::3].copy_(x),
        "part of wider rows": wide.clone()[:, 2 : 2 + columns].copy_(x),
    }


@DTYPES
@EACH
def test_shard_sum_is_the_reference(shards: Shards, dtype: torch.dtype) -> None:
    for what, x in strided(ROWS, shards.count, dtype).items():
        expected = naive.shard_sum(x.double(), which(shards), shards.r)
        with poisoned_memory():
            found = shards.sum(x)
        assert found.dtype == dtype
        assert_near(found, expected, TOLERANCE[dtype], what)


@DTYPES
@EACH
def test_shard_expand_add_is_the_reference(shards: Shards, dtype: torch.dtype) -> None:
    for what, y in strided(ROWS, shards.count, dtype).items():
        S = torch.randn(ROWS, 2 * shards.r, device=DEVICE).to(dtype)[:, ::2]
        expected = y.double() + 0.7 * S.double()[:, which(shards)]
        version = y._version
        shards.expand_add_(S, y, 0.7)
        assert y._version > version, "autograd would not see that y has changed"
        assert_near(y, expected, TOLERANCE[dtype], what)


def test_expand_add_leaves_the_rest_of_the_memory_alone() -> None:
    whole = torch.zeros(7, 100, device=DEVICE)
    Shards(63, 7, True).expand_add_(torch.ones(5, 7, device=DEVICE), whole[1:6, 10:73], 1.0)
    expected = torch.zeros(7, 100, device=DEVICE)
    expected[1:6, 10:73] = 1
    assert torch.equal(whole, expected)


def test_without_rows() -> None:
    shards = Shards(63, 7, True)
    x = torch.empty(0, 63, device=DEVICE)
    S = shards.sum(x)
    assert S.shape == (0, 7)
    shards.expand_add_(S, x, 1.0)


@pytest.mark.parametrize("layout", [True, False], ids=["interleaved", "contiguous"])
def test_offsets_beyond_32_bits(layout: bool) -> None:
    shards = Shards(32, 4, layout)
    x = torch.randn(2, 32, device=DEVICE).bfloat16()
    far = far_apart(x)
    assert same_bits(shards.sum(far), shards.sum(x))
    S = torch.randn(2, 4, device=DEVICE).bfloat16()
    for y in (far, x):
        shards.expand_add_(S, y, 0.5)
    assert same_bits(far.contiguous(), x)


@EACH
def test_both_kernels_drop_the_same(shards: Shards) -> None:
    """What is dropped shows where nothing is added; the sum must have left out exactly that."""
    p, rows = 0.4, 20
    ones = torch.ones(rows, shards.r, device=DEVICE)
    kept = torch.zeros(rows, shards.count, device=DEVICE)
    shards.expand_add_(ones, kept, 1.0, (p, SEED))
    values = kept.unique()
    torch.testing.assert_close(values, torch.tensor([0.0, 1 / (1 - p)], device=DEVICE))
    count = kept.numel()
    share = float((kept == 0).double().mean())
    assert abs(share - p) < 5 * (p * (1 - p) / count) ** 0.5, f"{share:.3f} of the elements are dropped"
    x = torch.randn(rows, shards.count, device=DEVICE)
    assert_near(shards.sum(x, (p, SEED)), naive.shard_sum(x * kept, which(shards), shards.r), 1e-5, "S")
    again, other = torch.zeros_like(kept), torch.zeros_like(kept)
    shards.expand_add_(ones, again, 1.0, (p, SEED))
    shards.expand_add_(ones, other, 1.0, (p, SEED + 1))
    assert torch.equal(again, kept) and not torch.equal(other, kept)
    assert not torch.equal(kept[0], kept[1])


def test_what_is_dropped_is_independent() -> None:
    """No correlation between neighbours in either direction, nor between the numbers of one draw."""
    shards, p = Shards(256, 8, True), 0.5
    kept = torch.zeros(96, 256, device=DEVICE)
    shards.expand_add_(torch.ones(96, 8, device=DEVICE), kept, 1.0, (p, SEED))
    signs = kept - 1.0  # ±1
    for down, right in [(1, 0), (0, 1), (0, 8), (0, 16), (0, 64), (4, 0), (1, 8)]:
        products = signs * signs.roll((down, right), (0, 1))
        assert abs(float(products.mean())) < 4.5 / products.numel() ** 0.5, f"elements {down} down, {right} right"


def site_for(options: dict[str, Any]) -> pc.Site:
    return pc.Site("layer", 63, 60, False, torch.float32, Options(**options))


@DTYPES
@pytest.mark.parametrize(
    "options",
    [
        {"r": 9},
        {"r": 16, "alpha": 4.0},
        {"r": 16, "layout": "contiguous", "alpha": 40.0},
        {"variant": "expand", "r": 7, "alpha": 3.0},
        {"variant": "expand", "r": 3, "sizes": [1, 49, 10]},
        {"variant": "mini", "r": 16, "mini_r": 5, "alpha": 2.0},
    ],
    ids=str,
)
def test_output_and_each_gradient_are_the_reference_s(options: dict[str, Any], dtype: torch.dtype) -> None:
    site = site_for(options)
    functions: pc.Forward = plugins.call("miss", "peft_forward", site=site)
    layout = plugins.call("miss", "peft_init", sites=[site])
    (shape,) = [spec.shape for group in layout.groups for spec in group.tensors.values()]
    D = torch.randn(shape, device=DEVICE)
    x, dy = (torch.randn(ROWS, size, device=DEVICE).to(dtype) for size in (63, 60))
    D64, x64 = D.to(dtype).double().requires_grad_(), x.double().requires_grad_()
    with torch.enable_grad(), pc.kernels("naive"):
        expected = functions.naive(x64, {"D": D64}, {})
        expected.backward(dy.double())
    assert functions.add_ is not None and functions.grad_ is not None
    y, dx = torch.zeros_like(dy), torch.zeros_like(x)
    with poisoned_memory():
        saved = functions.add_(x, y, {"D": D}, {})
        found = functions.grad_(dy, dx, saved, {"D": D}, {})
    assert_near(y, expected, TOLERANCE[dtype], "output")
    assert_near(dx, x64.grad, TOLERANCE[dtype], "input gradient")
    assert_near(found["D"], D64.grad, TOLERANCE[dtype], "gradient of 'D'")


def model_of(dropout: float = 0.0, **options: Any) -> tuple[nn.Module, pc.Adapter]:
    model = nn.Sequential(nn.Linear(63, 60), nn.Linear(60, 63)).to(DEVICE)
    with torch.enable_grad():
        adapter = pc.attach(model, pc.AdapterSpec(method="miss", options=options, dropout=dropout))
    return model, randomise(adapter)


def test_dropout_keeps_no_mask_and_has_the_gradient_of_what_it_dropped() -> None:
    model, adapter = model_of(dropout=0.3, r=8)
    x = torch.randn(6, 63, device=DEVICE, requires_grad=True)
    sizes: list[int] = []

    def loss() -> Tensor:
        torch.manual_seed(7)
        return weighted(model(x))

    with torch.enable_grad():
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.dtype.itemsize) or t, lambda t: t):
            value = loss()
        found = {**gradients(adapter, value), "input": x.grad}
    assert 1 not in sizes, "a mask is saved"
    for name, tensor in [*adapter.named_parameters(), ("input", x)]:
        direction = torch.randn_like(tensor)
        tensor += 1e-2 * direction
        up = loss()
        tensor -= 2e-2 * direction
        slope = (up - loss()) / 2e-2
        tensor += 1e-2 * direction
        # Piecewise linear in everything: only rounding and the few ReLUs that turn are in the way.
        assert_near((found[name] * direction).sum(), slope, 3e-2, f"slope along '{name}'")


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_drops_the_same_again(reentrant: bool) -> None:
    model, adapter = model_of(dropout=0.3, r=8)
    x = torch.randn(6, 63, device=DEVICE, requires_grad=True)
    with torch.enable_grad():
        torch.manual_seed(7)
        expected = gradients(adapter, weighted(model(x)))
        torch.manual_seed(7)
        again = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)
        found = gradients(adapter, weighted(again))
    for key in expected:
        assert_near(found[key], expected[key], 1e-6, f"gradient of '{key}'")


@pytest.mark.parametrize("options", [{"r": 8}, {"r": 8, "layout": "contiguous"}], ids=str)
def test_compiled_model_calls_the_operators(options: dict[str, Any], called_when_compiled: Any) -> None:
    called = called_when_compiled(*model_of(**options), torch.randn(6, 63, device=DEVICE, requires_grad=True))
    assert called.count("peft_method_miss.shard_sum.default") == 2, called


def test_operators_keep_torch_s_rules() -> None:
    """Schema, fake implementation, gradient and tracing, by torch's own checks."""
    with torch.enable_grad():
        x, y = torch.randn(3, 12, device=DEVICE, requires_grad=True), torch.randn(3, 12, device=DEVICE)
        starts = torch.tensor([0, 2, 9, 12], dtype=torch.int32, device=DEVICE)
        S = torch.randn(3, 3, device=DEVICE)
        expand = triton_kernels.shard_expand_add_.operator
        torch.library.opcheck(triton_kernels.shard_sum.operator, (x, 3, False, starts, 7, 0.5, SEED))
        torch.library.opcheck(expand, (y, S, False, starts, 7, 0.5, 0.5, SEED))
