"""Choosing sites: what each way of naming layers selects, and what is said where it selects nothing."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

import peft_core as pc
from peft_core import AdapterSpec
from peft_core.testing.checks import randomise


def chosen(model: nn.Module, **fields) -> list[str]:
    return [site.path for site in pc.plan(model, AdapterSpec(method="sound", **fields)).sites]


def test_all_linear_leaves_out_the_head(llama) -> None:
    found = chosen(llama)
    assert len(found) == 14 and "lm_head" not in found
    assert found[0] == "model.layers.0.self_attn.q_proj", "not in the model's order"


def test_all_linear_leaves_out_a_tied_head_and_the_classifier(gpt2, bert) -> None:
    assert {path.rpartition(".")[2] for path in chosen(gpt2)} == {"c_attn", "c_proj", "c_fc"}
    assert "classifier" not in chosen(bert)


def test_a_head_can_be_asked_for_by_name(llama) -> None:
    assert chosen(llama, targets=["lm_head"]) == ["lm_head"]


def test_sites_know_their_layer(llama, gpt2) -> None:
    site = pc.plan(llama, AdapterSpec(method="sound", targets=["down_proj"])).sites[1]
    assert (site.path, site.type, site.layer) == ("model.layers.1.mlp.down_proj", "down_proj", 1)
    assert (site.in_features, site.out_features, site.transposed, site.dtype) == (
        72,
        48,
        False,
        torch.float32,
    )
    site = pc.plan(gpt2, AdapterSpec(method="sound", targets=["c_attn"])).sites[0]
    assert (site.in_features, site.out_features, site.transposed) == (48, 144, True)


def test_names_and_suffixes_match_whole_components(llama) -> None:
    assert len(chosen(llama, targets=["q_proj", "v_proj"])) == 4
    assert chosen(llama, targets=["layers.1.self_attn.q_proj"]) == ["model.layers.1.self_attn.q_proj"]
    assert chosen(llama, targets=["model.layers.0.mlp.up_proj"]) == ["model.layers.0.mlp.up_proj"]
    with pytest.raises(pc.TargetError):
        chosen(llama, targets=["proj"])


def test_a_regex_matches_whole_paths(llama) -> None:
    assert len(chosen(llama, targets=r".*self_attn\.[qk]_proj")) == 4
    with pytest.raises(pc.TargetError):
        chosen(llama, targets=r"self_attn\.[qk]_proj")


def test_names_that_do_not_print_are_escaped(llama, refused) -> None:
    with refused(pc.TargetError, r"'\n\x00'"):
        pc.plan(llama, pc.AdapterSpec(method="sound", exclude="\n\0"))


def test_exclude(llama) -> None:
    assert len(chosen(llama, exclude=["down_proj", "layers.0.mlp.up_proj"])) == 11
    assert len(chosen(llama, exclude=r".*\.mlp\..*")) == 8


def test_layers(llama) -> None:
    assert all(".layers.1." in path for path in chosen(llama, layers=[1]))
    assert len(chosen(llama, layers=[1])) == 7


def test_the_last_matching_override_wins(llama) -> None:
    overrides = {"q_proj": {"r": 2}, r".*layers\.1\..*": {"r": 3}, "layers.1.mlp.up_proj": {"alpha": 1.0}}
    plan = pc.plan(llama, AdapterSpec(method="sound", overrides=overrides))
    options = {site.path: site.options for site in plan.sites}
    assert options["model.layers.0.self_attn.k_proj"].r == 4
    assert options["model.layers.0.self_attn.q_proj"].r == 2
    assert options["model.layers.1.self_attn.q_proj"].r == 3
    assert (options["model.layers.1.mlp.up_proj"].r, options["model.layers.1.mlp.up_proj"].alpha) == (3, 1.0)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"targets": ["q_prj"]}, ["'q_prj'", "did you mean 'q_proj'?", "q_proj (2)", "down_proj (2)"]),
        ({"targets": ["q_proj", "nothing"]}, ["'nothing'", "q_proj (2)"]),
        ({"targets": r".*nothing"}, ["regex '.*nothing'", "q_proj (2)"]),
        ({"targets": "q_proj"}, ["write ['q_proj']"]),
        ({"targets": "("}, ["'('", "not a valid regex"]),
        ({"targets": ["embed_tokens"]}, ["'embed_tokens' is a Embedding", "train_modules"]),
        ({"targets": ["input_layernorm"]}, ["'input_layernorm'", "train_modules"]),
        ({"targets": []}, ["targets", "q_proj (2)"]),
        ({"exclude": ["nothing"]}, ["exclude", "'nothing'"]),
        ({"targets": ["q_proj"], "exclude": ["self_attn.q_proj"]}, ["nothing is left"]),
        ({"layers": [7]}, ["layers: 7", "0 to 1"]),
        ({"layers": []}, ["nothing is left"]),
        ({"overrides": {"nothing": {"r": 2}}}, ["overrides: 'nothing'"]),
        ({"targets": ["q_proj"], "overrides": {"k_proj": {"r": 2}}}, ["overrides: 'k_proj'"]),
        ({"train_modules": ["lm_hed"]}, ["'lm_hed'", "did you mean 'lm_head'?"]),
        ({"train_modules": ["act_fn"]}, ["'model.layers.0.mlp.act_fn' has no parameters"]),
        ({"train_modules": ["mlp", "up_proj"]}, ["lies within another module"]),
        (
            {"targets": ["lm_head"], "train_modules": ["layers"]},
            ["'model.layers' is a ModuleList", "name the modules in it"],
        ),
        ({"targets": ["q_proj"], "train_modules": ["q_proj"]}, ["'model.layers.0.self_attn.q_proj' is both"]),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_mistakes_name_what_there_is(llama, fields, words, refused) -> None:
    with refused(pc.TargetError, *words):
        chosen(llama, **fields)


def test_a_model_without_linear_layers(refused) -> None:
    with refused(pc.TargetError, "no layer that can be adapted"):
        chosen(nn.Sequential(nn.Conv2d(3, 3, 1)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(24, 2)
        self.project = nn.Linear(24, 24)


def test_a_layer_without_outputs_is_left_out() -> None:
    assert chosen(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 0))) == ["0"]


def test_layers_that_their_framework_bypasses_are_refused(refused) -> None:
    model = Attention()
    plan = pc.plan(model, AdapterSpec(method="sound"))
    assert [site.path for site in plan.sites] == ["project"]
    assert any("out_proj (1)" in note for note in plan.notes)
    with refused(pc.TargetError, "'attention.out_proj' is not called", "MultiheadAttention", "exclude"):
        chosen(model, targets=["out_proj"])


class Reader(nn.Module):
    """Reads two of its layers' weights, calls the others in one way or another."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("read", "matmul", "called", "listed", "handed", "fetched", "described"):
            self.add_module(name, nn.Linear(24, 24))
        nn.init.zeros_(self.listed.weight)

    def forward(self, x):
        y = nn.functional.linear(x, self.read.weight, self.read.bias) + x @ self.matmul.weight.t()
        y = nn.functional.normalize(self.called(y), p=float(self.called.weight.abs().max()))
        for layer in (self.listed,):
            y = layer(y)
        y = getattr(self, "fetched")(y + self.fetched.weight.sum())  # noqa: B009
        return self.apply_to(self.handed, y) + self.described.in_features * y.to(self.described.weight.dtype)

    def apply_to(self, layer, x):
        return layer(x)


