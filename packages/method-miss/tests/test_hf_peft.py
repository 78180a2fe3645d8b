"""Hugging Face PEFT is the judge: outputs, gradients, merged weights, and checkpoints in both directions."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peft_core as pc
from peft_core.testing.families import FAMILIES
from peft_method_miss import from_hf_peft, to_hf_peft
from peft_method_miss.exchange import TENSORS

peft = pytest.importorskip("peft")

LLAMA = FAMILIES["llama"]  # hidden 48, inner 72
LAYERS = ["q_proj", "k_proj", "down_proj"]

# init_weights, r, mini_r: r dividing the sizes of the layers or not.
THEIRS: list[tuple[Any, int, int]] = [
    (True, 8, 1),
    (True, 7, 1),
    (True, 48, 1),
    ("mini", 8, 6),
    ("mini", 5, 3),
    ("bat", 6, 1),
]
# Rounding in bf16: ours multiplies in the base's dtype, theirs in the adapter's.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2}


def their_model(
    init: Any = True, r: int = 8, mini_r: int = 1, dtype: torch.dtype = torch.float32, **fields: Any
) -> Any:
    """A tiny Llama with their adapter, every trained tensor drawn at random."""
    config = peft.MissConfig(r=r, init_weights=init, mini_r=mini_r, **{"target_modules": LAYERS, **fields})
    model = peft.get_peft_model(LLAMA.build(dtype=dtype), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def logits(model: nn.Module, train: bool = False) -> Tensor:
    with torch.set_grad_enabled(train):
        out: Tensor = model(**LLAMA.inputs()).logits
    return out


def near(found: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    distance = (found.float() - expected.float()).norm() / expected.float().norm()
    assert distance <= tolerance, f"{what}: off by {distance:.1e}, allowed {tolerance:.0e}"


def their_gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            path, _, rest = name.removeprefix("base_model.model.").partition(".miss_block")
            found[f"{path}.D" if rest else path.replace(".modules_to_save.default", "")] = parameter.grad
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("init, r, mini_r", THEIRS)
def test_theirs_becomes_ours(tmp_path: Path, init: Any, r: int, mini_r: int, dtype: torch.dtype) -> None:
    theirs, model = their_model(init, r, mini_r, dtype), LLAMA.build(dtype=dtype)
    theirs.save_pretrained(tmp_path / "theirs")
    from_hf_peft(tmp_path / "theirs", tmp_path / "ours", base=model)
    adapter = pc.load(model, tmp_path / "ours", trainable=True)
    assert adapter.num_trainable == sum(p.numel() for p in theirs.parameters() if p.requires_grad)

    tolerance = TOLERANCE[dtype]
    expected, found = logits(theirs, train=True), logits(model, train=True)
    near(found, expected, tolerance, "output")
    expected.float().square().mean().backward()
    found.float().square().mean().backward()
    wanted = their_gradients(theirs)
    got = {key: parameter.grad for key, parameter in adapter.named_parameters()}
    assert got.keys() == wanted.keys()
    for key, gradient in got.items():
        assert gradient is not None
        near(gradient, wanted[key], tolerance, key)

    merged = dict(theirs.merge_and_unload().named_parameters())
    for name, parameter in adapter.merge_and_detach().named_parameters():
        near(parameter, merged[name], tolerance, name)


@pytest.mark.parametrize("init, r, mini_r", THEIRS)
def test_ours_becomes_theirs_and_comes_back_the_same(tmp_path: Path, init: Any, r: int, mini_r: int) -> None:
    their_model(init, r, mini_r).save_pretrained(tmp_path / "theirs")
    model = LLAMA.build()
    from_hf_peft(tmp_path / "theirs", tmp_path / "ours", base=model)
    to_hf_peft(tmp_path / "ours", tmp_path / "again")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    pc.load(model, tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(LLAMA.build(), tmp_path / "again").eval()
    near(logits(loaded), logits(model), 1e-5)


@pytest.mark.parametrize(
    "options", [{"r": 6, "alpha": 3.0}, {"variant": "mini", "r": 5, "mini_r": 4, "alpha": 2.0}], ids=str
)
def test_a_scale_goes_into_their_matrix(tmp_path: Path, options: dict[str, Any]) -> None:
    model = LLAMA.build()
    adapter = pc.attach(model, pc.AdapterSpec(method="miss", options=options, dropout=0.25, dtype="bfloat16"))
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.1)
    adapter.save(tmp_path / "ours")
    to_hf_peft(tmp_path / "ours", tmp_path / "theirs")
    loaded = peft.PeftModel.from_pretrained(LLAMA.build(), tmp_path / "theirs").eval()
    assert loaded.peft_config["default"].miss_dropout == 0.25
    near(logits(loaded), logits(model), 1e-2)  # bf16 parameters times the scale


def test_a_bat_with_a_scale(tmp_path: Path) -> None:
    model = LLAMA.build()
    adapter = pc.attach(model, pc.AdapterSpec(method="miss", options={"variant": "bat", "r": 6, "alpha": 2.0}))
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.1)
    adapter.save(tmp_path / "ours")
    to_hf_peft(tmp_path / "ours", tmp_path / "theirs")
    loaded = peft.PeftModel.from_pretrained(LLAMA.build(), tmp_path / "theirs").eval()
    near(logits(loaded), logits(model), 1e-5)


def test_the_layers_stay_the_same(tmp_path: Path) -> None:
    """By name where names say it; by path where theirs leave some out by index, exclusion or regex."""
    all_paths = [f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")]
    for number, (fields, targets) in enumerate(
        [
            ({"target_modules": ["q_proj", "down_proj"]}, ("down_proj", "q_proj")),
            ({"target_modules": ["q_proj", "down_proj", "nowhere"]}, ("down_proj", "q_proj")),
            (
                {"target_modules": ["q_proj"], "layers_to_transform": [1]},
                ("model.layers.1.self_attn.q_proj",),
            ),
            (
                {
                    "target_modules": ["q_proj", "k_proj"],
                    "exclude_modules": ["layers.0.self_attn.q_proj", "k_proj"],
                },
                ("model.layers.1.self_attn.q_proj",),
            ),
            ({"target_modules": r".*(q_proj|down_proj)"}, tuple(all_paths)),
        ]
    ):
        theirs, ours = tmp_path / f"theirs{number}", tmp_path / f"ours{number}"
        model, peft_model = LLAMA.build(), their_model(**fields)
        peft_model.save_pretrained(theirs)
        from_hf_peft(theirs, ours, base=model)
        adapter = pc.load(model, ours)
        assert sorted(adapter.plan.spec.targets) == sorted(targets)
        near(logits(model), logits(peft_model), 1e-5)
        to_hf_peft(ours, tmp_path / f"again{number}")
        again = peft.PeftModel.from_pretrained(LLAMA.build(), tmp_path / f"again{number}").eval()
        near(logits(again), logits(peft_model), 1e-5)


def test_modules_trained_in_full_come_along(tmp_path: Path) -> None:
    theirs, model = their_model(modules_to_save=["lm_head", "norm"]), LLAMA.build()
    theirs.save_pretrained(tmp_path / "theirs")
    from_hf_peft(tmp_path / "theirs", tmp_path / "ours", base=model)
    adapter = pc.load(model, tmp_path / "ours", trainable=True)
    # Their "norm" is the end of a name, too.
    norms = {f"model.layers.{i}.{at}_layernorm" for i in (0, 1) for at in ("input", "post_attention")}
    assert set(adapter.plan.trained) == {"lm_head", "model.norm", *norms}
    expected, found = logits(theirs, train=True), logits(model, train=True)
    near(found, expected, 1e-5)
    expected.square().mean().backward()
    found.square().mean().backward()
    wanted = their_gradients(theirs)
    for key, parameter in adapter.named_parameters():
        assert parameter.grad is not None
        near(parameter.grad, wanted[key], 1e-5, key)
    adapter.save(tmp_path / "ours")
    to_hf_peft(tmp_path / "ours", tmp_path / "again")
    again = peft.PeftModel.from_pretrained(LLAMA.build(), tmp_path / "again").eval()
    near(logits(again), expected, 1e-5)


def test_embeddings_trained_for_new_tokens(tmp_path: Path) -> None:
    """Their file then holds each of them three times: as trained, as trained again, and as the base's."""
    config = peft.MissConfig(r=8, target_modules=LAYERS, modules_to_save=["embed_tokens", "lm_head"])
    bases = [LLAMA.build() for _ in range(3)]
    for base in bases:
        torch.manual_seed(0)
        base.resize_token_embeddings(64)
    theirs = peft.get_peft_model(bases[0], config).eval()
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    assert sum("lm_head" in key for key in load_file(tmp_path / "theirs" / TENSORS)) == 3
    from_hf_peft(tmp_path / "theirs", tmp_path / "ours", base=bases[1])
    assert set(pc.load(bases[1], tmp_path / "ours").plan.trained) == {"lm_head", "model.embed_tokens"}
    near(logits(bases[1]), logits(theirs), 1e-5)
    # Without the trained one it is not known what the others stand for.
    rewrite(tmp_path / "theirs", tensors={"base_model.model.lm_head.weight": None})
    with pytest.raises(pc.CheckpointError, match=r"'lm_head.weight' is missing"):
        from_hf_peft(tmp_path / "theirs", tmp_path / "again", base=bases[2])


