"""Finding the right tensors: prefixes, ties, renames and conversions, and telling another base."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import peft_core as pc
import peft_export
from peft_core.testing.checks import Trial, randomise, same_bits
from peft_core.testing.families import FAMILIES

TINY: dict[str, Any] = dict(
    vocab_size=60, hidden_size=48, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4
)


def llama(**fields: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**TINY, num_key_value_heads=2, max_position_embeddings=32, **fields)
    return transformers.LlamaForCausalLM(config).eval()


def equal(found: Path, expected: Path) -> bool:
    one, two = load_file(found / "model.safetensors"), load_file(expected / "model.safetensors")
    return one.keys() == two.keys() and all(same_bits(one[key], two[key]) for key in one)


def test_base_without_the_head(method: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    """Trained on a tied language model; the files are those of its trunk, without a prefix and without lm_head."""
    model = llama(tie_word_embeddings=True)
    model.model.save_pretrained(tmp_path / "trunk")
    assert "layers.0.mlp.up_proj.weight" in load_file(tmp_path / "trunk/model.safetensors")
    made = make(method, model=model)
    expected = made.output()
    peft_export.merge(tmp_path / "trunk", made.adapter, tmp_path / "out")
    merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(made.output(merged), expected, atol=1e-5, rtol=1e-5)


def test_base_with_a_head_that_the_adapter_does_not_know(
    any_method: Trial, make: Callable[..., Any], tmp_path: Path
) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "headed")
    trunk = transformers.LlamaModel.from_pretrained(tmp_path / "headed")
    handle = randomise(pc.attach(trunk, any_method.spec(FAMILIES["llama"])))
    handle.save(tmp_path / "adapter")
    peft_export.merge(tmp_path / "headed", tmp_path / "adapter", tmp_path / "out")
    handle.merge_and_detach()
    found = load_file(tmp_path / "out/model.safetensors")
    assert same_bits(found["lm_head.weight"], model.lm_head.weight.detach())
    for name, parameter in trunk.named_parameters():
        assert same_bits(found[f"model.{name}"], parameter.detach())


def test_classifier_trained_on_a_plain_encoder(method: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    """The head is new: the output gets it, and a configuration that says so."""
    family = FAMILIES["bert"]
    model = family.build()
    model.bert.save_pretrained(tmp_path / "encoder")
    made = make(method, "bert", model=model)
    expected = made.output()
    report = peft_export.merge(tmp_path / "encoder", made.adapter, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"] and len(config["id2label"]) == 3
    assert any("BertForSequenceClassification" in note for note in report.notes)
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(made.output(merged), expected, atol=1e-5, rtol=1e-5)
    assert peft_export.verify(tmp_path / "out", tmp_path / "encoder", made.adapter).mean_kl < 1e-9


def test_a_classifier_keeps_its_classes_and_its_padding(
    any_method: Trial, make: Callable[..., Any], tmp_path: Path
) -> None:
    """The base's files know neither: without the padding token, a decoder reads no batch, or the wrong token of a text."""
    llama(pad_token_id=None).save_pretrained(tmp_path / "language")
    names = {0: "bad", 1: "good"}
    given = dict(id2label=names, label2id={name: number for number, name in names.items()}, pad_token_id=5)
    model = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "language", **given)
    made = make(any_method, model=model.eval(), base=tmp_path / "language", train_modules=("score",))
    ids = torch.tensor([[7, 8, 9, 5, 5], [7, 8, 9, 10, 11]])
    expected = made.model(ids).logits
    peft_export.merge(tmp_path / "language", made.adapter, tmp_path / "out")
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert merged.config.id2label == names and merged.config.label2id == given["label2id"]
    assert merged.config.pad_token_id == 5
    torch.testing.assert_close(merged(ids).logits, expected, atol=1e-5, rtol=1e-5)
    peft_export.export_lora(tmp_path / "language", made.adapter, tmp_path / "lora")
    card = (tmp_path / "lora/README.md").read_text()
    assert "num_labels=2)\nbase.config.pad_token_id = 5\n" in card
    fields = json.loads((tmp_path / "lora/export.json").read_text())["config"]
    assert fields["pad_token_id"] == 5 and list(fields["id2label"].values()) == ["bad", "good"]
    for kind in ("out", "lora"):
        assert peft_export.verify(tmp_path / kind, tmp_path / "language", made.adapter).ok