class CallsMore(Reader):
    def forward(self, x):
        return super().forward(self.read(x))


def test_layers_whose_weights_their_parent_reads_are_found_in_its_code(refused) -> None:
    model = Reader()
    plan = pc.plan(model, AdapterSpec(method="sound"))
    assert [site.path for site in plan.sites] == ["called", "listed", "handed", "fetched", "described"]
    assert any("does not call them, or not always: read (1), matmul (1)" in note for note in plan.notes)
    with refused(pc.TargetError, "'read' is not called", "Reader"):
        chosen(model, targets=["read"])
    with refused(pc.TargetError, "'matmul'", "without calling it"):
        chosen(model, targets=["called"], train_modules=["matmul"])
    assert "read" in chosen(CallsMore())
    randomise(pc.attach(model, AdapterSpec(method="sound")))
    assert chosen(model) == ["called", "listed", "handed", "fetched", "described"], "an adapted model reads otherwise"


def test_layers_that_transformers_bypasses_are_found() -> None:
    from transformers.models.detr.modeling_detr import DetrMHAttentionMap
    from transformers.models.wavlm.modeling_wavlm import WavLMAttention

    attention = DetrMHAttentionMap(24, 2)
    assert chosen(attention) == ["q_proj"]
    assert chosen(WavLMAttention(24, 2)) == ["gru_rel_pos_linear"]


def test_layers_that_transformers_calls_only_in_evaluation_are_found() -> None:
    from transformers import Gemma3nTextConfig
    from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextAltUp

    found = chosen(Gemma3nTextAltUp(Gemma3nTextConfig(hidden_size=24)))
    assert found == ["prediction_coefs", "modality_router"]


def test_layers_that_reformer_reads_with_its_cache_are_left_out() -> None:
    from transformers import ReformerConfig
    from transformers.models.reformer.modeling_reformer import LocalSelfAttention, LSHSelfAttention

    config = ReformerConfig(hidden_size=24, num_attention_heads=2, attention_head_size=12)
    assert chosen(nn.ModuleDict({"lsh": LSHSelfAttention(config), "local": LocalSelfAttention(config)})) == [
        "local.query",
        "local.key",
        "local.value",
    ]


def test_layers_whose_weights_are_divided_in_evaluation_are_left_out(refused) -> None:
    from transformers import RwkvConfig, RwkvModel

    def rwkv(rescale_every: int) -> nn.Module:
        return RwkvModel(RwkvConfig(vocab_size=50, hidden_size=24, num_hidden_layers=2, rescale_every=rescale_every))

    left_out = {path.split(".", 2)[2] for path in set(chosen(rwkv(0))) - set(chosen(rwkv(6)))}
    assert left_out == {"attention.output", "feed_forward.value"}
    with refused(pc.TargetError, "'blocks.0.attention.output'", "exclude"):
        chosen(rwkv(6), targets=["output"])


