"""MiSS's mathematics against weights that are built entry by entry, its counts, and what it refuses.

What every method must do is `pytest --pyargs peft_core.testing --method miss`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import peft_core as pc
from peft_core import plugins
from peft_method_miss import Options

K, D_OUT, TOKENS = 63, 60, 7

# (options, in, out): each variant and layout, r dividing the layer or not, r as large as the layer, r = 1.
CASES: list[tuple[dict[str, Any], int, int]] = [
    ({"r": 9}, 63, 60),
    ({"r": 16, "alpha": 4.0}, 63, 60),
    ({"r": 63}, 63, 60),
    ({"r": 1}, 63, 60),
    ({"r": 9, "layout": "contiguous"}, 63, 60),
    ({"r": 16, "layout": "contiguous", "alpha": 40.0}, 63, 60),
    ({"variant": "expand", "r": 6}, 63, 60),
    ({"variant": "expand", "r": 7, "alpha": 3.0}, 63, 60),
    ({"variant": "expand", "r": 3, "sizes": [1, 49, 10]}, 63, 60),
    ({"variant": "mini", "r": 9, "mini_r": 12}, 63, 60),
    ({"variant": "mini", "r": 16, "mini_r": 5, "alpha": 2.0}, 63, 60),
    ({"variant": "mini", "r": 5, "mini_r": 60, "layout": "contiguous"}, 63, 60),
    ({"variant": "bat", "r": 3}, 63, 60),
    ({"variant": "bat", "r": 1, "alpha": 2.0}, 63, 60),
    ({"variant": "bat", "r": 12, "alpha": 5.0}, 36, 60),
]
PAIRED = [case for case in CASES if case[0].get("variant") != "bat"]


def site_for(options: dict[str, Any], inputs: int = K, outputs: int = D_OUT) -> pc.Site:
    return pc.Site("layer", inputs, outputs, False, torch.float32, Options(**options))


def tensors_for(site: pc.Site, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    layout = plugins.call("miss", "peft_init", sites=[site])
    (shape,) = [spec.shape for group in layout.groups for spec in group.tensors.values()]
    return {"D": torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)}


def forward_of(site: pc.Site) -> pc.Forward:
    functions: pc.Forward = plugins.call("miss", "peft_forward", site=site)
    return functions


def base_weight(site: pc.Site, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(site.out_features, site.in_features, generator=generator, dtype=torch.float64)


def runs(count: int, r: int) -> list[int]:
    """The shard of each column where shards are runs, as equal as possible."""
    return [i for i in range(r) for _ in range(count // r + (i < count % r))]


def delta_weight(site: pc.Site, D: Tensor, W: Tensor) -> Tensor:
    """ΔW, entry by entry from METHODS.md."""
    options: Options = site.options
    d, k, r = site.out_features, site.in_features, options.r
    out = torch.zeros(d, k, dtype=torch.float64)
    if options.variant == "bat":
        for i in range(0, d, r):
            for j in range(0, k, r):
                out[i : i + r, j : j + r] = W[i : i + r, j : j + r] @ D[i // r] + D[i // r]
        return out * options.scale
    if options.variant == "expand":
        sizes = options.sizes or [runs(d, r).count(i) for i in range(r)]
        row = 0
        for i, size in enumerate(sizes):
            out[row : row + size] = D[i]
            row += size
        return out * options.scale
    shards = [j % r for j in range(k)] if options.layout == "interleaved" else runs(k, r)
    for j, shard in enumerate(shards):
        for o in range(d):
            out[o, j] = D[shard, o % D.shape[1]]
    return out * options.scale


def ids(case: tuple[dict[str, Any], int, int]) -> str:
    return ",".join(f"{name}={value}" for name, value in case[0].items())


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_the_reference_is_the_formula(case: tuple[dict[str, Any], int, int]) -> None:
    site = site_for(*case)
    tensors, W = tensors_for(site), base_weight(site)
    x = torch.randn(2, TOKENS, site.in_features, dtype=torch.float64)
    expected = delta_weight(site, tensors["D"], W)
    found = forward_of(site).naive(x, {**tensors, "base_weight": W}, {})
    torch.testing.assert_close(found, x @ expected.T, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_merging_adds_the_formula_and_changes_no_argument(case: tuple[dict[str, Any], int, int]) -> None:
    site = site_for(*case)
    tensors, W = tensors_for(site), base_weight(site)
    before = W.clone(), tensors["D"].clone()
    for weight in (W, W.T.contiguous().T):  # a Conv1D's weight is a transposed view
        merged = plugins.call("miss", "peft_merge", site=site, weight=weight, tensors=tensors, binding={})
        expected = W + delta_weight(site, tensors["D"], W)
        torch.testing.assert_close(merged, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(W, before[0]) and torch.equal(tensors["D"], before[1])


@pytest.mark.parametrize("case", PAIRED, ids=ids)
def test_factors_are_exact(case: tuple[dict[str, Any], int, int]) -> None:
    site = site_for(*case)
    tensors = tensors_for(site)
    A, B = plugins.call("miss", "peft_lowrank", site=site, tensors=tensors, binding={})
    assert A.shape == (site.options.r, site.in_features) and B.shape == (site.out_features, site.options.r)
    torch.testing.assert_close(B @ A, delta_weight(site, tensors["D"], A), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", PAIRED, ids=ids)
def test_factors_of_16_bit_parameters_are_exact(case: tuple[dict[str, Any], int, int]) -> None:
    site = site_for(*case)
    tensors = tensors_for(site, torch.bfloat16)
    A, B = plugins.call("miss", "peft_lowrank", site=site, tensors=tensors, binding={})
    expected = delta_weight(site, tensors["D"].double(), A)
    assert (B.double() @ A.double() - expected).abs().max() <= 1e-6 * expected.abs().max()


def compare_pair(site: pc.Site, dtype: torch.dtype, tolerance: float, tokens: int = TOKENS) -> None:
    """The pair in `dtype`, with float32 parameters, against autograd of the reference in float64."""
    functions = forward_of(site)
    assert functions.add_ is not None and functions.grad_ is not None
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(tokens, site.in_features, generator=generator).to(dtype)
    dy = torch.randn(tokens, site.out_features, generator=generator).to(dtype)
    y, dx = torch.randn_like(dy), torch.randn_like(x)
    D = tensors_for(site, torch.float64 if dtype == torch.float64 else torch.float32)["D"]

    exact_x, exact_D = x.double().requires_grad_(), D.double().requires_grad_()
    delta = functions.naive(exact_x, {"D": exact_D}, {})
    delta.backward(dy.double())

    start_y, start_dx = y.clone(), dx.clone()
    saved = functions.add_(x, y, {"D": D}, {})
    found = functions.grad_(dy, dx, saved, {"D": D}, {})["D"]
    assert torch.equal(functions.grad_(dy, None, saved, {"D": D}, {})["D"], found)
    assert found.shape == D.shape
    assert exact_x.grad is not None and exact_D.grad is not None
    for name, got, expected in (
        ("y", y, start_y.double() + delta.detach()),
        ("dx", dx, start_dx.double() + exact_x.grad),
        ("D", found, exact_D.grad),
    ):
        scale = expected.square().mean().sqrt() if tokens else torch.tensor(1.0)
        error = (got.double() - expected).square().mean().sqrt() / scale if got.numel() else torch.tensor(0.0)
        assert error <= tolerance, f"{name}: off by {error:.1e}, allowed {tolerance:.0e}"


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("case", PAIRED, ids=ids)
def test_the_pair_is_the_reference(case: tuple[dict[str, Any], int, int], dtype: torch.dtype, tolerance: float) -> None:
    compare_pair(site_for(*case), dtype, tolerance)


def test_the_pair_takes_no_tokens() -> None:
    compare_pair(site_for({"r": 4}), torch.float32, 1e-5, tokens=0)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape_and_rank(data: st.DataObject) -> None:
    k, d = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    variant = data.draw(st.sampled_from(["efficient", "expand", "mini"]))
    options: dict[str, Any] = {
        "variant": variant,
        "r": data.draw(st.integers(1, d if variant == "expand" else k)),
    }
    if variant != "expand":
        options["layout"] = data.draw(st.sampled_from(["interleaved", "contiguous"]))
    if variant == "mini":
        options["mini_r"] = data.draw(st.sampled_from([m for m in range(1, d + 1) if d % m == 0]))
    site = site_for(options, k, d)
    compare_pair(site, torch.float32, 1e-5, tokens=data.draw(st.integers(1, 9)))
    tensors = tensors_for(site)
    W = base_weight(site)
    merged = plugins.call("miss", "peft_merge", site=site, weight=W, tensors=tensors, binding={})
    torch.testing.assert_close(merged, W + delta_weight(site, tensors["D"], W), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{"r": 4}, {"variant": "mini", "r": 4, "mini_r": 3}], ids=str)
def test_nothing_of_the_inputs_width_is_kept_for_backward(options: dict[str, Any]) -> None:
    site = site_for(options)
    functions = forward_of(site)
    assert functions.add_ is not None
    saved = functions.add_(torch.randn(TOKENS, K), torch.zeros(TOKENS, D_OUT), tensors_for(site, torch.float32), {})
    assert [tuple(tensor.shape) for tensor in saved] == [(TOKENS, 4)]


class Readers(nn.Module):
    """Layers that read one input, which `change` may change between them."""

    def __init__(self, change: Any = lambda x: x) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(12, 8), nn.Linear(12, 4), nn.Linear(12, 4)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        q = self.q(x)
        x = self.change(x)
        return torch.cat([q, self.k(x), self.v(x)], -1)


def kept_sums(model: nn.Module, x: Tensor) -> int:
    """How many tensors of the rank's width, 3, live from forward to backward."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape[-1:] == (3,):
            kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return len(kept)