def test_classifier_trained_on_a_language_model(any_method: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    """The files have a head that the adapter's model has not, and the other way round."""
    llama(pad_token_id=0).save_pretrained(tmp_path / "language")
    model = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "language", num_labels=3)
    made = make(any_method, model=model.eval(), name="classifier", train_modules=("score",))
    expected = made.output()
    peft_export.merge(tmp_path / "language", made.adapter, tmp_path / "out")
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(made.output(merged), expected, atol=1e-5, rtol=1e-5)
    peft_export.export_lora(tmp_path / "language", made.adapter, tmp_path / "lora")
    for kind in ("out", "lora"):
        assert peft_export.verify(tmp_path / kind, tmp_path / "language", made.adapter).mean_kl < 1e-9
        assert peft_export.verify(tmp_path / kind, tmp_path / "language").ok


def test_classifier_trained_on_one_of_other_classes(
    any_method: Trial, make: Callable[..., Any], tmp_path: Path
) -> None:
    """The base's own head, of another size, is replaced; one that is not replaced is no head of this adapter."""
    FAMILIES["bert"].build().save_pretrained(tmp_path / "three")
    cls = transformers.BertForSequenceClassification
    model = cls.from_pretrained(tmp_path / "three", num_labels=5, ignore_mismatched_sizes=True).eval()
    made = make(any_method, "bert", model=model, name="five", train_modules=("classifier",))
    expected = made.output()
    peft_export.merge(tmp_path / "three", made.adapter, tmp_path / "out")
    torch.testing.assert_close(
        made.output(cls.from_pretrained(tmp_path / "out").eval()), expected, atol=1e-5, rtol=1e-5
    )
    peft_export.export_lora(tmp_path / "three", made.adapter, tmp_path / "lora")
    for kind in ("out", "lora"):
        assert peft_export.verify(tmp_path / kind, tmp_path / "three", made.adapter).mean_kl < 1e-9
        assert peft_export.verify(tmp_path / kind, tmp_path / "three").ok
    config = json.loads((tmp_path / "out/config.json").read_text())
    (tmp_path / "out/config.json").write_text(json.dumps({**config, "hidden_size": 36, "num_attention_heads": 3}))
    with pytest.raises(
        pc.ModelError, match=r"cannot load '.*out' as Bert.*: '.*' is \[.*48.*\] in its files and \[.*36.*\] in"
    ):
        peft_export.verify(tmp_path / "out", tmp_path / "three", made.adapter)


@pytest.mark.parametrize(("kind", "modules"), [("DistilBert", "pre_classifier"), ("DebertaV2", "pooler")])
def test_classifier_whose_head_has_a_layer_before_the_last(
    kind: str, modules: str, any_method: Trial, make: Callable[..., Any], tmp_path: Path
) -> None:
    """The number of classes is that of the last, whatever the order in which they were named."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**TINY, hidden_dim=72, max_position_embeddings=32)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path / "encoder")
    cls = getattr(transformers, f"{kind}ForSequenceClassification")
    model = cls.from_pretrained(tmp_path / "encoder", num_labels=3).eval()
    made = make(any_method, "bert", model=model, train_modules=("classifier", modules))
    expected = made.output()
    peft_export.merge(tmp_path / "encoder", made.adapter, tmp_path / "out")
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(made.output(merged), expected, atol=1e-5, rtol=1e-5)
    peft_export.export_lora(tmp_path / "encoder", made.adapter, tmp_path / "lora")
    assert "num_labels=3" in (tmp_path / "lora/README.md").read_text()
    for written in ("out", "lora"):
        assert peft_export.verify(tmp_path / written, tmp_path / "encoder", made.adapter).mean_kl < 1e-9


def test_legacy_names(any_method: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    """Old BERT checkpoints say LayerNorm.gamma: transformers renames it, and so the names are asked of transformers."""
    made = make(any_method, "bert")
    old = tmp_path / "old"
    shutil.copytree(made.base, old)
    stored = load_file(old / "model.safetensors")
    gamma = {key.replace("LayerNorm.weight", "LayerNorm.gamma"): tensor for key, tensor in stored.items()}
    save_file(gamma, old / "model.safetensors", {"format": "pt"})
    peft_export.merge(old, made.adapter, tmp_path / "out")
    peft_export.merge(made.base, made.adapter, tmp_path / "expected")
    found, expected = load_file(tmp_path / "out/model.safetensors"), load_file(tmp_path / "expected/model.safetensors")
    assert found.keys() == gamma.keys()
    for key, tensor in expected.items():
        assert same_bits(found[key.replace("LayerNorm.weight", "LayerNorm.gamma")], tensor)


def test_a_projection_that_the_files_hold_fused(method: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    """Dinov2's gate_proj and up_proj are one tensor in its files."""
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        use_swiglu_ffn=True,
        mlp_ratio=6,
    )
    model = transformers.Dinov2ForImageClassification(config).eval()
    made = make(method, "vit", model=model)
    stored = load_file(made.base / "model.safetensors")
    fused = [key for key in stored if "weights_in" in key]
    assert fused and any(site.type == "gate_proj" for site in made.handle.plan.sites)
    peft_export.merge(made.base, made.adapter, tmp_path / "out")
    made.handle.merge_and_detach()
    made.model.save_pretrained(tmp_path / "expected")
    assert equal(tmp_path / "out", tmp_path / "expected")


