"""Verification: what agrees passes, what differs fails, and exports carry what it takes to see it elsewhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import peft_core as pc
import peft_export
from peft_core.testing.checks import Trial
from peft_export.verdict import MAX_KL, MAX_KL_ROUGH, remarks
from peft_export.verify import compare

pytestmark = pytest.mark.filterwarnings("ignore")


def spoil(directory: Path, file: str, amount: float) -> None:
    """Another model than the one that was exported: every weight moved by noise of the given standard deviation."""
    generator = torch.Generator().manual_seed(0)
    stored = load_file(directory / file)
    noisy = {
        key: tensor + amount * torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor
        for key, tensor in stored.items()
    }
    save_file(noisy, directory / file, {"format": "pt"})


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("kind", ["merged", "lora"])
def test_exports_pass_and_spoilt_ones_fail(
    family: str, kind: str, any_method: Trial, make: Callable[..., Any], program: Any, tmp_path: Path
) -> None:
    made = make(any_method, family)
    out = tmp_path / "out"
    write = peft_export.merge if kind == "merged" else peft_export.export_lora
    write(made.base, made.adapter, out)
    code, text, err = program("verify", out, "--base", made.base, "--adapter", made.adapter, "--json")
    report = json.loads(text)
    assert code == 0 and report["ok"] and report["kind"] == kind and report["mean_kl"] < 1e-9, err
    assert all(found["agreement"] == 1.0 for found in report["prompts"])
    # On another machine there is no adapter; a LoRA still needs its base.
    more = ("--base", made.base) if kind == "lora" else ()
    code, text, _ = program("verify", out, *more, "--json")
    assert code == 0 and json.loads(text)["against"] == "golden logits" and json.loads(text)["ok"]
    if kind == "merged":
        spoil(out, "model.safetensors", 0.5)
    else:
        spoil(out, "adapter_model.safetensors", 2.0)
    # What agrees is below 1e-9 (above); a tiny T5 with tied heads never moves far from uniform, whatever its adapter.
    code, text, _ = program("verify", out, *more, "--max-kl", "1e-4")
    assert code == 1 and "FAILED" in text, text
    assert program("verify", out, *more, "--max-kl", "1e9")[0] == 0


def test_a_tensor_that_is_not_there(
    any_method: Trial, make: Callable[..., Any], fails: Callable[..., str], tmp_path: Path
) -> None:
    """A norm that the files lack gets ones, which is what a norm often has: no comparison of logits would see it."""
    made, out = make(any_method), tmp_path / "out"
    peft_export.merge(made.base, made.adapter, out)
    peft_export.verify(out, made.base, made.adapter)
    stored = load_file(out / "model.safetensors")
    del stored["model.norm.weight"]
    save_file(stored, out / "model.safetensors", {"format": "pt"})
    for more in ((), ("--base", made.base, "--adapter", made.adapter)):
        assert "lacks 'model.norm.weight' of a LlamaForCausalLM" in fails("verify", out, *more)


def test_weighted_adapters(additive: Trial, make: Callable[..., Any], program: Any, tmp_path: Path) -> None:
    one = make(additive, name="one")
    two = make(additive, name="two", model=one.model, base=one.base, seed=1)
    adapters = ("--adapter", f"{one.adapter}=0.7", "--adapter", f"{two.adapter}=-0.3")
    code, text, err = program("merge", "--base", one.base, *adapters, "--out", tmp_path / "out", "--verify", "--json")
    assert code == 0, err
    assert json.loads(text)["verification"]["mean_kl"] < 1e-9
    code, *_ = program("verify", tmp_path / "out", "--base", one.base, "--adapter", one.adapter, "--max-kl", "1e-6")
    assert code == 1


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_limits_tell_rounding_from_a_wrong_weight(
    dtype: str, lone: Trial, make: Callable[..., Any], tmp_path: Path
) -> None:
    """By the dtype of what was written, whether that is a whole model or factors beside a base of any dtype."""
    made = make(lone, dtype=torch.bfloat16)
    for weight in (1.0, 0.99):
        peft_export.merge(made.base, {str(made.adapter): weight}, tmp_path / "out", dtype=dtype, overwrite=True)
        found = peft_export.verify(tmp_path / "out", made.base, made.adapter, record=False)
        assert found.max_kl == MAX_KL[dtype] and found.dtype == dtype
        assert found.ok == (weight == 1.0), (weight, found.mean_kl, found.weight)
    peft_export.export_lora(made.base, made.adapter, tmp_path / "lora", dtype=dtype)
    found = peft_export.verify(tmp_path / "lora", made.base, made.adapter)
    assert found.ok and found.dtype == dtype and found.max_kl == MAX_KL[dtype]
    spoil(tmp_path / "lora", "adapter_model.safetensors", 0.05)
    assert not peft_export.verify(tmp_path / "lora", made.base).ok


def test_a_limit_that_the_adapter_itself_keeps_to(
    lone: Trial, make: Callable[..., Any], program: Any, tmp_path: Path
) -> None:
    """An adapter whose effect is smaller than what rounding is allowed: that it was left out cannot be seen, and is said."""
    made = make(lone, dtype=torch.bfloat16)
    shutil.copytree(made.base, tmp_path / "bare")
    report = peft_export.verify(tmp_path / "bare", made.base, made.adapter)
    assert not report.ok and report.effect == pytest.approx(report.mean_kl, rel=1e-3)
    assert "an export without it" not in " ".join(remarks(report))
    arguments = ("verify", tmp_path / "bare", "--base", made.base, "--adapter", f"{made.adapter}=1e-6")
    code, text, _ = program(*arguments)
    assert code == 0 and "an export without it would pass" in " ".join(text.split())
    assert "an export without it" not in " ".join(program(*arguments, "--max-kl", "1e-15")[1].split())


@pytest.mark.parametrize(
    ("family", "name"), [("llama", "model.embed_tokens.weight"), ("gpt2", "transformer.h.1.ln_2.weight")]
)
def test_a_weight_that_logits_do_not_show(
    family: str, name: str, any_method: Trial, make: Callable[..., Any], program: Any, tmp_path: Path
) -> None:
    """A hundredth of a weight that no adapter touches: by name, with every limit but the user's own."""
    made, out = make(any_method, family, dtype=torch.bfloat16), tmp_path / "out"
    peft_export.merge(made.base, made.adapter, out)
    arguments = ("verify", out, "--base", made.base, "--adapter", made.adapter)
    assert json.loads(program(*arguments, "--json")[1])["weight"]["relative"] < 1e-4
    stored = load_file(out / "model.safetensors")
    stored[name] *= 1.01
    save_file(stored, out / "model.safetensors", {"format": "pt"})
    code, text, _ = program(*arguments, "--json")
    report = json.loads(text)
    assert code == 1 and report["weight"]["parameter"] == name and report["mean_kl"] < report["max_kl"]
    assert f"'{name}' is off by" in " ".join(program(*arguments)[1].split())
    assert program(*arguments, "--max-kl", "1e-3")[0] == 0
    # Run in other bits than those of the files, weights are rounded once more: nothing is said of them.
    assert peft_export.verify(out, made.base, made.adapter, dtype="float16").weight is None
    assert peft_export.verify(out, made.base, made.adapter, dtype="auto").weight is not None