def test_layers_that_read_one_input_keep_one_sum() -> None:
    model, x = Readers(), torch.randn(2, 9, 12, requires_grad=True)
    pc.attach(model, pc.AdapterSpec(method="miss", options={"r": 3}))
    assert kept_sums(model, x) == 1
    assert kept_sums(model, x) == 1, "a second pass needs a sum of its own"


def test_layers_that_shard_one_input_differently_keep_a_sum_each() -> None:
    model, x = Readers(), torch.randn(2, 9, 12, requires_grad=True)
    layouts = {"v": {"layout": "contiguous"}}
    pc.attach(model, pc.AdapterSpec(method="miss", options={"r": 3}, overrides=layouts))
    assert kept_sums(model, x) == 2


def learnt(change: Any, kernels: str) -> list[Tensor]:
    """The output and all gradients of `Readers`."""
    torch.manual_seed(0)
    model, x = Readers(change), torch.randn(2, 9, 12, requires_grad=True)
    adapter = pc.attach(model, pc.AdapterSpec(method="miss", options={"r": 3}))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
    with pc.kernels(kernels):
        y = model(x)
        y.square().sum().backward()
    return [y.detach(), x.grad, *(parameter.grad for parameter in adapter.parameters())]  # type: ignore[list-item]


def test_layers_that_read_one_input_learn_as_the_reference_does() -> None:
    for got, expected in zip(learnt(lambda x: x, "torch"), learnt(lambda x: x, "naive"), strict=True):
        torch.testing.assert_close(got, expected)