@pytest.mark.parametrize("kind", ["Dinov2ForImageClassification", "GteForSequenceClassification", "GteModel"])
def test_fused_projections_of_a_base_without_its_head(
    kind: str, any_method: Trial, make: Callable[..., Any], tmp_path: Path
) -> None:
    """Their keys have no prefix, whatever the adapter's model or transformers' conversion would put before them."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind.startswith("Dinov2"):
        config = transformers.Dinov2Config(**sizes, image_size=16, patch_size=8, use_swiglu_ffn=True, mlp_ratio=6)
    else:
        config = transformers.GteConfig(**sizes, vocab_size=60, intermediate_size=72, pad_token_id=0)
    model = getattr(transformers, kind)(config).eval()
    model.base_model.save_pretrained(tmp_path / "trunk")
    heads = ["classifier"] if hasattr(model, "classifier") else []
    made = make(any_method, model=model, base=tmp_path / "trunk", spec={"train_modules": heads})
    peft_export.merge(made.base, made.adapter, tmp_path / "out")
    before, after = load_file(made.base / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert after.keys() == before.keys() | {f"{head}.{name}" for head in heads for name in ("weight", "bias")}
    made.handle.merge_and_detach()
    loaded = type(model).from_pretrained(tmp_path / "out").state_dict()
    assert all(same_bits(tensor, loaded[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_fused_projections_are_rounded_once(
    dtype: str, any_method: Trial, make: Callable[..., Any], tmp_path: Path
) -> None:
    """To what is written, whatever the base's files have: the adapter's change is smaller than bfloat16's steps."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.GteConfig(**sizes, vocab_size=60, intermediate_size=72, pad_token_id=0)
    model = transformers.GteForSequenceClassification(config).to(torch.bfloat16).eval()
    made = make(any_method, model=model)
    peft_export.merge(made.base, made.adapter, tmp_path / "out", dtype=dtype)
    wide = type(model).from_pretrained(made.base, dtype=torch.float32)
    pc.load(wide, made.adapter).merge_and_detach()
    wide.to(getattr(torch, dtype)).save_pretrained(tmp_path / "expected")
    assert equal(tmp_path / "out", tmp_path / "expected")


