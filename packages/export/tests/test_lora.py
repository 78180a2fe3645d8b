"""Lowered adapters: the installed PEFT library loads them and computes what the adapter computes."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import peft_core as pc
import peft_export
from peft_core.testing.checks import Trial
from peft_export import running, svd
from peft_export.runtimes import RUNTIMES, Request, runtime

pytestmark = pytest.mark.filterwarnings("ignore")

TINY: dict[str, Any] = dict(
    vocab_size=60, hidden_size=48, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4
)


def by_peft(made: Any, directory: Path) -> torch.Tensor:
    """What PEFT computes with the base and the lowered adapter."""
    base = type(made.model).from_pretrained(made.base)
    return made.output(peft.PeftModel.from_pretrained(base, directory).eval())


def factors(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_peft_computes_the_same(exact: Trial, family: str, make: Callable[..., Any], tmp_path: Path) -> None:
    made = make(exact, family)
    report = peft_export.export_lora(made.base, made.adapter, tmp_path / "out")
    assert report.worst.error == 0.0
    torch.testing.assert_close(by_peft(made, tmp_path / "out"), made.output(), atol=1e-5, rtol=1e-5)


def test_factors_are_exact(exact: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    """To 1e-6, also where the adapter's own tensors are bfloat16."""
    made = make(exact, dtype=torch.float64, spec={"dtype": "bfloat16"})
    peft_export.export_lora(made.base, made.adapter, tmp_path / "out")
    found = factors(tmp_path / "out")
    before = {site.path: made.model.get_parameter(f"{site.path}.weight").clone() for site in made.handle.plan.sites}
    made.handle.merge()
    for path, weight in before.items():
        delta = made.model.get_parameter(f"{path}.weight") - weight
        A, B = (found[f"base_model.model.{path}.lora_{name}.weight"].double() for name in "AB")
        assert float((B @ A - delta).norm() / delta.norm()) < 1e-6


