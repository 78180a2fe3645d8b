"""The algorithm, pinned: what METHODS.md says of a switch, on one site without a model."""

from __future__ import annotations

import math
import random

import pytest
import torch

import peft_core as pc
import peft_method_switchlora as switchlora
from peft_core.sharing import draw
from peft_method_switchlora import Options, RowAdamW, kernels, naive, switching
from peft_method_switchlora.layout import lay_out
from peft_method_switchlora.switching import decide, exchange_, factor_exchange, fetch

OPTIMIZERS = {
    "row-step": lambda parameters: RowAdamW(parameters, lr=0.1, weight_decay=0.1),
    "loop": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1, foreach=False),
    "foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1, foreach=True),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1, fused=True),
    "amsgrad": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, amsgrad=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1, weight_decay=0.1),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1),
}


def still(parameters):
    return torch.optim.SGD(parameters, lr=0.0)


# Initialisation


@pytest.mark.parametrize("m, n, r", [(256, 256, 64), (512, 192, 32), (192, 512, 128)])
def test_initial_standard_deviations(m, n, r):
    site = pc.Site("q", n, m, False, torch.float32, Options(r=r))
    (group,) = lay_out([site]).groups
    gain = 1 / math.sqrt(3)
    std_B = (r / math.sqrt(m * n)) ** 0.25 * gain**0.5
    std_A = (math.sqrt(m) * r / (n * math.sqrt(n))) ** 0.25 * gain**0.5
    specs = {**group.tensors, **group.state}
    for name, std in {"A": std_A, "candidates_A": std_A, "B": std_B, "candidates_B": std_B}.items():
        values = draw(specs[name], torch.float32, name)
        assert values.std() == pytest.approx(std, rel=0.03)
        assert values.abs().max() == pytest.approx(math.sqrt(3) * std, rel=0.01)
    delta = draw(specs["B"], torch.float32, "B") @ draw(specs["A"], torch.float32, "A") / r
    assert delta.std() == pytest.approx(gain / math.sqrt(n), rel=0.05)  # that of a fresh linear layer


def test_layout_of_a_site(bench):
    site = bench(24, 20, r=6)
    assert {name: tuple(t.shape) for name, t in site.tensors.items()} == {"A": (6, 20), "B": (24, 6)}
    assert site.state["candidates_A"].shape == (20, 20)
    assert site.state["candidates_B"].shape == (20, 24)
    assert site.state["slots"].tolist() == [[14, 15, 16, 17, 18, 19], [17, 18, 19, 14, 15, 16]]
    assert site.state["next"].tolist() == [0, 3]
    assert not site.state["frozen_until"].any()


def test_sites_without_spare_candidates_never_switch_and_the_plan_says_so():
    def planned(r):
        return lay_out([pc.Site("q", 16, 24, False, torch.float32, Options(r=r))])

    assert not planned(15).notes
    for r in (16, 20):
        assert not planned(r).groups[0].state
        assert planned(r).notes == (f"sites that never switch: 1, first 'q' (r = {r} leaves no spare candidates)",)
    assert "r = 1" in planned(1).notes[0]


def test_master_weights_are_named_in_the_plan():
    site = pc.Site("q", 1000, 500, False, torch.bfloat16, Options(r=4))
    assert lay_out([site]).notes == ("training keeps float32 masters of 1 base weights: 2.0 MB",)
    assert not lay_out([pc.Site("q", 1000, 500, False, torch.bfloat16, Options(r=4, weight_master="none"))]).notes
    assert not lay_out([pc.Site("q", 1000, 500, False, torch.float32, Options(r=4, weight_master="float32"))]).notes


