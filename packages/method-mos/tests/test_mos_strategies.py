"""What each of MoS's differentiation strategies means."""

import pytest
import torch
from torch import nn

import peft_core as pc
from peft_core.initial_values import initial_values
from peft_method_mos.kernels import gather_factors
from peft_method_mos.layout import Shards
from peft_method_mos.naive import factors

LAYERS, IN, OUT = 5, 12, 18


class Net(nn.Module):
    """`LAYERS` residual blocks with two module types."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(IN, OUT), "down": nn.Linear(OUT, IN)}) for _ in range(LAYERS)
        )

    def forward(self, x):
        for layer in self.layers:
            x = x + layer["down"](torch.tanh(layer["up"](x)))
        return x


def attached(seed=0, **options):
    """The model, its adapter with non-zero factors, and each site's (tensors, binding)."""
    model = Net().double()
    adapter = pc.attach(model, pc.AdapterSpec(method="mos", options=options, dtype="float64"), seed=seed)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return model, adapter


def bound(model, plan, seed=0):
    """Each site's binding, as first drawn."""
    drawn = initial_values(model, plan, seed)
    return {path: {name: drawn[key] for name, key in named.items()} for path, named in plan.bound().items()}


def sites(model, adapter, seed=0):
    values = dict(adapter.named_parameters())
    bindings = bound(model, adapter.plan, seed)
    keys = adapter.plan.borrowed()
    return {path: ({name: values[key] for name, key in keys[path].items()}, bindings[path]) for path in keys}


def indices(options, seed=0):
    """Module type → [L, 2 or 1, r, l], in the order of the layers."""
    model = Net()
    plan = pc.plan(model, pc.AdapterSpec(method="mos", options=options))
    drawn = bound(model, plan, seed)
    return {group.name: torch.stack([drawn[p]["index"] for p in group.members]) for group in plan.groups}


OPTIONS = {"r": 4, "equivalent_rank": 3, "shards": 3, "private_rank": 2}
VARIANTS = [
    OPTIONS,
    {**OPTIONS, "private_rank": 0, "r": 12},
    {**OPTIONS, "shards": 1, "pair_dissociation": False},
    {**OPTIONS, "r": 3, "private_rank": 3},
    {**OPTIONS, "random_scaling": {"mean": 2.0, "std": 1.0}, "alpha": 5.0},
    {"subset_selection": False, "equivalent_rank": 2, "random_scaling": True},
]


def test_no_public_shard_twice_in_a_site():
    for index in indices({**OPTIONS, "private_rank": 0, "r": 12}).values():
        for site in index.flatten(0, 1):
            assert len(site.unique()) == site.numel() == 12 * 3
            assert site.min() >= 0 and site.max() < LAYERS * 3 * 3


def test_private_shards_belong_to_one_site_and_fill_its_last_rows():
    public = LAYERS * (3 - 2) * 3
    for index in indices(OPTIONS).values():
        own = index[:, :, -2:]
        assert (index[:, :, :-2] < public).all()
        assert torch.equal(own[:, 0], own[:, 1])
        shards = own[:, 0].flatten()
        assert sorted(shards.tolist()) == list(range(public, LAYERS * 3 * 3))


def test_every_rank_may_be_private():
    for index in indices({**OPTIONS, "r": 3, "private_rank": 3}).values():
        assert index[:, 0].flatten().tolist() == list(range(LAYERS * 3 * 3))


def test_pairs_differ_exactly_when_dissociated():
    for together, apart in zip(
        indices({**OPTIONS, "pair_dissociation": False}).values(), indices(OPTIONS).values(), strict=True
    ):
        assert together.shape == (LAYERS, 1, 4, 3) and apart.shape == (LAYERS, 2, 4, 3)
        assert not any(torch.equal(site[0, :-2], site[1, :-2]) for site in apart)
        assert torch.equal(together[:, 0], apart[:, 0])


def test_one_shard_makes_whole_rows():
    model, adapter = attached(**{**OPTIONS, "shards": 1})
    for tensors, binding in sites(model, adapter).values():
        A, B = factors(tensors, binding, torch.float64)
        rows = tensors["pool_A"]
        assert all(any(torch.equal(row, other) for other in rows) for row in A)
        assert all(any(torch.equal(column, other) for other in tensors["pool_B"]) for column in B.T)