def test_some_layers_only(lone: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    made = make(lone, targets=r".*\.(0\.self_attn\.q_proj|[01]\.mlp\.up_proj)")
    peft_export.export_lora(made.base, made.adapter, tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["target_modules"] == sorted(site.path for site in made.handle.plan.sites)
    torch.testing.assert_close(by_peft(made, tmp_path / "out"), made.output(), atol=1e-5, rtol=1e-5)


def test_embeddings_and_head_trained_together(any_method: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    made = make(any_method, train_modules=("embed_tokens", "lm_head"))
    peft_export.export_lora(made.base, made.adapter, tmp_path / "out")
    torch.testing.assert_close(by_peft(made, tmp_path / "out"), made.output(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "modules", "task"),
    [
        ("Roberta", ("classifier.dense", "classifier.out_proj"), None),
        ("Roberta", ("classifier",), "SEQ_CLS"),
        ("Roberta", ("out_proj",), None),
        ("DistilBert", ("classifier", "pre_classifier"), "SEQ_CLS"),
        ("DistilBert", ("classifier",), None),
    ],
)
def test_heads_of_several_layers(
    kind: str, modules: tuple[str, ...], task: str | None, any_method: Trial, make: Callable[..., Any], tmp_path: Path
) -> None:
    """With a task, PEFT looks for all of `classifier`; without, too, for every module whose name ends like one saved."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**TINY, hidden_dim=72, max_position_embeddings=32, num_labels=3)
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()
    made = make(any_method, "bert", model=model, targets=r".*(query|q_lin)", train_modules=modules)
    peft_export.export_lora(made.base, made.adapter, tmp_path / "out")
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["task_type"] == task
    torch.testing.assert_close(by_peft(made, tmp_path / "out"), made.output(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "head"), [("Bert", "cls"), ("Roberta", "lm_head")])
def test_a_head_with_one_parameter_under_two_names(
    kind: str, head: str, any_method: Trial, make: Callable[..., Any], tmp_path: Path
) -> None:
    """Its bias is its decoder's, too: PEFT looks for both, and where the embeddings are parted, so is the bias."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**TINY, max_position_embeddings=32)
    model = getattr(transformers, f"{kind}ForMaskedLM")(config).eval()
    made = make(any_method, "bert", model=model, targets=["query"], train_modules=(head,))
    peft_export.export_lora(made.base, made.adapter, tmp_path / "lora")
    torch.testing.assert_close(by_peft(made, tmp_path / "lora"), made.output(), atol=1e-5, rtol=1e-5)
    peft_export.merge(made.base, made.adapter, tmp_path / "merged", untie=True)
    merged = type(made.model).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(made.output(merged), made.output(), atol=1e-5, rtol=1e-5)
    for out in ("lora", "merged"):
        assert peft_export.verify(tmp_path / out, made.base, made.adapter).ok


@pytest.mark.parametrize("targets", [r".*_proj", r".*mlp.*(gate|up)_proj"])
@pytest.mark.parametrize("kind", ["DeepseekV3", "Glm4Moe"])
def test_what_peft_would_take_for_experts(
    kind: str, targets: str, lone: Trial, make: Callable[..., Any], tmp_path: Path
) -> None:
    """A dense layer and shared experts beside stacked experts, whose names in the files are the same."""
    made = make(lone, model=mixture(kind), targets=targets)
    report = peft_export.export_lora(made.base, made.adapter, tmp_path / "out")
    assert any("PEFT would take" in note and "target_parameters" in note for note in report.notes)
    torch.testing.assert_close(by_peft(made, tmp_path / "out"), made.output(), atol=1e-5, rtol=1e-5)


def test_ranks_of_what_peft_would_take_for_experts(inexact: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    made = make(inexact, model=mixture("Glm4Moe"), targets=["q_proj", "o_proj", "up_proj", "down_proj"])
    report = peft_export.export_lora(made.base, made.adapter, tmp_path / "out", svd_rank=30)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert any(re.fullmatch(key, f"{site.path}.weight") for key in config["rank_pattern"] for site in report.sites)
    ours = running.with_lora(type(made.model).from_pretrained(made.base).eval(), tmp_path / "out")
    torch.testing.assert_close(by_peft(made, tmp_path / "out"), made.output(ours), atol=1e-5, rtol=1e-5)


def mixture(kind: str) -> torch.nn.Module:
    """A dense layer, and one of stacked and shared experts."""
    torch.manual_seed(0)
    latent = dict(q_lora_rank=24, kv_lora_rank=24, qk_nope_head_dim=12, qk_rope_head_dim=6, v_head_dim=12)
    config = getattr(transformers, f"{kind}Config")(
        **TINY,
        **(latent if kind == "DeepseekV3" else {"head_dim": 12}),
        num_key_value_heads=4,
        max_position_embeddings=32,
        moe_intermediate_size=24,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
    )
    model: torch.nn.Module = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    return model


def test_padding_changes_nothing(exact: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    made = make(exact)
    report = peft_export.export_lora(made.base, made.adapter, tmp_path / "out", fit="vllm")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert report.rank in RUNTIMES["vllm"].ranks and config["r"] == config["lora_alpha"] == report.rank
    assert not config["rank_pattern"] and not config["alpha_pattern"] and not report.problems
    assert {len(t) for key, t in factors(tmp_path / "out").items() if "lora_A" in key} == {report.rank}
    assert f"--enable-lora --max-lora-rank {report.rank}" in report.command
    torch.testing.assert_close(by_peft(made, tmp_path / "out"), made.output(), atol=1e-5, rtol=1e-5)


def test_methods_without_factors_are_refused(inexact: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    made = make(inexact)
    with pytest.raises(pc.MergeError, match=r"factors.*--svd-rank R or --svd-energy 0\.99"):
        peft_export.export_lora(made.base, made.adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_svd(inexact: Trial, family: str, make: Callable[..., Any], tmp_path: Path) -> None:
    made = make(inexact, family)
    whole = peft_export.export_lora(made.base, made.adapter, tmp_path / "whole", svd_rank=48)
    assert whole.worst.error < 1e-5
    torch.testing.assert_close(by_peft(made, tmp_path / "whole"), made.output(), atol=1e-3, rtol=1e-3)
    part = peft_export.export_lora(made.base, made.adapter, tmp_path / "part", svd_rank=3)
    assert part.rank == 3 and part.worst.error > 1e-3
    ranks = set()
    for energy in (0.6, 0.8, 0.9, 0.95):
        kept = peft_export.export_lora(
            made.base, made.adapter, tmp_path / "kept", svd_energy=energy, overwrite=(tmp_path / "kept").exists()
        )
        assert all(site.error**2 <= 1 - energy + 1e-6 for site in kept.sites)
        config = json.loads((tmp_path / "kept/adapter_config.json").read_text())
        found = {site.rank for site in kept.sites}
        assert config["rank_pattern"] == config["alpha_pattern"] and bool(config["rank_pattern"]) == (len(found) > 1)
        by_peft(made, tmp_path / "kept")
        ranks |= found
    assert len(ranks) > 1


def test_exact_factors_can_be_reduced(exact: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    made = make(exact)
    report = peft_export.export_lora(made.base, made.adapter, tmp_path / "out", svd_rank=2)
    assert report.rank == 2
    assert all((site.error > 0) == (rank > 2) for site, rank in zip(report.sites, _ranks(made, tmp_path), strict=True))


def _ranks(made: Any, tmp_path: Path) -> list[int]:
    report = peft_export.export_lora(made.base, made.adapter, tmp_path / "again")
    return [site.rank for site in report.sites]


def test_svd_of_known_matrices() -> None:
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(7, 1500, generator=generator), torch.randn(1300, 7, generator=generator)
    found = svd.truncate(B @ A, None, 0.999999)
    assert len(found.A) == 7 and found.error < 1e-3
    torch.testing.assert_close(found.B @ found.A, B @ A, atol=1e-2, rtol=1e-3)
    best = torch.linalg.svdvals(B @ A)
    cut = svd.truncate(B @ A, 3, None)
    assert len(cut.A) == 3 and cut.error == pytest.approx(float(best[3:].norm() / best.norm()), rel=1e-3)
    again = svd.reduce(A, B, 3, None)
    assert again.error == pytest.approx(cut.error, rel=1e-3)
    torch.testing.assert_close(again.B @ again.A, cut.B @ cut.A, atol=1e-2, rtol=1e-2)
    nothing = svd.truncate(torch.zeros(5, 9), 3, None)
    assert nothing.error == 0.0 and nothing.A.shape == (1, 9) and nothing.B.shape == (5, 1)


def test_what_runtimes_cannot_serve(any_method: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    made = make(any_method, "bert")
    report = peft_export.export_lora(made.base, made.adapter, tmp_path / "bert", fit="vllm")
    assert any("trained in full (classifier)" in problem for problem in report.problems)
    report = peft_export.export_lora(made.base, made.adapter, tmp_path / "sglang", fit="sglang")
    assert any("does not know the modules" in problem and "query" in problem for problem in report.problems)


def test_conv1d_is_merged_instead(any_method: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    made = make(any_method, "gpt2")
    for name in RUNTIMES:
        report = peft_export.export_lora(made.base, made.adapter, tmp_path / name, fit=name)
        assert any("applies no LoRA to GPT2LMHeadModel: merge" in problem for problem in report.problems)


def test_without_padding_a_runtime_may_refuse(any_method: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    made = make(any_method)
    report = peft_export.export_lora(made.base, made.adapter, tmp_path / "out", fit="vllm", pad_rank=False, svd_rank=2)
    assert report.problems == ("vLLM accepts the ranks 1, 8, 16, 32, 64, 128, 256, 320, 512, not 2: leave padding on",)


def test_ranks_of_runtimes() -> None:
    vllm = runtime("vllm")
    assert [vllm.rank(rank) for rank in (1, 2, 8, 9, 64, 300, 512)] == [1, 8, 8, 16, 64, 320, 512]
    with pytest.raises(pc.MergeError, match="ranks up to 512, the adapter has 513"):
        vllm.rank(513)
    with pytest.raises(pc.MergeError, match=r"no runtime 'vlm' \(did you mean 'vllm'\?\)"):
        runtime("vlm")


def test_commands_of_runtimes(tmp_path: Path) -> None:
    """They are typed into a shell; llama.cpp's converter tells a directory from a name."""
    base = tmp_path / "the base"
    base.mkdir()
    request = Request(str(base), "it's", "LlamaForCausalLM", ["q_proj"], [], False)
    for name, made in RUNTIMES.items():
        words = shlex.split(made.command(request, 8))
        assert str(base) in words and {"it's", "adapter=it's"} & set(words), name
    named = Request("owner/name", "out", "LlamaForCausalLM", ["q_proj"], [], False)
    assert "--base-model-id owner/name" in runtime("llama.cpp").command(named, 8)
    assert f"--base '{base}'" in runtime("llama.cpp").command(request, 8)
    passed = [head for head in ("model.norm", "norm", "l.0.input_layernorm", "q_norm", "lm_head") if _passes(head)]
    assert passed == ["model.norm", "norm", "l.0.input_layernorm"]


def _passes(head: str) -> bool:
    return runtime("llama.cpp").passes(head)


def test_trained_modules_too_large_for_the_dtype(
    lone: Trial, make: Callable[..., Any], fails: Any, tmp_path: Path
) -> None:
    made = make(lone, targets=["lm_head"], train_modules=("norm",))
    with torch.no_grad():
        for parameter in made.handle.parameters():
            parameter.fill_(1e5 if parameter.dim() == 1 else 1e-3)
    made.handle.save(tmp_path / "large")
    arguments = ("export", "lora", "--base", made.base, "--adapter", tmp_path / "large", "--out", tmp_path / "out")
    said = fails(*arguments, "--dtype", "float16", "--svd-rank", "4")
    assert "norm.weight' has values up to 1e+05" in said and "too large for float16" in said


def test_a_configuration_is_base_enough(exact: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    made = make(exact)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((made.base / "config.json").read_bytes())
    peft_export.export_lora(bare, made.adapter, tmp_path / "out")
    peft_export.export_lora(made.base, made.adapter, tmp_path / "expected")
    found, expected = factors(tmp_path / "out"), factors(tmp_path / "expected")
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def test_another_base_is_refused(any_method: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    made = make(any_method)
    other = tmp_path / "other"
    other.mkdir()
    stored = {key: torch.cat([t, t]) for key, t in load_file(made.base / "model.safetensors").items()}
    save_file(stored, other / "model.safetensors", {"format": "pt"})
    (other / "config.json").write_bytes((made.base / "config.json").read_bytes())
    with pytest.raises(pc.CheckpointError, match="was trained on another base model"):
        peft_export.export_lora(other, made.adapter, tmp_path / "out")


def test_dtype(exact: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    """Rounded factors are not exact: what is reported, in the card too, is the error of what is stored."""
    made = make(exact)
    whole = peft_export.export_lora(made.base, made.adapter, tmp_path / "whole", dtype="float32")
    assert not whole.losses and "lowered exactly" in (tmp_path / "whole/README.md").read_text()
    for dtype, low, high in (("bfloat16", 1e-4, 1e-2), ("float16", 1e-5, 1e-3)):
        report = peft_export.export_lora(made.base, made.adapter, tmp_path / dtype, dtype=dtype)
        found = factors(tmp_path / dtype)
        assert report.dtype == dtype and {t.dtype for t in found.values()} == {getattr(torch, dtype)}
        assert report.losses == (f"rounding to {dtype}",) and low < report.worst.error < high
        card = (tmp_path / dtype / "README.md").read_text()
        assert "lowered exactly" not in card and f"(rounding to {dtype})" in card
        check_errors(report, found, factors(tmp_path / "whole"))


def test_dtype_after_an_svd(inexact: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    """Both errors are in the one that is reported."""
    made = make(inexact)
    peft_export.export_lora(made.base, made.adapter, tmp_path / "whole", svd_rank=48)
    report = peft_export.export_lora(made.base, made.adapter, tmp_path / "out", svd_rank=30, dtype="bfloat16")
    assert report.losses == ("truncated SVD", "rounding to bfloat16")
    check_errors(report, factors(tmp_path / "out"), factors(tmp_path / "whole"))


def check_errors(report: Any, found: dict[str, torch.Tensor], whole: dict[str, torch.Tensor]) -> None:
    for site in report.sites:
        names = [f"base_model.model.{site.path}.lora_{name}.weight" for name in "BA"]
        delta, stored = (tensors[names[0]].double() @ tensors[names[1]].double() for tensors in (whole, found))
        assert site.error == pytest.approx(float((stored - delta).norm() / delta.norm()), rel=0.02, abs=1e-6)


def test_factors_too_large_for_the_dtype(lone: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    made = make(lone, targets=["lm_head"])
    with torch.no_grad():
        for parameter in made.handle.parameters():
            parameter.mul_(1e8)
    made.handle.save(tmp_path / "large")
    with pytest.raises(pc.MergeError, match="'lm_head': its factors are too large for float16; write them as bfloat16"):
        peft_export.export_lora(made.base, tmp_path / "large", tmp_path / "out", dtype="float16")


def test_a_rank_bounds_what_an_energy_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    delta = torch.randn(1100, 1100, generator=torch.Generator().manual_seed(0))
    asked: list[int] = []
    decompose = svd._decompose
    monkeypatch.setattr(svd, "_decompose", lambda delta, wanted: asked.append(wanted) or decompose(delta, wanted))
    assert svd.truncate(delta, 4, 0.999).A.shape == (4, 1100)
    assert asked == [4]


def test_energy_of_exact_factors(exact: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    """A share of ‖ΔW‖² is kept whether the factors were exact or not; all of it is kept without loss."""
    made = make(exact)
    whole = peft_export.export_lora(made.base, made.adapter, tmp_path / "whole", svd_energy=1.0)
    assert whole.worst.error == 0.0 and not whole.losses
    found = factors(tmp_path / "whole")
    for energy in (0.99, 0.5):
        out = tmp_path / str(energy)
        report = peft_export.export_lora(made.base, made.adapter, out, svd_energy=energy)
        for site, before in zip(report.sites, whole.sites, strict=True):
            A, B = (found[f"base_model.model.{site.path}.lora_{name}.weight"].double() for name in "AB")
            values = torch.linalg.svdvals(B @ A).square()
            enough = int((values.cumsum(0) < energy * values.sum()).sum()) + 1
            assert site.rank == enough <= before.rank and site.error**2 <= 1 - energy + 1e-6
        check_errors(report, factors(out), found)