def test_rough_limits(any_method: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    """A truncated SVD approximates, and arithmetic in 16 bits rounds at every step, also that of golden logits."""
    made = make(any_method, dtype=torch.bfloat16)
    peft_export.export_lora(made.base, made.adapter, tmp_path / "svd", svd_rank=1)
    assert peft_export.verify(tmp_path / "svd", made.base, made.adapter, record=False).max_kl == MAX_KL_ROUGH
    peft_export.export_lora(made.base, made.adapter, tmp_path / "exact")
    assert peft_export.verify(tmp_path / "exact", made.base, made.adapter, record=False).max_kl == MAX_KL["float32"]
    found = peft_export.verify(tmp_path / "exact", made.base, made.adapter, dtype="auto")
    assert found.ok and found.max_kl == MAX_KL_ROUGH and (found.dtype, found.computed_in) == ("float32", "bfloat16")
    assert peft_export.verify(tmp_path / "exact", made.base).max_kl == MAX_KL_ROUGH


def test_parameters_without_elements(any_method: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    sizes = dict(vocab_size=64, hidden_size=16, embedding_size=16, intermediate_size=16, num_hidden_layers=1)
    config = transformers.MobileBertConfig(**sizes, num_attention_heads=2, intra_bottleneck_size=16)
    model = transformers.MobileBertForMaskedLM(config).eval()
    assert not all(parameter.numel() for parameter in model.parameters())
    made = make(any_method, "bert", model=model, train_modules=())
    peft_export.merge(made.base, made.adapter, tmp_path / "out")
    assert peft_export.verify(tmp_path / "out", made.base, made.adapter).ok


def test_the_card_tells(any_method: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    made = make(any_method)
    for write, name in ((peft_export.merge, "merged"), (peft_export.export_lora, "lora")):
        write(made.base, made.adapter, tmp_path / name)
        card = tmp_path / name / "README.md"
        assert "Not verified yet" in card.read_text()
        peft_export.verify(tmp_path / name, made.base, made.adapter)
        text = card.read_text()
        assert "Not verified yet" not in text and "passed" in text and text.count("## Verification") == 1
        assert text.startswith("---\n") and f'"method": "{any_method.method}"' in text
        assert "library_name: " in text and "tags:" in text


def test_prompts_fit_the_model(any_method: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    """Built-in ones and given ones are cut to the model's positions."""
    config = transformers.GPT2Config(vocab_size=60, n_embd=48, n_layer=2, n_head=4, n_positions=8)
    made = make(any_method, "gpt2", model=transformers.GPT2LMHeadModel(config).eval())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 1, "b": 2}, unk_token="a")))
    tokenizer.backend_tokenizer.pre_tokenizer = Whitespace()
    peft_export.merge(made.base, made.adapter, tmp_path / "out")
    report = peft_export.verify(tmp_path / "out", made.base, made.adapter)
    assert report.ok and [found.positions for found in report.prompts] == [5, 8, 8]
    tokenizer.save_pretrained(tmp_path / "out")
    report = peft_export.verify(tmp_path / "out", made.base, made.adapter, prompts=["a b " * 30, "b"])
    assert report.ok and [found.positions for found in report.prompts] == [8, 1]
    for prompt, why in (("", "has no tokens to compare"), ("\udcff", "not UTF-8")):
        with pytest.raises(pc.DataError, match=why):
            peft_export.verify(tmp_path / "out", made.base, made.adapter, prompts=["a", prompt])


