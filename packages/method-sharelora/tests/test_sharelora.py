"""What ShareLoRA's plans cost and refuse, and that its factors are shared as asked."""

import copy
import weakref

import peft
import pytest
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import peft_core as pc
from peft_core.testing.families import FAMILIES

LLAMA_7 = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def meta(model, config, **settings):
    with torch.device("meta"):
        return getattr(transformers, model)(getattr(transformers, config)(**settings))


def llama(hidden, inner, layers, heads):
    return meta(
        "LlamaForCausalLM",
        "LlamaConfig",
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )


def roberta(**settings):
    return meta("RobertaModel", "RobertaConfig", **settings)


BASE = {}
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}


def planned(model, targets="all-linear", **options):
    return pc.plan(model, pc.AdapterSpec(method="sharelora", targets=targets, options=options))


def count(model, targets="all-linear", **options):
    return planned(model, targets, **options).num_trainable


def test_counts_on_llama_2_7b():
    model = llama(4096, 11008, 32, 32)
    assert count(model, r=64, share="none") == 159_907_840
    assert count(model, r=64) == 89_309_184
    assert round(100 * (89_309_184 / 159_907_840 - 1)) == -44


def test_counts_on_llama_2_13b():
    model = llama(5120, 13824, 40, 40)
    assert count(model, r=64, share="none") == 250_347_520
    assert count(model, r=64) == 139_165_696


@pytest.mark.parametrize(
    ("settings", "share", "expected"),
    [(BASE, "A", 159_744), (LARGE, "A", 409_600), (LARGE, "AB", 32_768), (LARGE, "none", 786_432)],
    ids=["base-A", "large-A", "large-AB", "large-none"],
)
def test_counts_on_roberta(settings, share, expected):
    assert count(roberta(**settings), ["query", "value"], r=8, share=share) == expected


class Net(nn.Module):
    """Residual blocks whose two types have different shapes."""

    def __init__(self, layers=6, hidden=12, inner=50):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(hidden, inner), "down": nn.Linear(inner, hidden)}) for _ in range(layers)
        )

    def forward(self, x):
        for layer in self.layers:
            x = x + layer["down"](torch.tanh(layer["up"](x)))
        return x


def owners(plan):
    """Key → number of borrowers."""
    return {f"{group.name}.{name}": len(group.members) for group in plan.groups for name in group.tensors}


@pytest.mark.parametrize(
    ("share", "common", "own"), [("A", "A", "B"), ("B", "B", "A"), ("AB", "AB", ""), ("none", "", "AB")]
)
def test_share_says_which_factors_are_common(share, common, own):
    expected = {f"shared.{kind}.{factor}": 6 for kind in ("up", "down") for factor in common}
    expected |= {f"layers.{n}.{kind}.{factor}": 1 for n in range(6) for kind in ("up", "down") for factor in own}
    plan = planned(Net(), r=3, share=share)
    assert owners(plan) == expected
    if common:
        assert "1 \u00d7 6" in str(plan)


def test_the_last_pattern_that_matches_decides():
    plan = planned(Net(), r=3, share={".*": "A", "down": "AB", r"layers\.[01]\.down": "none"})
    found = owners(plan)
    assert found["shared.up.A"] == 6 and found["layers.5.up.B"] == 1
    assert found["shared.down.A"] == found["shared.down.B"] == 4
    assert found["layers.0.down.A"] == found["layers.1.down.B"] == 1
    assert "layers.2.down.B" not in found


def test_a_site_that_no_pattern_matches_is_plain_lora():
    found = owners(planned(Net(), r=3, share={"up": "AB"}))
    assert found["shared.up.A"] == found["shared.up.B"] == 6
    assert found["layers.0.down.A"] == found["layers.0.down.B"] == 1


def test_scope_is_blocks_of_consecutive_layers():
    plan = planned(Net(), r=3, scope=4)
    members = [group.members for group in plan.groups if "A" in group.tensors and group.members[0].endswith("up")]
    assert members == [tuple(f"layers.{n}.up" for n in block) for block in ((0, 1, 2, 3), (4, 5))]
    assert planned(Net(), r=3, scope=6).num_trainable == planned(Net(), r=3).num_trainable
    alone = planned(Net(), r=3, scope=1)
    assert alone.num_trainable == planned(Net(), r=3, share="none").num_trainable