def test_experts_trained_in_full(method: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    """Each expert has tensors of its own in the files; the model stacks them."""
    torch.manual_seed(0)
    config = transformers.Qwen2MoeConfig(
        **TINY,
        num_key_value_heads=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=32,
    )
    model = transformers.Qwen2MoeForCausalLM(config).eval()
    made = make(method, model=model, targets=["q_proj", "v_proj"], train_modules=("experts",))
    assert any(key.endswith("experts.0.gate_proj.weight") for key in load_file(made.base / "model.safetensors"))
    peft_export.merge(made.base, made.adapter, tmp_path / "out")
    made.handle.merge_and_detach()
    made.model.save_pretrained(tmp_path / "expected")
    assert equal(tmp_path / "out", tmp_path / "expected")


def tied(method: Trial, make: Callable[..., Any], **fields: Any) -> Any:
    return make(method, model=llama(tie_word_embeddings=True), **fields)


def test_merging_into_a_tied_head_is_refused_or_unties(lone: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    made = tied(lone, make, targets=["lm_head"])
    expected = made.output()
    with pytest.raises(
        pc.MergeError, match=r"'lm_head.weight' is the same tensor as 'model.embed_tokens.weight'.*--untie"
    ):
        peft_export.merge(made.base, made.adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = peft_export.merge(made.base, made.adapter, tmp_path / "out", untie=True)
    assert any("tie_word_embeddings" in note for note in report.notes)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert merged.lm_head.weight is not merged.model.embed_tokens.weight
    torch.testing.assert_close(made.output(merged), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["Bert", "Roberta"])
def test_parting_an_embedding_parts_the_biases_too(
    kind: str, lone: Trial, make: Callable[..., Any], tmp_path: Path
) -> None:
    """One field of the configuration ties both, and the files leave both out."""
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForMaskedLM")(getattr(transformers, f"{kind}Config")(**TINY)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    made = make(lone, "bert", model=model, targets=["decoder"], train_modules=())
    expected = made.output()
    peft_export.merge(made.base, made.adapter, tmp_path / "out", untie=True)
    merged, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    torch.testing.assert_close(made.output(merged.eval()), expected, atol=1e-5, rtol=1e-5)


def test_ties_that_the_configuration_does_not_govern(lone: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    """T5 ties whatever `tie_word_embeddings` says, and takes from it whether the decoder's output is scaled."""
    made = make(lone, "t5", targets=["lm_head"])
    expected = made.output()
    config = json.loads((made.base / "config.json").read_text())
    plain = {
        name: value for name, value in config.items() if name not in ("scale_decoder_outputs", "tie_word_embeddings")
    }
    base = tmp_path / "plain"
    shutil.copytree(made.base, base)
    (base / "config.json").write_text(json.dumps(plain))
    report = peft_export.merge(base, made.adapter, tmp_path / "out", untie=True)
    assert (tmp_path / "out/config.json").read_bytes() == (base / "config.json").read_bytes()
    assert any("lm_head.weight" in note and "parted" in note for note in report.notes)
    merged = type(made.model).from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(made.output(merged), expected, atol=1e-5, rtol=1e-5)


def test_what_an_architecture_makes_one_tensor_cannot_be_parted(
    lone: Trial, make: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OneMatrix(transformers.LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.lm_head.weight = self.model.embed_tokens.weight

    # (As imported now: transformers exchanges its module object once.)
    monkeypatch.setattr(importlib.import_module("transformers"), "OneMatrix", OneMatrix, raising=False)
    model = OneMatrix(llama(tie_word_embeddings=True).config).eval()
    made = make(lone, model=model, targets=["lm_head"])
    with pytest.raises(pc.MergeError, match="is one tensor with another layer's in every OneMatrix"):
        peft_export.merge(made.base, made.adapter, tmp_path / "out", untie=True)
    assert not (tmp_path / "out").exists()


def test_embeddings_trained_alone_part_from_the_head(
    any_method: Trial, make: Callable[..., Any], tmp_path: Path
) -> None:
    made = tied(any_method, make, targets=["q_proj"], train_modules=("embed_tokens",))
    with pytest.raises(pc.MergeError, match=r"'model.embed_tokens.weight' is the same tensor as 'lm_head.weight'"):
        peft_export.merge(made.base, made.adapter, tmp_path / "out")
    peft_export.merge(made.base, made.adapter, tmp_path / "out", untie=True)
    found, base = (load_file(path / "model.safetensors") for path in (tmp_path / "out", made.base))
    assert same_bits(found["lm_head.weight"], base["model.embed_tokens.weight"])
    assert not same_bits(found["model.embed_tokens.weight"], base["model.embed_tokens.weight"])


def test_trained_together_they_stay_tied(any_method: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    made = tied(any_method, make, targets=["q_proj"], train_modules=("embed_tokens", "lm_head"))
    peft_export.merge(made.base, made.adapter, tmp_path / "out")
    made.handle.merge_and_detach()
    made.model.save_pretrained(tmp_path / "expected")
    assert equal(tmp_path / "out", tmp_path / "expected")
    assert "lm_head.weight" not in load_file(tmp_path / "out/model.safetensors")


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("size", [68, 52])
def test_a_resized_vocabulary(size: int, tie: bool, lone: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    """Both embeddings were trained after the model was resized: the adapter brings them, and the files have them as before."""
    llama(tie_word_embeddings=tie).save_pretrained(tmp_path / "before")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "before").eval()
    model.resize_token_embeddings(size, mean_resizing=False)
    made = make(lone, model=model, targets=["q_proj"], train_modules=("embed_tokens", "lm_head"))
    ids = {"input_ids": torch.tensor([[1, size - 1, 5]])}
    expected = model(**ids).logits
    report = peft_export.merge(tmp_path / "before", made.adapter, tmp_path / "out")
    assert any(f"the vocabulary has {size} tokens, not 60" in note for note in report.notes)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["vocab_size"] == size and config["tie_word_embeddings"] == tie
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(merged(**ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert peft_export.verify(tmp_path / "out", tmp_path / "before", made.adapter).ok
    report = peft_export.export_lora(tmp_path / "before", made.adapter, tmp_path / "lora")
    assert any(f"base.resize_token_embeddings({size})" in note for note in report.notes)
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "before")
    base.resize_token_embeddings(size)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    torch.testing.assert_close(loaded(**ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert peft_export.verify(tmp_path / "lora", tmp_path / "before", made.adapter).ok


@pytest.mark.parametrize("trained", [(), ("embed_tokens",)])
def test_a_resized_vocabulary_that_nobody_kept(
    trained: tuple[str, ...], lone: Trial, make: Callable[..., Any], tmp_path: Path
) -> None:
    llama().save_pretrained(tmp_path / "before")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "before").eval()
    model.resize_token_embeddings(68, mean_resizing=False)
    made = make(lone, model=model, targets=["q_proj"], train_modules=trained)
    with pytest.raises(
        pc.CheckpointError, match=r"is \[60, 48\] here and \[68, 48\] there; if .* resized .*train_modules"
    ):
        peft_export.merge(tmp_path / "before", made.adapter, tmp_path / "out")
    # The resized base itself will do.
    peft_export.merge(made.base, made.adapter, tmp_path / "out")


def test_ties_are_seen_from_the_tensors(lone: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    """Both stored, and equal: tied, whatever the configuration says. Both stored, and different: not tied."""
    made = tied(lone, make, targets=["lm_head"])
    both = tmp_path / "both"
    shutil.copytree(made.base, both)
    stored = load_file(both / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, both / "model.safetensors", {"format": "pt"})
    with pytest.raises(pc.MergeError, match="is the same tensor as"):
        peft_export.merge(both, made.adapter, tmp_path / "out")
    stored["lm_head.weight"][0, 0] += 1
    save_file(stored, both / "model.safetensors", {"format": "pt"})
    peft_export.merge(both, made.adapter, tmp_path / "out")
    found = load_file(tmp_path / "out/model.safetensors")
    assert same_bits(found["model.embed_tokens.weight"], stored["model.embed_tokens.weight"])
    assert not same_bits(found["lm_head.weight"], stored["lm_head.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3}, "'model.layers.2.* is here and not there"),
        ({"num_hidden_layers": 1}, "no tensor here for the adapted layer 'model.layers.1"),
        ({"vocab_size": 61}, r"is \[61, 48\] here and \[60, 48\] there"),
        ({"intermediate_size": 96}, r"gate_proj' is \[96, 48\] here and \[72, 48\] there"),
    ],
)
def test_another_base(
    change: dict[str, int], message: str, any_method: Trial, make: Callable[..., Any], tmp_path: Path
) -> None:
    made = make(any_method)
    config = transformers.LlamaConfig(**{**TINY, "num_key_value_heads": 2, **change})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    with pytest.raises(pc.CheckpointError, match=f"was trained on another base model.*{message}"):
        peft_export.merge(tmp_path / "other", made.adapter, tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("Qwen2ForCausalLM", "'model.layers.0.self_attn.k_proj.bias' is here and not there"),
        ("Gemma2ForCausalLM", "'model.layers.0.post_feedforward_layernorm.weight' is here and not there"),
        (
            "CohereForCausalLM",
            "no tensor here for 'model.layers.0.post_attention_layernorm.weight', nor in the adapter",
        ),
        ("LlamaForSequenceClassification", "no tensor here for 'lm_head', nor in the adapter"),
    ],
)
def test_another_architecture_with_the_same_layers(
    kind: str, message: str, any_method: Trial, make: Callable[..., Any], fails: Any, tmp_path: Path
) -> None:
    """Every adapted layer is there, but the model is another: `pc.load` refuses it, too."""
    made = make(any_method)
    cls = getattr(transformers, kind)
    heads = dict(num_key_value_heads=2, head_dim=12, max_position_embeddings=32, tie_word_embeddings=False)
    other = cls(cls.config_class(**TINY, **heads, pad_token_id=0))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(pc.CheckpointError):
        pc.load(other, made.adapter)
    for command in (("merge",), ("export", "lora")):
        said = fails(*command, "--base", tmp_path / "other", "--adapter", made.adapter, "--out", tmp_path / "out")
        assert "was trained on another base model" in said and message in said
        assert not (tmp_path / "out").exists()


def test_a_base_of_another_type_with_the_same_tensors(
    any_method: Trial, make: Callable[..., Any], tmp_path: Path
) -> None:
    """`pc.load` takes it; that something differs is said."""
    made = make(any_method)
    config = transformers.MistralConfig(**TINY, num_key_value_heads=2, max_position_embeddings=32)
    other = transformers.MistralForCausalLM(config)
    other.save_pretrained(tmp_path / "other")
    pc.load(other, made.adapter)
    for write in (peft_export.merge, peft_export.export_lora):
        report = write(tmp_path / "other", made.adapter, tmp_path / write.__name__)
        assert any("of type llama" in note and "of type mistral" in note for note in report.notes)
        assert not any(
            "of type" in note for note in write(made.base, made.adapter, tmp_path / "own", overwrite=True).notes
        )


def test_buffers_of_old_files_are_no_difference(any_method: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    """Rotary frequencies lie in the layers of old Llama checkpoints; transformers loads them no more."""
    made = make(any_method)
    old = tmp_path / "old"
    shutil.copytree(made.base, old)
    stored = load_file(old / "model.safetensors")
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    save_file(stored, old / "model.safetensors", {"format": "pt"})
    peft_export.merge(old, made.adapter, tmp_path / "out")
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" in load_file(tmp_path / "out/model.safetensors")


def test_a_new_head_that_nobody_kept(any_method: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    """A classifier's first layer was drawn as the adapter's model was made, and neither trained nor saved."""
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(**TINY, hidden_dim=72, max_position_embeddings=32)
    transformers.DistilBertModel(config).save_pretrained(tmp_path / "encoder")
    model = transformers.DistilBertForSequenceClassification.from_pretrained(tmp_path / "encoder").eval()
    made = make(any_method, "bert", model=model, targets=r".*q_lin", train_modules=("classifier",))
    with pytest.raises(pc.CheckpointError, match=r"no tensor here for 'pre_classifier.*train_modules"):
        peft_export.merge(tmp_path / "encoder", made.adapter, tmp_path / "out")


def test_what_a_model_computes_need_not_be_in_the_files(
    any_method: Trial, make: Callable[..., Any], tmp_path: Path
) -> None:
    """Marian's positions are sinusoids, which its files leave out."""
    sides = {
        f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("attention_heads", 4))
    }
    ffn = dict(encoder_ffn_dim=72, decoder_ffn_dim=72, d_model=48, vocab_size=60, max_position_embeddings=32)
    config = transformers.MarianConfig(**sides, **ffn, pad_token_id=0, decoder_start_token_id=0)
    torch.manual_seed(0)
    made = make(any_method, "t5", model=transformers.MarianMTModel(config).eval())
    assert not any("embed_positions" in key for key in load_file(made.base / "model.safetensors"))
    assert not peft_export.merge(made.base, made.adapter, tmp_path / "out").notes


def test_another_architecture(any_method: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    made = make(any_method)
    FAMILIES["gpt2"].build().save_pretrained(tmp_path / "other")
    with pytest.raises(pc.CheckpointError, match="was trained on another base model"):
        peft_export.merge(tmp_path / "other", made.adapter, tmp_path / "out")