def test_an_input_that_is_changed_in_place_is_another() -> None:
    for got, expected in zip(learnt(lambda x: x.mul_(0.5), "torch"), learnt(lambda x: x * 0.5, "torch"), strict=True):
        torch.testing.assert_close(got, expected)


def new_data(x: Tensor) -> None:
    x.data = torch.ones(18, 12)


@pytest.mark.parametrize(
    "recorded, change", [(False, lambda x: x.numpy().fill(1.0)), (False, new_data), (True, new_data)]
)
def test_an_input_that_is_changed_behind_autograds_back_is_another(recorded: bool, change: Any) -> None:
    layer = nn.Sequential(nn.Linear(12, 4))
    adapter = pc.attach(layer, pc.AdapterSpec(method="miss", options={"r": 3}))
    with torch.no_grad():
        adapter.bank.parameter("0.D").normal_()
    x = torch.randn(18, 12, requires_grad=recorded)
    x = x * 1.0 if recorded else x
    kept = layer(x)  # for its backward there is a sum
    change(x)
    torch.testing.assert_close(layer(x), layer(torch.ones(18, 12)))
    kept.sum().backward()


def test_bat_reaches_its_weight_through_a_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 18), nn.Tanh(), nn.Linear(18, 6))
    x = torch.randn(5, 12)
    spec = pc.AdapterSpec(method="miss", options={"variant": "bat", "r": 6, "alpha": 3.0})
    weights = [model[0].weight.detach().double(), model[2].weight.detach().double()]
    adapter = pc.attach(model, spec)
    values = {}
    with torch.no_grad():
        for key, parameter in adapter.named_parameters():
            values[key] = parameter.normal_(std=0.1).double().requires_grad_()
    sites = [site_for({"variant": "bat", "r": 6, "alpha": 3.0}, 12, 18)]
    sites.append(site_for({"variant": "bat", "r": 6, "alpha": 3.0}, 18, 6))
    h = x.double() @ (weights[0] + delta_weight(sites[0], values["0.D"], weights[0])).T + model[0].bias.double()
    y = h.tanh() @ (weights[1] + delta_weight(sites[1], values["2.D"], weights[1])).T + model[2].bias.double()
    found = model(x)
    torch.testing.assert_close(found.double(), y, rtol=1e-5, atol=1e-6)
    found.square().sum().backward()
    y.square().sum().backward()
    for key, parameter in adapter.named_parameters():
        torch.testing.assert_close(parameter.grad.double(), values[key].grad, rtol=1e-4, atol=1e-5, msg=key)