def test_sites_of_unequal_shape_share_nothing():
    groups = planned(roberta(), r=8).groups
    shared = {group.name: group.tensors["A"].shape for group in groups if group.name.startswith("shared.")}
    assert shared["shared.dense.3072x768"] == (8, 768) and shared["shared.dense.768x3072"] == (8, 3072)
    # The pooler has attention.output.dense's name and shape, and shares its A.
    assert len(next(group for group in groups if group.name == "shared.dense.768x768").members) == 13


def test_a_model_whose_layers_are_the_root_itself():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    assert owners(planned(model, r=2)) == {"shared.0.A": 1, "0.B": 1, "shared.1.A": 1, "1.B": 1}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"share": {"up": "A", "q_proj": "AB"}}, ["share['q_proj']", "matches none", "(up, down)"]),
        ({"share": {}}, ["'share'", "'A', 'B', 'AB' or 'none'"]),
        ({"share": {"up": "C"}}, ["'share'", "'A', 'B', 'AB' or 'none'"]),
        ({"share": "a"}, ["'share'", "'A', 'B', 'AB' or 'none'"]),
        ({"share": {"(": "A"}}, ["'('", "regex"]),
        ({"scope": 0}, ["'scope'", "'all' or a number"]),
        ({"scope": "layers"}, ["'scope'", "'all' or a number"]),
        ({"r": 0}, ["'r'"]),
        ({"rank": 8}, ["'rank' is not a field"]),
    ],
    ids=str,
)
def test_bad_options_are_refused_with_a_remedy(options, said):
    with pytest.raises(pc.PeftCoreError) as caught:
        planned(Net(), **options)
    message = str(caught.value)
    assert "\n" not in message
    for part in said:
        assert part in message


def test_the_spec_round_trips():
    spec = pc.AdapterSpec(method="sharelora", options={"share": {".*": "A", "down": "AB"}, "scope": 2})
    for other in (pc.AdapterSpec.from_json(spec.to_json()), pc.AdapterSpec.from_yaml(spec.to_yaml())):
        assert other == spec
        assert list(other.options["share"]) == [".*", "down"]  # their order means something


@pytest.fixture(scope="module")
def lora():
    """The field's LoRA on a tiny LLaMA in float64: (base, inputs, logits, factors with their gradients)."""
    family = FAMILIES["llama"]
    base = family.build(dtype=torch.float64)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=list(LLAMA_7))
    torch.manual_seed(0)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).double().eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_A" in name:  # the same in all layers of a type, so that it can stand for a shared factor, too
                kind = next(n for n, t in enumerate(LLAMA_7) if t in name)
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(kind))
            elif "lora_B" in name:
                parameter.normal_(0, 0.2)
    inputs = family.inputs()
    logits = theirs(**inputs).logits
    logits.square().mean().backward()
    found = {}
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            path, _, factor = (
                name.removeprefix("base_model.model.").removesuffix(".default.weight").rpartition(".lora_")
            )
            found[f"{path}.{factor}"] = parameter
    return base, inputs, logits.detach(), found


def ours(lora, share, **options):
    """Our adapter with the library's factors: (adapter, logits), gradients computed."""
    base, inputs, _, factors = lora
    model = copy.deepcopy(base)
    spec = pc.AdapterSpec(method="sharelora", dtype="float64", options={"r": 4, "alpha": 6, "share": share, **options})
    adapter = pc.attach(model, spec)
    keys = {key: f"{group.members[0]}.{name}" for group in adapter.plan.groups for name in group.tensors
            for key in [f"{group.name}.{name}"]}  # fmt: skip
    with torch.no_grad():
        for key, parameter in adapter.named_parameters():
            parameter.copy_(factors[keys[key]])
    logits = model(**inputs).logits
    logits.square().mean().backward()
    return adapter, logits