def test_the_base_stays_as_it_was(tmp_path: Path) -> None:
    """Its parameters and an adapter that it carries, also where the conversion fails."""
    their_model().save_pretrained(tmp_path / "theirs")
    model = LLAMA.build()
    adapter = pc.attach(model, pc.AdapterSpec(method="miss", targets=LAYERS, options={"r": 8}))
    before, output = copy.deepcopy(model.state_dict()), logits(model)
    from_hf_peft(tmp_path / "theirs", tmp_path / "ours", base=model)
    (tmp_path / "file").touch()
    with pytest.raises(pc.CheckpointError):
        from_hf_peft(tmp_path / "theirs", tmp_path / "file" / "ours", base=model)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(logits(model), output)
    adapter.detach()
    near(logits(model), logits(LLAMA.build()), 0.0)


def test_a_classifier(tmp_path: Path) -> None:
    bert = FAMILIES["bert"]
    config = peft.MissConfig(task_type="SEQ_CLS", r=5, target_modules=["query", "value"])
    theirs = peft.get_peft_model(bert.build(), config).eval()
    for name, parameter in theirs.named_parameters():
        if "miss_block" in name:
            nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    model = bert.build()
    from_hf_peft(tmp_path / "theirs", tmp_path / "ours", base=bert.build_meta())
    pc.load(model, tmp_path / "ours")
    near(bert.forward(model, bert.inputs()), bert.forward(theirs, bert.inputs()), 1e-5)