def test_all_off_is_pure_sharing():
    """Each site takes the whole pool; so does, in another order, a site that draws all of it."""
    off, whole = attached(subset_selection=False, equivalent_rank=2, alpha=6.0)
    drawing, drawn = attached(
        r=LAYERS * 2,
        equivalent_rank=2,
        alpha=6.0,
        shards=1,
        private_rank=0,
        pair_dissociation=False,
    )
    for path, (tensors, binding) in sites(off, whole).items():
        A, B = factors(tensors, binding, torch.float64)
        assert binding == {}
        assert torch.equal(A, tensors["pool_A"]) and torch.equal(B, tensors["pool_B"].T)
        assert A.shape[0] == LAYERS * 2
        merged = off.get_submodule(path).weight + 6.0 / (LAYERS * 2) * B @ A
        whole.merge()
        torch.testing.assert_close(off.get_submodule(path).weight, merged)
        whole.unmerge()
    x = torch.randn(7, IN, dtype=torch.float64)
    torch.testing.assert_close(off(x), drawing(x))
    off(x).square().sum().backward()
    drawing(x).square().sum().backward()
    for ours, theirs in zip(whole.parameters(), drawn.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_with_subset_selection_off_the_other_strategies_say_nothing():
    spec = {"subset_selection": False, "equivalent_rank": 2}
    plain = pc.plan(Net(), pc.AdapterSpec(method="mos", options=spec))
    told = pc.plan(Net(), pc.AdapterSpec(method="mos", options={**spec, "r": 3, "shards": 7, "private_rank": 1}))
    assert told.groups == plain.groups and told.bindings == plain.bindings


def test_random_scaling_is_a_fixed_factor_between_a_and_b():
    """Scaled ΔW = (alpha/r)·B·diag(c)·A, with c drawn from N(mean, std)/mean."""
    model, adapter = attached(**{**OPTIONS, "random_scaling": {"mean": 2.0, "std": 1.0}})
    vectors = []
    for tensors, binding in sites(model, adapter).values():
        A, B = factors(tensors, binding, torch.float64)
        plain, same = factors(tensors, {"index": binding["index"]}, torch.float64)
        torch.testing.assert_close(B @ A, same @ torch.diag(binding["scaling"].double()) @ plain)
        vectors.append(binding["scaling"])
    assert len({tuple(vector.tolist()) for vector in vectors}) == len(vectors)
    many = pc.plan(
        Net(), pc.AdapterSpec(method="mos", options={"subset_selection": False, "equivalent_rank": 400,
                                                     "random_scaling": {"mean": 2.0, "std": 1.0}})
    )  # fmt: skip
    drawn = torch.cat([binding["scaling"] for binding in bound(Net(), many).values()])
    assert abs(drawn.mean() - 1.0) < 0.02 and abs(drawn.std() - 0.5) < 0.02


def test_the_same_seed_gives_the_same_indices_everywhere():
    """These values are what any machine and any number of processes must draw."""
    index = indices({**OPTIONS, "pair_dissociation": False})["up"]
    assert index[0, 0].tolist() == [[10, 5, 3], [8, 6, 2], [15, 16, 17], [18, 19, 20]]
    generator = torch.Generator().manual_seed(3)
    drawn = Shards(6, (6, 8)).draw((2, 3, 2), generator).tolist()
    assert drawn == [[[4, 0], [3, 2], [6, 7]], [[0, 1], [3, 4], [6, 7]]]
    assert not torch.equal(indices(OPTIONS, seed=1)["up"], indices(OPTIONS, seed=0)["up"])
    torch.manual_seed(99)  # the process's own generator plays no part
    assert torch.equal(indices({**OPTIONS, "pair_dissociation": False})["up"], index)


def test_loading_uses_the_stored_indices(tmp_path, monkeypatch):
    model, adapter = attached(seed=5, **{**OPTIONS, "random_scaling": True})
    x = torch.randn(7, IN, dtype=torch.float64)
    expected = model(x)
    adapter.save(tmp_path)

    def draw(self, shape, generator):
        raise AssertionError("loading drew anew")

    monkeypatch.setattr(Shards, "draw", draw)
    other = Net().double()
    loaded = pc.load(other, tmp_path)
    assert torch.equal(other(x), expected)
    assert loaded.plan == adapter.plan


def by_hand(pool, index):
    """A factor's rows from the definition, shard by shard."""
    return torch.stack([torch.cat([pool[int(shard)] for shard in row]) for row in index])


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_factors_are_what_the_definition_says(options):
    model, adapter = attached(**options)
    x = torch.randn(7, OUT, dtype=torch.float64)
    for path, (tensors, binding) in sites(model, adapter).items():
        site = next(site for site in adapter.plan.sites if site.path == path)
        A, Bt = tensors["pool_A"], tensors["pool_B"]
        if "index" in binding:
            A, Bt = by_hand(A, binding["index"][0]), by_hand(Bt, binding["index"][-1])
        c = binding["scaling"].double() if "scaling" in binding else torch.ones(len(A), dtype=torch.float64)
        delta = adapter.plan.spec.options["alpha"] / len(A) * Bt.T @ torch.diag(c) @ A
        for made in (factors, gather_factors):
            ours = made(tensors, binding, torch.float64)
            torch.testing.assert_close(adapter.plan.spec.options["alpha"] / len(A) * ours[1] @ ours[0], delta)
        lowrank = pc.plugins.call("mos", "peft_lowrank", site=site, tensors=tensors, binding=binding)
        assert lowrank.A.shape == (len(A), site.in_features) and lowrank.B.shape == (
            site.out_features,
            len(A),
        )
        torch.testing.assert_close(lowrank.B @ lowrank.A, delta, rtol=1e-12, atol=1e-12)
        forward = pc.plugins.call("mos", "peft_forward", site=site)
        naive = forward.naive(x[:, : site.in_features], tensors, binding)
        torch.testing.assert_close(naive, x[:, : site.in_features] @ delta.T)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_gradient_of_a_pool_is_the_sum_over_its_uses(options):
    """Against autograd through every site's own copy of the pools, summed by hand, in float64."""
    model, adapter = attached(**options)
    x = torch.randn(7, IN, dtype=torch.float64)
    model(x).square().sum().backward()
    uses, keys = sites(model, adapter), adapter.plan.borrowed()
    copies = {
        path: {name: pool.detach().clone().requires_grad_() for name, pool in tensors.items()}
        for path, (tensors, _) in uses.items()
    }
    h = x
    for number, layer in enumerate(model.layers):
        deltas = {}
        for kind in ("up", "down"):
            path = f"layers.{number}.{kind}"
            tensors, binding = copies[path], uses[path][1]
            A, Bt = tensors["pool_A"], tensors["pool_B"]
            if "index" in binding:
                A, Bt = by_hand(A, binding["index"][0]), by_hand(Bt, binding["index"][-1])
            if "scaling" in binding:
                A = A * binding["scaling"].double()[:, None]
            scale = adapter.plan.spec.options["alpha"] / len(A)
            base = layer[kind]
            deltas[kind] = lambda z, base=base, A=A, Bt=Bt, s=scale: (
                nn.functional.linear(z, base.weight, base.bias) + s * (z @ A.T) @ Bt
            )
        h = h + deltas["down"](torch.tanh(deltas["up"](h)))
    h.square().sum().backward()
    for key, parameter in adapter.named_parameters():
        total = sum(
            copies[path][name].grad for path, named in keys.items() for name, found in named.items() if found == key
        )
        torch.testing.assert_close(parameter.grad, total, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", [OPTIONS, {"subset_selection": False}], ids=str)
def test_gradients_have_the_same_bits_in_every_run(options):
    def gradients():
        model, adapter = attached(**options)
        model = model.float()
        x = torch.randn(64, IN, generator=torch.Generator().manual_seed(2))
        for _ in range(2):  # accumulated, too
            model(x).square().mean().backward()
        return [parameter.grad for parameter in adapter.parameters()]

    first = gradients()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))