@pytest.mark.parametrize("kernels", ["torch", "naive"])
def test_none_is_the_lora_of_the_field(lora, kernels):
    with pc.kernels(kernels):
        adapter, logits = ours(lora, "none")
    torch.testing.assert_close(logits, lora[2], rtol=1e-10, atol=1e-12)
    factors = lora[3]
    assert len(factors) == len(list(adapter.parameters())) == 2 * 7 * 2
    for key, parameter in adapter.named_parameters():
        torch.testing.assert_close(parameter.grad, factors[key].grad, rtol=1e-9, atol=1e-12, msg=key)


@pytest.mark.parametrize("options", [{}, {"scope": 1}], ids=str)
def test_gradient_of_a_shared_factor_is_the_sum_over_its_sites(lora, options):
    adapter, logits = ours(lora, "A", **options)
    torch.testing.assert_close(logits, lora[2], rtol=1e-10, atol=1e-12)
    parameters = dict(adapter.named_parameters())
    for group in adapter.plan.groups:
        for name in group.tensors:
            total = sum(lora[3][f"{member}.{name}"].grad for member in group.members)
            grad = parameters[f"{group.name}.{name}"].grad
            torch.testing.assert_close(grad, total, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("share", ["A", "B", "AB", "none"])
def test_factors_are_exact(share):
    """ΔW = B·A with the scale inside, from 16-bit parameters as well."""
    for dtype in ("float32", "bfloat16"):
        adapter = pc.attach(Net(), pc.AdapterSpec(method="sharelora", dtype=dtype, options={"r": 3, "share": share}))
        values, keys = dict(adapter.named_parameters()), adapter.plan.borrowed()
        with torch.no_grad():
            for parameter in values.values():
                parameter.normal_()
        for site in adapter.plan.sites:
            tensors = {name: values[key].detach() for name, key in keys[site.path].items()}
            found = pc.plugins.call("sharelora", "peft_lowrank", site=site, tensors=tensors, binding={})
            weight = torch.zeros(site.out_features, site.in_features, dtype=torch.float64)
            merged = pc.plugins.call("sharelora", "peft_merge", site=site, weight=weight, tensors=tensors, binding={})
            assert (found.B.double() @ found.A.double() - merged).abs().max() <= 1e-6 * merged.abs().max()


class Live(TorchDispatchMode):
    """The most storages of one size, `known` ones aside, that are alive at the same time."""

    def __init__(self, nbytes, known):
        super().__init__()
        self.nbytes, self.known, self.seen, self.peak = nbytes, known, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() == self.nbytes:
                self.seen.append(weakref.ref(tensor))
        alive = [tensor for ref in self.seen if (tensor := ref()) is not None]
        self.peak = max(self.peak, len({tensor.untyped_storage().data_ptr() for tensor in alive} - self.known))
        return out


def test_the_count_of_living_storages_sees_them():
    with Live(40, known=set()) as live:
        kept = [torch.zeros(10) + n for n in range(5)]
        kept[0].view(2, 5)
    assert live.peak == len(kept) + 1


@pytest.mark.parametrize(
    ("share", "factor", "size"), [("A", "A", 84), ("B", "B", 350), ("AB", "A", 84), ("AB", "B", 350)]
)
def test_a_shared_gradient_costs_one_temporary(share, factor, size):
    """Of a shared factor's size backward makes its sum and one temporary at a time, for however many sites."""
    model = Net(layers=8, hidden=12, inner=50)
    spec = pc.AdapterSpec(method="sharelora", targets=["up"], options={"r": 7, "share": share})
    adapter = pc.attach(model, spec)
    shared = dict(adapter.named_parameters())[f"shared.up.{factor}"]
    assert shared.numel() == size
    for _ in range(2):  # into no gradient, and into one that is there
        loss = model(torch.randn(9, 12)).square().mean()
        there = [t for p in adapter.parameters() for t in (p, p.grad) if t is not None]
        with Live(4 * size, known={t.untyped_storage().data_ptr() for t in there}) as live:
            loss.backward()
        assert live.peak == 2
        assert shared.grad is not None