def test_the_base_is_found_where_the_adapter_says(tmp_path: Path) -> None:
    LLAMA.build().save_pretrained(tmp_path / "base")
    theirs = their_model()
    theirs.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    theirs.save_pretrained(tmp_path / "theirs")
    (tmp_path / "base" / "model.safetensors").unlink()  # its configuration is enough
    from_hf_peft(tmp_path / "theirs", tmp_path / "ours")
    from_hf_peft(tmp_path / "theirs", tmp_path / "other", base=tmp_path / "base")
    model = LLAMA.build()
    adapter = pc.load(model, tmp_path / "ours")
    assert adapter.plan.spec.base_model == str(tmp_path / "base")
    near(logits(model), logits(theirs), 1e-5)
    assert (tmp_path / "ours" / "adapter.json").read_text() == (tmp_path / "other" / "adapter.json").read_text()


def test_narrow_adapters_keep_their_dtype(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(
        LLAMA.build(dtype=torch.bfloat16),
        peft.MissConfig(r=4, target_modules=LAYERS),
        autocast_adapter_dtype=False,
    )
    theirs.save_pretrained(tmp_path / "theirs")
    from_hf_peft(tmp_path / "theirs", tmp_path / "ours", base=LLAMA.build_meta())
    assert pc.load(LLAMA.build(), tmp_path / "ours").plan.spec.dtype == "bfloat16"


# What cannot be exchanged is refused in one line.


def rewrite(directory: Path, config: dict[str, Any] | None = None, tensors: dict[str, Any] | None = None) -> None:
    """Change fields of their configuration, and tensors of their file (None: remove)."""
    path, file = directory / "adapter_config.json", directory / "adapter_model.safetensors"
    path.write_text(json.dumps({**json.loads(path.read_text()), **(config or {})}))
    values = {**load_file(file), **(tensors or {})}
    save_file({key: value for key, value in values.items() if value is not None}, file)


KEY = "base_model.model.model.layers.1.self_attn.q_proj.miss_block"


@pytest.mark.parametrize(
    "config, tensors, message",
    [
        ({"peft_type": "LORA"}, {}, "is a LORA adapter"),
        ({"bias": "all"}, {}, "has trained biases"),
        ({"init_weights": "olora"}, {}, "init_weights='olora'"),
        ({}, {KEY: None}, "does not fit|laid out|missing|no layer"),
        (
            {},
            {KEY.replace("q_proj", "z_proj"): torch.zeros(8, 48)},
            "no layer 'model.layers.1.self_attn.z_proj'",
        ),
        ({}, {KEY: torch.zeros(8, 47)}, r"q_proj.D' has shape \[8, 47\], expected \[8, 48\]"),
        ({"r": 9}, {}, r"has shape \[8, 48\], expected \[9, 48\]"),
        (
            {},
            {"base_model.model.model.embed_tokens.weight": torch.zeros(2, 2)},
            "nor part of a module in modules_to_save; .* save_embedding_layers=False",
        ),
        ({"init_weights": "bat", "r": 7}, {}, "needs an r that divides"),
    ],
)
def test_what_of_theirs_does_not_fit(
    tmp_path: Path, config: dict[str, Any], tensors: dict[str, Any], message: str
) -> None:
    their_model(target_modules=["q_proj"]).save_pretrained(tmp_path / "theirs")
    rewrite(tmp_path / "theirs", config, tensors)
    if tensors == {KEY: None}:  # a layer without a tensor is one that is not adapted
        from_hf_peft(tmp_path / "theirs", tmp_path / "ours", base=LLAMA.build_meta())
        assert len(pc.load(LLAMA.build(), tmp_path / "ours").plan.sites) == 1
        return
    with pytest.raises(pc.PeftCoreError, match=message):
        from_hf_peft(tmp_path / "theirs", tmp_path / "ours", base=LLAMA.build_meta())
    assert not (tmp_path / "ours").exists()


def test_directories_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(pc.CheckpointError, match=r"adapter_config.json is missing"):
        from_hf_peft(tmp_path, tmp_path / "ours")
    with pytest.raises(pc.CheckpointError, match="not an adapter directory"):
        to_hf_peft(tmp_path, tmp_path / "theirs")
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(pc.CheckpointError, match="is damaged"):
        from_hf_peft(tmp_path, tmp_path / "ours")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "MISS"}')
    with pytest.raises(pc.CheckpointError, match="safetensors' is missing"):
        from_hf_peft(tmp_path, tmp_path / "ours")
    (tmp_path / "adapter_model.bin").write_bytes(b"PK")
    with pytest.raises(pc.CheckpointError, match="a pickle"):
        from_hf_peft(tmp_path, tmp_path / "ours")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"options": {"variant": "expand", "r": 4}}, "variant 'expand'"),
        ({"options": {"r": 4, "layout": "contiguous"}}, "layout 'contiguous'"),
        ({"options": {"r": 4}, "overrides": {"q_proj": {"r": 2}}}, "have different options"),
    ],
)
def test_what_of_ours_they_cannot_express(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    pc.attach(LLAMA.build(), pc.AdapterSpec(method="miss", **fields)).save(tmp_path / "ours")
    with pytest.raises(pc.CheckpointError, match=message):
        to_hf_peft(tmp_path / "ours", tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_transposed_layers_and_other_methods_are_refused(tmp_path: Path) -> None:
    model = FAMILIES["gpt2"].build()
    pc.attach(model, pc.AdapterSpec(method="miss", options={"r": 4})).save(tmp_path / "ours")
    with pytest.raises(pc.CheckpointError, match="Conv1D"):
        to_hf_peft(tmp_path / "ours", tmp_path / "theirs")
    header = json.loads((tmp_path / "ours" / "adapter.json").read_text())
    header["method"]["name"] = "other"
    (tmp_path / "ours" / "adapter.json").write_text(json.dumps(header))
    with pytest.raises(pc.CheckpointError, match="of method 'other'"):
        to_hf_peft(tmp_path / "ours", tmp_path / "theirs")


def test_their_faults_are_not_repeated(tmp_path: Path) -> None:
    """Merging `mini` in bf16 leaves D as it was, unmerging every bit; adapters may differ in variant."""
    model = LLAMA.build(dtype=torch.bfloat16)
    mini = {"variant": "mini", "r": 5, "mini_r": 6}
    adapter = pc.attach(model, pc.AdapterSpec(method="miss", options=mini, dtype="bfloat16"), name="mini")
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.1)
    shapes = [parameter.shape for parameter in adapter.parameters()]
    before, weights = logits(model), copy.deepcopy(model.state_dict())
    adapter.merge()
    adapter.unmerge()
    assert [parameter.shape for parameter in adapter.parameters()] == shapes
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    other = pc.attach(model, pc.AdapterSpec(method="miss", options={"variant": "bat", "r": 6}), name="bat")
    for parameter in other.parameters():
        nn.init.normal_(parameter, std=0.1)
    assert not torch.equal(logits(model), before)
    pc.activate(model, "mini")
    assert torch.equal(logits(model), before)