@pytest.mark.parametrize("layers", [2, 50])
def test_a_site_pays_for_its_own_shards_only(layers):
    """What a site returns for a pool does not grow with the number of sites, and names no row twice."""
    sites_ = [pc.Site(f"layers.{n}.up", IN, OUT, False, torch.float32) for n in range(layers)]
    options = pc.methods()["mos"].options(r=3, equivalent_rank=2, shards=3, private_rank=1)
    sites_ = [pc.Site(s.path, IN, OUT, False, s.dtype, options) for s in sites_]
    layout = pc.plugins.call("mos", "peft_init", sites=sites_)
    pools = {name: torch.randn(spec.shape) for name, spec in layout.groups[0].tensors.items()}
    index = layout.bindings[sites_[-1].path]["index"]
    binding = {"index": index.init.draw(index.shape, torch.Generator().manual_seed(0))}
    forward = pc.plugins.call("mos", "peft_forward", site=sites_[-1])
    x, dy = torch.randn(4, IN), torch.randn(4, OUT)
    saved = forward.add_(x, torch.zeros(4, OUT), pools, binding)
    assert [tuple(tensor.shape) for tensor in saved] == [(4, IN), (4, 3), (3, IN), (OUT, 3)]
    for name, width in (("pool_A", IN // 3), ("pool_B", OUT // 3)):
        rows = forward.grad_(dy, None, saved, pools, binding)[name]
        assert isinstance(rows, pc.Rows)
        assert rows.values.shape == (9, width) and len(rows.index.unique()) == 9