def test_bat_gives_a_weight_that_is_trained_as_well_its_whole_gradient() -> None:
    options = {"variant": "bat", "r": 2, "alpha": 3.0}
    model, x = nn.Sequential(nn.Linear(6, 4, bias=False)).double(), torch.randn(5, 6, dtype=torch.float64)
    adapter = pc.attach(model, pc.AdapterSpec(method="miss", options=options, dtype="float64"))
    D = adapter.bank.parameter("0.D")
    with torch.no_grad():
        D.normal_()
    weight = model[0].weight.detach().clone().requires_grad_()
    (x @ (weight + delta_weight(site_for(options, 6, 4), D.detach(), weight)).T).square().sum().backward()
    model[0].weight.requires_grad_()
    model(x).square().sum().backward()
    torch.testing.assert_close(model[0].weight.grad, weight.grad)


# Counts: METHODS.md and the paper's table.


@pytest.fixture(scope="module")
def llama_7b() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=32000,
    )
    with torch.device("meta"):
        model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


@pytest.mark.parametrize("r, millions", [(16, 21.7), (32, 43.5), (64, 87.0), (128, 174.0)])
def test_the_papers_counts(llama_7b: nn.Module, r: int, millions: float) -> None:
    plan = pc.plan(llama_7b, pc.AdapterSpec(method="miss", options={"r": r}))
    assert plan.num_trainable == r * 42_496 * 32
    assert abs(plan.num_trainable / 1e6 - millions) < 0.1
    assert len(plan.sites) == 224 and all(len(group.members) == 1 for group in plan.groups)


@pytest.mark.parametrize(
    "options, count",
    [
        ({"variant": "expand", "r": 64}, 64 * (6 * 4096 + 11008) * 32),
        ({"variant": "mini", "r": 64, "mini_r": 64}, 64 * 64 * 7 * 32),
        ({"variant": "bat", "r": 64}, 64 * 42_496 * 32),
    ],
    ids=str,
)
def test_the_variants_counts(llama_7b: nn.Module, options: dict[str, Any], count: int) -> None:
    assert pc.plan(llama_7b, pc.AdapterSpec(method="miss", options=options)).num_trainable == count


# What is refused, in one line that names the place and what would fit.


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"r": 64},
            "'0': r=64 is more than its 63 inputs; exclude it, or set r ≤ 60, which fits all layers with these options",
        ),
        (
            {"variant": "expand", "r": 61},
            "'0': r=61 is more than its 60 outputs; exclude it, or set r ≤ 60, which fits all layers with these options",
        ),
        (
            {"variant": "expand", "r": 2, "sizes": [30, 31]},
            "'0': sizes add up to 61, but the layer has 60 outputs; change sizes, or leave them out",
        ),
        (
            {"variant": "mini", "r": 4, "mini_r": 7},
            "'0': mini_r=7 does not divide its 60 outputs; values that fit all layers with these options: 1, 3",
        ),
        (
            {"variant": "bat", "r": 4},
            "'0': variant 'bat' needs an r that divides its 63 inputs and 60 outputs, and r=4 does not; "
            "values that fit all layers with these options: 1, 3",
        ),
        (
            {"variant": "bat", "r": 20},
            "'0': variant 'bat' needs an r that divides its 63 inputs and 60 outputs, and r=20 does not; "
            "values that fit all layers with these options: 1, 3",
        ),
    ],
    ids=str,
)
def test_what_does_not_fit_a_layer(options: dict[str, Any], message: str) -> None:
    model = nn.Sequential(nn.Linear(63, 60), nn.Linear(60, 63))
    with pytest.raises(pc.PlanError) as caught:
        pc.plan(model, pc.AdapterSpec(method="miss", options=options))
    assert str(caught.value) == message


