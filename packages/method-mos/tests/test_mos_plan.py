"""What MoS's plans cost, show and refuse."""

import pytest
import torch
import transformers
from torch import nn

import peft_core as pc

# LLaMA-2's widths: hidden, intermediate, layers, heads.
LLAMA_2 = {"7B": (4096, 11008, 32, 32), "13B": (5120, 13824, 40, 40)}


@pytest.fixture(scope="module", params=LLAMA_2)
def llama(request):
    hidden, inner, layers, heads = LLAMA_2[request.param]
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads
    )
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def smol():
    """SmolLM2-135M's shapes."""
    config = transformers.LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=64,
    )
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


def planned(model, overrides=None, **options):
    return pc.plan(model, pc.AdapterSpec(method="mos", options=options, overrides=overrides or {}))


def lora_count(model, r):
    sites = planned(model, subset_selection=False).sites
    return sum(r * (site.in_features + site.out_features) for site in sites)


@pytest.mark.parametrize("e", [2, 8])
@pytest.mark.parametrize(
    "options",
    [
        {"r": 16},
        {"r": 8, "shards": 1, "private_rank": 0},
        {"r": 32, "shards": 8, "private_rank": 1},
        {"r": 9, "shards": 2, "pair_dissociation": False, "random_scaling": True},
        {"subset_selection": False},
    ],
    ids=str,
)
def test_costs_what_lora_of_the_equivalent_rank_costs(llama, e, options):
    plan = planned(llama, equivalent_rank=e, **options)
    assert plan.num_trainable == lora_count(llama, e)
    if llama.config.hidden_size == 4096:
        assert plan.num_trainable == {2: 4_997_120, 8: 19_988_480}[e]


def test_shows_who_shares(smol):
    plan = planned(smol)
    assert [group.name for group in plan.groups] == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    ]  # fmt: skip
    assert all(len(group.members) == 30 for group in plan.groups)
    row = next(line for line in str(plan).replace("\u00d7", "x").splitlines() if "k_proj" in line)
    assert "pool_A" in row and "240x144" in row and "1 x 30" in row


def test_is_at_least_seven_times_smaller_than_lora_r16(smol, tmp_path):
    plan = planned(smol, r=16, equivalent_rank=2)
    bindings = [tensor for named in plan.bindings.values() for tensor in named.values()]
    unique = plan.trainable_bytes + sum(tensor.nbytes(torch.float32) for tensor in bindings)
    lora = 4 * lora_count(smol, 16)
    assert lora >= 7 * unique
    real = smol.to_empty(device="cpu")
    pc.attach(real, plan.spec).save(tmp_path)
    stored = (tmp_path / "adapter.safetensors").stat().st_size
    assert lora >= 7 * stored
    assert stored <= 1.01 * unique


def test_sites_of_unequal_shape_have_pools_of_their_own():
    config = transformers.RobertaConfig(num_hidden_layers=12)
    with torch.device("meta"):
        model = transformers.RobertaModel(config, add_pooling_layer=False)
    plan = planned(model, r=8)
    shapes = {group.name: (len(group.members), group.tensors["pool_B"].shape) for group in plan.groups}
    assert shapes["dense.768x768"] == (12, (12 * 8, 192))
    assert shapes["dense.3072x768"] == (12, (12 * 8, 768))
    assert shapes["dense.768x3072"] == (12, (12 * 8, 192))
    assert plan.num_trainable == lora_count(model, 2)


def test_options_may_differ_by_type(smol):
    plan = planned(smol, {"down_proj": {"subset_selection": False}, "q_proj": {"shards": 2}})
    pools = {group.name: group.tensors["pool_A"].shape for group in plan.groups}
    assert pools["down_proj"] == (60, 1536) and pools["q_proj"] == (120, 288) and pools["k_proj"] == (240, 144)
    assert "index" not in plan.bindings["model.layers.0.mlp.down_proj"]
    assert any("down_proj 60" in note for note in plan.notes)


def block(k=12, d=18, layers=3):
    return nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(k, d)}) for _ in range(layers))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"r": 4, "shards": 4},
            ["'proj'", "shards 4", "12 in, 18 out", "values that do: 1, 2, 3, 6 (for", "or exclude it"],
        ),
        ({"r": 2, "equivalent_rank": 3}, ["equivalent_rank 3", "r 2", "set r ≥ 3"]),
        ({"r": 4, "private_rank": 3}, ["private_rank 3", "equivalent_rank 2", "set private_rank ≤ 2"]),
        ({"r": 4, "private_rank": 2}, ["private_rank 2", "set private_rank ≤ 1 or r = 2"]),
        (
            {"r": 5, "shards": 1},
            ["'proj' has 3 layers", "= 3 public", "private_rank = 4", "r ≤ 4", "rank ≥ 3"],
        ),
        ({"random_scaling": {"mean": 0}}, ["random_scaling", "too close to 0"]),
        ({"shard": 2}, ["'shard'", "did you mean 'shards'"]),
        ({"alpha": float("nan")}, ["alpha"]),
    ],
    ids=str,
)
def test_bad_options_are_refused_with_a_remedy(options, said):
    with pytest.raises((pc.PlanError, pc.SpecError)) as caught:
        planned(block(), **options)
    message = str(caught.value)
    assert "\n" not in message
    for part in said:
        assert part in message


@pytest.mark.parametrize("options", [{"r": 4, "shards": 6}, {"r": 3, "equivalent_rank": 2, "shards": 3}], ids=str)
def test_a_remedy_works(options):
    assert planned(block(), **options).num_trainable == 3 * 2 * (12 + 18)