# Attaching and merging


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("master", [None, "none"])
def test_attaching_leaves_the_function(bench, dtype, master):
    site = bench(24, 20, dtype=torch.float32, alpha=3, weight_master=master)
    weight = site.original.to(dtype)
    moved = switchlora.peft_attach(site.site, weight, site.tensors, {})
    wide = torch.promote_types(dtype, torch.float32)
    assert moved.dtype == (dtype if master == "none" else wide)
    delta = site.options.scale * site.tensors["B"].to(wide) @ site.tensors["A"].to(wide)
    error = (moved.to(wide) + delta - weight.to(wide)).abs().max()
    assert error <= 2 * torch.finfo(moved.dtype).eps * weight.abs().max()
    assert not torch.equal(moved.to(wide), weight.to(wide))


def test_merged_weight_ignores_no_scale(bench):
    site = bench(alpha=5)
    merged = switchlora.peft_merge(site.site, site.weight, site.tensors, {})
    torch.testing.assert_close(merged, site.original, rtol=0, atol=1e-12)


def test_there_are_no_exact_factors(bench):
    site = bench()
    with pytest.raises(pc.MergeError, match="full rank"):
        switchlora.peft_lowrank(site.site, site.tensors, {})


# The exchange


@pytest.mark.parametrize("order", ["consecutive", "random"])
@pytest.mark.parametrize("shape", [(24, 20), (20, 24), (63, 60)])
def test_a_switch_leaves_the_function(bench, shape, order):
    site = bench(*shape, order=order, alpha=2)
    optimizer = still(site.parameters())
    for index in range(50):
        before = site.snapshot()
        with site.around(index, optimizer):
            pass
        assert not torch.equal(site.weight, before["weight"])
        assert not torch.equal(site.tensors["A"], before["A"])
        assert not torch.equal(site.tensors["B"], before["B"])
        torch.testing.assert_close(site.effective(), site.original, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ten_thousand_switches_do_not_drift(bench, dtype):
    """A 16-bit base with its float32 master as well: the master is what is moved."""
    site = bench(64, 48, dtype=torch.float32, r=8)
    original = site.original.to(dtype)
    site.weight = switchlora.peft_attach(site.site, original, site.tensors, {})
    assert site.weight.dtype == torch.float32
    optimizer = still(site.parameters())
    for index in range(10_000 // 8):
        with site.around(index, optimizer):
            pass
    drift = (site.effective() - original.float()).abs().max()
    assert 0 < drift <= 1e-4 * original.float().std()


@pytest.mark.parametrize("order", ["consecutive", "random"])
def test_equals_one_vector_after_the_other(bench, order):
    """The one-pass exchange and its books against a plain reference, while everything is trained."""
    site = bench(24, 20, order=order)
    optimizer = RowAdamW(site.parameters(), lr=0.01)
    seen_A, seen_B = site.state["candidates_A"].clone(), site.state["candidates_B"].clone()
    for index in range(60):
        site.random_gradients()
        before = site.snapshot()
        draws = random.Random(f"{site.seed}/{index}/{site.site.path}")
        in_A, in_B = decide(site.options, site.state, index, 10**9, draws)
        with site.around(index, optimizer):
            W, A, B, scale = before["weight"], before["A"], before["B"], site.options.scale
            slots = before["slots"]
            for place, slot in zip(in_B.places, in_B.slots, strict=True):
                seen_B[slots[1, place]] = B[:, place]
                naive.switch_column(W, A, B, place, seen_B[slot], scale)
            for place, slot in zip(in_A.places, in_A.slots, strict=True):
                seen_A[slots[0, place]] = A[place]
                naive.switch_row(W, A, B, place, seen_A[slot], scale)
            torch.testing.assert_close(site.weight, W, rtol=0, atol=1e-13)
            assert torch.equal(site.tensors["A"], A) and torch.equal(site.tensors["B"], B)
            assert torch.equal(site.state["candidates_A"], seen_A)
            assert torch.equal(site.state["candidates_B"], seen_B)
        optimizer.step()


@pytest.mark.parametrize("order", ["consecutive", "random"])
def test_every_vector_is_in_one_place(bench, order):
    site = bench(24, 20, order=order)
    c = 20

    def everything():
        sets = []
        for row, (name, vectors) in enumerate((("A", site.tensors["A"]), ("B", site.tensors["B"].T))):
            slots = site.state["slots"][row]
            assert len(set(slots.tolist())) == len(slots) and all(0 <= slot < c for slot in slots.tolist())
            whole = site.state[f"candidates_{name}"].clone()
            whole[slots] = vectors.detach()
            sets.append(whole)
        return sets

    before = everything()
    optimizer = still(site.parameters())
    for index in range(137):
        with site.around(index, optimizer):
            pass
    for first, last in zip(before, everything(), strict=True):
        assert torch.equal(first, last)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_update_equals_its_naive_twin(dtype, transposed):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(63, 60, generator=generator).to(dtype)
    weight = weight.T.contiguous().T if transposed else weight
    columns = torch.randn(63, 7, generator=generator).to(torch.promote_types(dtype, torch.float32))
    rows = torch.randn(7, 60, generator=generator).to(columns)
    exact = weight.double() + 0.3 * columns.double() @ rows.double()
    fast, slow = weight.clone(), weight.clone()
    kernels.switch_update_(fast, columns, rows, 0.3)
    with pc.kernels("naive"):
        kernels.switch_update_(slow, columns, rows, 0.3)
    eps = torch.finfo(dtype).eps
    assert (fast - exact).abs().max() <= 8 * eps * exact.abs().max()
    assert (slow - exact).abs().max() <= 16 * eps * exact.abs().max()


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_update_is_in_full_float32_whatever_the_user_allows(precision, monkeypatch):
    matmul = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if matmul is None:
        pytest.skip("this torch has no fp32_precision")
    inside = []
    real = torch.Tensor.addmm_

    def spied(*args, **kwargs):
        inside.append((torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision))
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "addmm_", spied)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        kernels.switch_update_(torch.zeros(4, 4), torch.ones(4, 1), torch.ones(1, 4), 1.0)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    assert inside == [("ieee", "ieee")]


# What is stale is reset, and does not move


@pytest.mark.parametrize("freeze_steps", [0, 1, 3])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_counterparts_start_afresh_and_are_frozen_for_exactly_so_long(bench, kind, freeze_steps):
    site = bench(24, 20, r=6, interval=8, freeze_steps=freeze_steps)
    optimizer = OPTIMIZERS[kind](site.parameters())
    frozen_from: dict[tuple[int, int], int] = {}  # (factor, place) → step at which its counterpart was switched
    switched = 0
    for index in range(80):
        site.random_gradients()
        slots = site.state["slots"].clone()
        frozen = {key for key, start in frozen_from.items() if index < start + freeze_steps}
        with site.around(index, optimizer):
            for factor, place in (slots != site.state["slots"]).nonzero().tolist():
                assert not {(0, place), (1, place)} & frozen, (
                    "a vector was switched that is frozen, or its counterpart is"
                )
                counterpart = ("B", "A")[factor]
                for name, value in optimizer.state[site.tensors[counterpart]].items():
                    if name != "step":
                        assert not value.select(1 - factor, place).any(), f"{name} of the counterpart is not zero"
                    elif kind == "row-step":
                        assert value.flatten()[place] == 0
                frozen_from[1 - factor, place] = index
                switched += 1
            before = {name: tensor.detach().clone() for name, tensor in site.tensors.items()}
            optimizer.step()
        for factor, name in enumerate(("A", "B")):
            moved = (site.tensors[name] != before[name]).all(1 - factor)
            for place in range(6):
                start = frozen_from.get((factor, place), -100)
                if index >= start + freeze_steps:
                    assert moved[place]
                    continue
                assert torch.equal(site.tensors[name].select(factor, place), before[name].select(factor, place))
                for key, value in optimizer.state[site.tensors[name]].items():
                    if key != "step":
                        assert not value.select(factor, place).any(), f"{key} of a frozen vector is not zero"
                    elif kind == "row-step":
                        count = value.flatten()[place] if value.dim() else value  # scalar until the first reset
                        assert count == index + 1 - start, "the step count does not run on"
    assert switched > 40


def test_switched_vectors_keep_their_moments(bench):
    site = bench(24, 20, r=6, interval=4)
    optimizer = torch.optim.AdamW(site.parameters())
    site.random_gradients()
    optimizer.step()
    before = {name: optimizer.state[p]["exp_avg"].clone() for name, p in site.tensors.items()}
    slots = site.state["slots"].clone()
    with site.around(1, optimizer):
        for factor, name in enumerate(("A", "B")):
            for (place,) in (slots != site.state["slots"])[factor].nonzero().tolist():
                after = optimizer.state[site.tensors[name]]["exp_avg"]
                assert torch.equal(after.select(factor, place), before[name].select(factor, place))


def test_infinite_gradients_of_frozen_vectors_are_dropped(bench):
    site = bench(interval=6, freeze_steps=3)
    optimizer = RowAdamW(site.parameters())
    for parameter in site.parameters():
        parameter.grad = torch.full_like(parameter, torch.inf)
    with site.around(0, optimizer):
        frozen = site.state["frozen_until"] > 0
        assert frozen.any()
        assert not site.tensors["A"].grad[frozen[0]].any()
        assert not site.tensors["B"].grad[:, frozen[1]].any()


# When, and which


def test_expected_rate():
    options = Options(r=128, interval=40, ratio=0.1)
    total = 1000
    assert options.expected_switches(0, total) == pytest.approx(128 / 40 * 0.3 ** (1 / 100))
    assert options.expected_switches(99, total) == pytest.approx(128 / 40 * 0.3)
    assert options.expected_switches(999, total) == pytest.approx(128 / 40 * 0.3**10)
    assert options.expected_switches(10**6, total) == pytest.approx(128 / 40 * 1e-8)


@pytest.mark.parametrize("step", [0, 20, 60])
def test_switches_per_step_follow_the_rate(bench, step):
    """4000 draws of the number; binomial standard error, five of them allowed."""
    site = bench(64, 64, r=32, interval=40, ratio=0.1)
    total, count = 400, 4000
    counts = []
    for seed in range(count):
        in_A, in_B = decide(site.options, site.state, step, total, random.Random(f"{seed}/{step}/q"))
        assert len(in_A.places) == len(in_B.places)
        counts.append(len(in_A.places))
    expected = 32 / 40 * 0.3 ** ((step + 1) / (0.1 * total))
    assert set(counts) <= {0, 1}
    assert sum(counts) / count == pytest.approx(expected, abs=5 * math.sqrt(expected * (1 - expected) / count))


def test_switches_of_a_run_follow_the_rate(bench):
    """Freezing hardly ever stands in the way at the default interval."""
    site = bench(40, 40, dtype=torch.float32, r=32, interval=40, freeze_steps=5, ratio=0.1, total_steps=2000)
    optimizer = still(site.parameters())
    switched = 0
    for index in range(600):
        before = site.state["next"][0].item()
        with site.around(index, optimizer):
            switched += (site.state["next"][0].item() - before) % 32
    expected = sum(site.options.expected_switches(index, 2000) for index in range(600))
    assert switched == pytest.approx(expected, abs=4 * math.sqrt(expected))


def test_consecutive_order(bench):
    site = bench(24, 20, r=6, interval=3)  # two a step
    optimizer = still(site.parameters())
    expected = [[14, 15, 16, 17, 18, 19], [17, 18, 19, 14, 15, 16]]
    candidate, place = [0, 0], [0, 3]
    for index in range(30):
        with site.around(index, optimizer):
            pass
        for factor in (0, 1):
            for _ in range(2):
                expected[factor][place[factor]] = candidate[factor]
                place[factor] = (place[factor] + 1) % 6
                candidate[factor] = (candidate[factor] + 1) % 20
        assert site.state["slots"].tolist() == expected
        assert site.state["next"].tolist() == place


def test_random_order_takes_free_candidates(bench):
    site = bench(24, 20, r=6, interval=3, order="random")
    taken = set()
    for seed in range(200):
        for exchange, slots in zip(
            decide(site.options, site.state, 0, 10**9, random.Random(seed)),
            site.state["slots"].tolist(),
            strict=True,
        ):
            assert len(set(exchange.slots)) == 2 and not set(exchange.slots) & set(slots)
            taken.update(exchange.slots)
    assert taken == set(range(14))


@pytest.mark.parametrize("shape, r, most", [((24, 20), 6, 3), ((24, 20), 19, 1), ((24, 20), 3, 1), ((4, 4), 2, 1)])
def test_the_number_is_clipped(bench, shape, r, most):
    """To half of the places, so that A's and B's have nothing in common, and to the spare candidates."""
    site = bench(*shape, r=r, interval=0.01)
    in_A, in_B = decide(site.options, site.state, 0, 10**9, random.Random(0))
    assert len(in_A.places) == len(in_B.places) == most
    assert not set(in_A.places) & set(in_B.places)


def test_decisions_are_keyed_by_seed_step_and_site(bench):
    def slots(seed, path, first=0):
        site = bench(24, 20, r=6, interval=3, order="random", seed=seed, path=path)
        optimizer = still(site.parameters())
        for index in range(first, first + 3):
            with site.around(index, optimizer):
                pass
        return site.state["slots"].tolist()

    assert slots(0, "a") == slots(0, "a")
    assert slots(0, "a") != slots(1, "a")
    assert slots(0, "a") != slots(0, "b")
    assert slots(0, "a") != slots(0, "a", first=1)


# Errors


@pytest.mark.parametrize(
    "options, message",
    [
        ({"interval": 9, "freeze_steps": 5}, "interval must be at least 2·freeze_steps = 10"),
        ({"r": 0}, "'r'"),
        ({"order": "shuffled"}, "'order'"),
        ({"weight_master": "bfloat16"}, "'weight_master'"),
        ({"intervall": 40}, "did you mean 'interval'"),
    ],
)
def test_options_that_are_not_allowed(options, message):
    with pytest.raises(pc.SpecError, match=message):
        pc.AdapterSpec(method="switchlora", options=options)


def test_dropout_is_refused():
    with pytest.raises(pc.SpecError, match="dropout"):
        pc.AdapterSpec(method="switchlora", dropout=0.1)


def test_options_and_their_defaults():
    assert Options().model_dump() == {
        "r": 128,
        "alpha": 1.0,
        "interval": 40,
        "ratio": 0.1,
        "total_steps": None,
        "freeze_steps": 5,
        "order": "consecutive",
        "offload_candidates": True,
        "weight_master": None,
    }


def test_the_length_of_the_run_must_be_known(bench):
    site = bench(total_steps=None)
    before = site.snapshot()
    with pytest.raises(pc.OptimizerStepError, match="total_steps"), site.around(0, still(site.parameters())):
        pass
    assert all(torch.equal(tensor, before[name]) for name, tensor in site.snapshot().items())
    with site.around(0, still(site.parameters()), total_steps=10**9):
        pass
    assert not torch.equal(site.weight, before["weight"])


def test_optimizers_that_are_not_understood_are_refused_before_the_first_step(bench):
    class AdamW8bit(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {})

    site = bench()
    before = site.snapshot()
    for optimizer in (AdamW8bit(site.parameters()), torch.optim.Adagrad(site.parameters())):
        name = type(optimizer).__name__
        refusal = pytest.raises(pc.OptimizerStepError, match=f"{name}; use peft_method_switchlora.RowAdamW")
        with refusal, site.around(0, optimizer):
            pass
    assert all(torch.equal(tensor, before[name]) for name, tensor in site.snapshot().items())


def test_packed_state_is_refused_before_anything_moved(bench):
    class AdamW8bit(torch.optim.AdamW):
        """A subclass of a known one."""

    site = bench()
    optimizer = AdamW8bit(site.parameters())
    A = site.tensors["A"]
    optimizer.state[A] = {"step": torch.tensor(1.0), "state1": torch.full(A.shape, 127, dtype=torch.uint8)}
    before = site.snapshot()
    with pytest.raises(pc.OptimizerStepError, match="AdamW8bit"), site.around(0, optimizer):
        pass
    assert all(torch.equal(tensor, before[name]) for name, tensor in site.snapshot().items())


def test_what_a_subclass_keeps_beside_the_moments_is_left_alone(bench):
    site = bench()
    optimizer = torch.optim.AdamW(site.parameters())
    A = site.tensors["A"]
    optimizer.state[A] = {"step": torch.tensor(1.0), "anchor": torch.ones_like(A)}
    with pytest.raises(pc.OptimizerStepError, match="AdamW"), site.around(0, optimizer):
        pass
    assert (optimizer.state[A]["anchor"] == 1).all()


@pytest.mark.parametrize("frozen", ["A", "B"])
def test_nothing_is_exchanged_where_a_factor_is_frozen(bench, frozen):
    site = bench()
    site.tensors[frozen].requires_grad_(False)
    before = site.snapshot()
    with site.around(0, still([tensor for tensor in site.parameters() if tensor.requires_grad])):
        pass
    assert all(torch.equal(tensor, before[name]) for name, tensor in site.snapshot().items())


def test_candidates_on_the_device(bench):
    """There is one device here: the way there is taken, and nothing is different."""
    ends = []
    for offload in (True, False):
        site = bench(offload_candidates=offload)
        optimizer = RowAdamW(site.parameters())
        for index in range(10):
            site.random_gradients()
            with site.around(index, optimizer):
                optimizer.step()
        ends.append(site.snapshot())
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
    (note,) = lay_out([site.site]).notes
    assert "offload_candidates" in note


def test_what_goes_to_an_accelerator_goes_there_together(monkeypatch):
    """The meta device stands for it: one copy for each type of number, shapes kept, and what is there already stays."""
    parts = [torch.arange(3), torch.arange(4), torch.randn(2, 5), torch.randn(0, 5)]
    stays = torch.randn(3)
    copies = []
    original = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda *a, **k: copies.append(a[0].numel()) or original(*a, **k))
    moved = switching.on_devices([*((part, torch.device("meta")) for part in parts), (stays, stays.device)])
    assert copies == [7, 10]
    assert [tuple(tensor.shape) for tensor in moved[:4]] == [(3,), (4,), (2, 5), (0, 5)]
    assert all(tensor.device.type == "meta" for tensor in moved[:4]) and moved[4] is stays