def test_what_would_fit_is_told_for_the_layers_with_the_same_options() -> None:
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64), nn.Linear(64, 7))
    spec = pc.AdapterSpec(method="miss", options={"variant": "bat", "r": 48}, overrides={"2": {"r": 1}})
    with pytest.raises(pc.PlanError, match=r"with these options: 1, 2, 4, 8, 16, 32$"):
        pc.plan(model, spec)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"variant": "expand", "layout": "contiguous"}, "layout 'contiguous' is for"),
        ({"variant": "bat", "layout": "contiguous"}, "layout 'contiguous' is for"),
        ({"sizes": [1, 2]}, "sizes is an option of variant 'expand'"),
        ({"variant": "expand", "r": 3, "sizes": [1, 2]}, "sizes has 2 lengths, but r is 3"),
        ({"mini_r": 4}, "mini_r is an option of variant 'mini'"),
        ({"variant": "mini"}, "needs mini_r"),
        ({"variant": "efficent"}, "efficient"),
        ({"rank": 4}, "'rank' is not a field"),
        ({"r": 0}, "greater than 0"),
        ({"alpha": -1.0}, "greater than 0"),
    ],
    ids=str,
)
def test_options_that_contradict(options: dict[str, Any], message: str) -> None:
    with pytest.raises(pc.SpecError, match=message):
        pc.AdapterSpec(method="miss", options=options)


def test_bat_takes_no_dropout_no_factors_and_no_second_adapter() -> None:
    bat = {"variant": "bat", "r": 3}
    with pytest.raises(pc.SpecError, match="dropout"):
        pc.AdapterSpec(method="miss", options=bat, dropout=0.1)
    site = site_for(bat)
    with pytest.raises(pc.MergeError, match=r"'layer': .*'bat' has no low-rank factors"):
        plugins.call("miss", "peft_lowrank", site=site, tensors=tensors_for(site), binding={})
    model = nn.Sequential(nn.Linear(63, 60))
    pc.attach(model, pc.AdapterSpec(method="miss", options=bat), name="bat")
    pc.attach(model, pc.AdapterSpec(method="miss", options={"r": 3}), name="other")
    with pytest.raises(pc.AdapterError, match="'0' cannot carry"):
        pc.activate(model, ["bat", "other"])


def test_capabilities_depend_on_the_variant() -> None:
    bat = pc.AdapterSpec(method="miss", options={"variant": "bat", "r": 3}).capabilities
    assert not bat.additive and not bat.lowrank and not bat.dropout and bat.starts_at_zero
    for variant in ({"variant": "efficient"}, {"variant": "expand"}, {"variant": "mini", "mini_r": 2}):
        can = pc.AdapterSpec(method="miss", options=variant).capabilities
        assert can.additive and can.lowrank and can.dropout


def test_dropout_is_refused_wherever_bat_is_asked_for() -> None:
    for fields in ({"options": {"variant": "bat", "r": 3}}, {"overrides": {"up": {"variant": "bat", "r": 3}}}):
        with pytest.raises(pc.SpecError, match="dropout"):
            pc.AdapterSpec(method="miss", dropout=0.1, **fields)


def test_an_adapters_own_tensors_are_nothing_of_the_base() -> None:
    model = nn.Sequential(nn.Linear(63, 60))
    pc.attach(model, pc.AdapterSpec(method="miss", options={"variant": "bat", "r": 3}), name="bat")
    plan = pc.plan(model, pc.AdapterSpec(method="miss", options={"r": 3}))
    assert plan.notes == ()  # D of 'bat' is 3-dimensional, as weights of experts are
    assert plan.base.num_parameters == 63 * 60 + 60


@pytest.mark.parametrize("options", [{"r": 7}, {"variant": "expand", "r": 7}], ids=str)
def test_what_is_kept_between_calls_is_real(options: dict[str, Any]) -> None:
    """The indicator is made once; neither a default device nor tracing with fake tensors may get into it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    site = site_for(options, 41, 37)
    functions, D = forward_of(site), tensors_for(site, torch.float32)["D"]
    assert functions.add_ is not None
    x = torch.randn(TOKENS, 41)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x), mode.from_tensor(torch.zeros(TOKENS, 37)), mode.from_tensor(D)
        functions.add_(*fake[:2], {"D": fake[2]}, {})
    with torch.device("meta"):
        y = torch.zeros(TOKENS, 37, device="cpu")
        functions.add_(x, y, {"D": D}, {})
    torch.testing.assert_close(y, functions.naive(x, {"D": D}, {}), rtol=1e-5, atol=1e-5)