def test_nothing_is_recorded_unasked(any_method: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    made = make(any_method)
    peft_export.merge(made.base, made.adapter, tmp_path / "out")
    peft_export.verify(tmp_path / "out", made.base, made.adapter, record=False)
    assert not (tmp_path / "out/verification").exists()
    with pytest.raises(pc.MergeError, match="carries no golden logits yet"):
        peft_export.verify(tmp_path / "out")


def test_nothing_is_recorded_in_what_is_no_export(any_method: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    made = make(any_method)
    made.handle.merge_and_detach().save_pretrained(tmp_path / "merged")
    assert peft_export.verify(tmp_path / "merged", made.base, made.adapter).ok
    assert not peft_export.verify(made.base, made.base, made.adapter).ok
    assert not any((directory / "verification").exists() for directory in (tmp_path / "merged", made.base))


def test_a_card_that_its_owner_edited(any_method: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    made = make(any_method)
    peft_export.merge(made.base, made.adapter, tmp_path / "out")
    card = tmp_path / "out/README.md"
    card.write_bytes(card.read_bytes() + "Für später.".encode("latin-1"))
    assert peft_export.verify(tmp_path / "out", made.base, made.adapter).ok
    assert card.read_bytes().endswith(b"F\xfcr sp\xe4ter.") and b"passed" in card.read_bytes()


def test_bad_input(any_method: Trial, make: Callable[..., Any], fails: Callable[..., str], tmp_path: Path) -> None:
    made = make(any_method)
    out = tmp_path / "out"
    assert "does not exist" in fails("verify", out)
    assert "is not an export" in fails("verify", made.adapter)
    peft_export.export_lora(made.base, made.adapter, out)
    assert "needs its base model" in fails("verify", out)
    assert "needs its base model" in fails("verify", out, "--adapter", made.adapter)
    assert "carries no golden logits" in fails("verify", out, "--base", made.base)
    no_tokenizer = fails("verify", out, "--base", made.base, "--adapter", made.adapter, "--prompt", "Hello")
    assert "there is no tokenizer in" in no_tokenizer
    peft_export.verify(out, made.base, made.adapter)
    golden = out / "verification/golden.safetensors"
    golden.write_bytes(golden.read_bytes()[:500])
    assert "is cut short" in fails("verify", out, "--base", made.base)
    assert "for others give base and adapters" in fails("verify", out, "--base", made.base, "--prompt", "Hello")


def test_what_needs_more_than_text(
    any_method: Trial, make: Callable[..., Any], fails: Callable[..., str], tmp_path: Path
) -> None:
    """CLIP's main input is token ids, and it wants an image with them."""
    tower = dict(hidden_size=48, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4, projection_dim=24)
    text = {**tower, "vocab_size": 60, "max_position_embeddings": 32}
    config = transformers.CLIPConfig(text_config=text, vision_config={**tower, "image_size": 16, "patch_size": 8})
    made = make(any_method, model=transformers.CLIPModel(config).eval())
    peft_export.merge(made.base, made.adapter, tmp_path / "out")
    said = fails("verify", tmp_path / "out", "--base", made.base, "--adapter", made.adapter)
    assert "CLIPModel cannot be run on token ids alone" in said and "only models of text are compared" in said


def test_comparison() -> None:
    p = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    same = compare("", p, p + 3.0)
    assert same.mean_kl < 1e-12 and same.agreement == 1.0 and same.difference == 3.0
    other = compare("", p, torch.tensor([[0.0, 0.0], [0.0, 1.0]]))
    expected = float(
        torch.nn.functional.kl_div(torch.log_softmax(torch.tensor([0.0, 1.0]), 0), p[1].softmax(0), reduction="sum")
    )
    assert other.max_kl == pytest.approx(expected, rel=1e-5) and other.mean_kl == pytest.approx(expected / 2, rel=1e-5)
    assert other.agreement == 0.5 and other.positions == 2
    broken = compare("", p, p * float("nan"))
    assert broken.mean_kl == float("inf") and broken.difference == float("inf")
    with pytest.raises(pc.MergeError, match="logits of shape"):
        compare("", p, p[:1])