def test_candidates_are_on_the_device_before_anything_switches(bench, monkeypatch):
    """Memory is taken at the first step, not bit by bit as sites come to switch."""
    moved = []
    monkeypatch.setattr(switching, "move_candidates", moved.append)
    for offload in (True, False):
        site = bench(offload_candidates=offload, interval=1e12)
        with site.around(0, RowAdamW(site.parameters())):
            pass
    assert [member.site.options.offload_candidates for member in moved] == [False]


def test_the_exchange_reads_its_candidates_in_the_parameters_dtype(bench):
    """Candidates in float32 beside bfloat16 parameters: W takes up the difference of the rounded vectors."""
    site = bench(24, 20, dtype=torch.float32)
    tensors = {name: tensor.detach().bfloat16() for name, tensor in site.tensors.items()}
    before = site.weight + site.options.scale * tensors["B"].float() @ tensors["A"].float()
    member = pc.StepMember(site.site, tensors, {}, site.state, site.weight)
    choices = decide(site.options, site.state, 0, 10**9, random.Random(0))
    exchanges = [factor_exchange(member, name, choice) for name, choice in zip("AB", choices, strict=True)]
    fetch(exchanges)
    exchange_(site.weight, site.options.scale, *exchanges)
    after = site.weight + site.options.scale * tensors["B"].float() @ tensors["A"].float()
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)