def test_an_adapter_that_parts_what_is_tied_is_told_so(gpt2) -> None:
    for fields in ({"targets": ["lm_head"]}, {"targets": ["c_attn"], "train_modules": ["wte"]}):
        notes = pc.plan(gpt2, AdapterSpec(method="sound", **fields)).notes
        assert any("'lm_head.weight'" in note and "'transformer.wte.weight'" in note for note in notes), notes
    both = AdapterSpec(method="sound", targets=["c_attn"], train_modules=["wte", "lm_head"])
    assert not any("cannot be merged" in note for note in pc.plan(gpt2, both).notes)


def test_expert_tensors_out_of_reach_are_named() -> None:
    model = Attention()
    model.experts = nn.Module()
    model.experts.gate_up_proj = nn.Parameter(torch.zeros(4, 24, 48))
    model.convolution = torch.nn.utils.parametrizations.weight_norm(nn.Conv1d(24, 24, 3))
    plan = pc.plan(model, AdapterSpec(method="sound"))
    assert any("experts.gate_up_proj (1)" in note for note in plan.notes)
    assert "experts.gate_up_proj" in str(plan) and "original1" not in str(plan)


def test_layers_of_one_type_and_two_shapes_do_not_share() -> None:
    model = nn.Sequential(OrderedDict(a=nn.Sequential(OrderedDict(dense=nn.Linear(24, 48))), b=nn.Sequential()))
    model.b.add_module("dense", nn.Linear(48, 24))
    groups = {group.name for group in pc.plan(model, AdapterSpec(method="sound")).groups}
    assert {"pool.dense.48x24", "pool.dense.24x48"} <= groups


def test_routers_are_no_products(sound_method) -> None:
    class TopKRouter(nn.Linear):
        def forward(self, input):
            return super().forward(input).topk(1)

    class PlainRouter(nn.Linear):
        pass

    net = nn.ModuleDict({"router": TopKRouter(24, 24), "plain": PlainRouter(24, 24), "up": nn.Linear(24, 24)})
    plan = pc.plan(net, AdapterSpec(method="sound", options={"r": 4}))
    assert [site.path for site in plan.sites] == ["plain", "up"]
    assert plan.base.shapes["router"] == (24, 24)


@pytest.mark.parametrize("name", ["norm1", "self_attn", "linear1", "out_proj"])
def test_a_module_that_is_not_called_cannot_be_trained_in_full(sound_method, refused, name) -> None:
    net = nn.ModuleDict({"layer": nn.TransformerEncoderLayer(24, 2, 32), "up": nn.Linear(24, 24)})
    spec = AdapterSpec(method="sound", options={"r": 4}, targets=["up"], train_modules=[name])
    with refused(pc.TargetError, f"{name}'", "without calling it"):
        pc.plan(net, spec)
    whole = AdapterSpec(method="sound", options={"r": 4}, targets=["up"], train_modules=["layer"])
    assert "layer" in pc.plan(net, whole).trained


def test_a_module_at_two_paths_is_named_by_the_first(sound_method, refused) -> None:
    net = nn.ModuleDict({"encoder": nn.ModuleDict({"p": nn.Linear(24, 24)})})
    net["decoder"] = nn.ModuleDict({"q": net["encoder"]["p"]})
    for fields in ({"targets": ["decoder.q"]}, {"targets": ["p"], "exclude": ["q"]}, {"train_modules": ["q"]}):
        with refused(pc.TargetError, "'decoder.q'", "same module as 'encoder.p'"):
            pc.plan(net, AdapterSpec(method="sound", **fields))


def test_a_lazy_layer_is_named(sound_method, refused) -> None:
    net = nn.Sequential(nn.Linear(24, 24), nn.LazyLinear(24))
    with refused(pc.TargetError, "'1'", "run the model once"):
        pc.plan(net, AdapterSpec(method="sound", options={"r": 4}))
    net(torch.ones(24))
    assert len(pc.plan(net, AdapterSpec(method="sound", options={"r": 4})).sites) == 2


@pytest.mark.parametrize("slow", [False, True])
def test_bloom_reads_two_weights_itself_only_where_it_is_slow(sound_method, slow) -> None:
    from transformers import BloomConfig, BloomModel

    sizes = dict(vocab_size=40, hidden_size=32, n_layer=1, n_head=2)
    net = BloomModel(BloomConfig(**sizes, pretraining_tp=2, slow_but_exact=slow)).eval()
    found = chosen(net, options={"r": 4})
    assert len(found) == (2 if slow else 4)
    randomise(pc.attach(net, AdapterSpec(method="sound", options={"r": 4})))
    ids = torch.arange(6)[None]
    for path in found:
        module, called = net.get_submodule(path), []
        hook = module.register_forward_hook(lambda *_, called=called: called.append(1))
        net(ids)
        hook.remove()
        assert called, f"'{path}' is never called"
