"""ONNX: the export computes what the adapted model computes, in ONNX Runtime and in ONNX Runtime GenAI, at every precision."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime
import onnxruntime_genai
import onnxscript
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import peft_core as pc
import peft_export
from peft_core.testing.checks import Trial, randomise, trials
from peft_core.testing.families import FAMILIES
from peft_export.onnx import exporting, graphs, installed, quantizing, tracing
from peft_export.onnx.genai import genai_config
from peft_export.onnx.runtime import ONE_BY_ONE, PADDED, WHOLE
from peft_export.verdict import MAX_KL

pytestmark = pytest.mark.filterwarnings("ignore")

TINY: dict[str, Any] = dict(vocab_size=60, max_position_embeddings=32, pad_token_id=0)
GENERATES = ("llama", "qwen3", "gemma3", "gpt2", "t5")


@dataclass(frozen=True)
class Exported:
    """An export, what it was made from, and what was found as it was made."""

    base: Path
    adapter: Path
    out: Path
    report: peft_export.OnnxReport
    parameters: int


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Exported]:
    """A family's tiny model with an adapter as ONNX; tracing takes seconds, so every export is made once."""
    made: dict[tuple[object, ...], Exported] = {}

    def export(family: str, precision: str = "fp32", trial: Trial | None = None) -> Exported:
        found = trials([])
        used = trial or next((t for t in found if not t.can.exclusive), found[0])
        key = (family, precision, str(used))
        if key not in made:
            folder = tmp_path_factory.mktemp(f"{family}-{precision}")
            kind = FAMILIES[family]
            model = kind.build()
            model.save_pretrained(folder / "base")
            randomise(pc.attach(model, used.spec(kind)), 0).save(folder / "adapter")
            inputs = folder / "base", folder / "adapter"
            report = peft_export.export_onnx(*inputs, folder / "out", precision=precision, block_size=16)
            parameters = sum(parameter.numel() for parameter in kind.build().parameters())
            made[key] = Exported(*inputs, folder / "out", report, parameters)
        return made[key]

    return export


@pytest.mark.parametrize("family", [*GENERATES, "bert"])
def test_every_way_computes_what_the_adapted_model_computes(family: str, exported: Any, program: Any) -> None:
    made = exported(family)
    code, text, err = program("verify", made.out, "--base", made.base, "--adapter", made.adapter, "--json")
    report = json.loads(text)
    assert code == 0 and report["ok"] and report["kind"] == "onnx" and report["dtype"] == "fp32", err
    ways = {WHOLE, PADDED, ONE_BY_ONE} if family in GENERATES else {WHOLE, PADDED}
    assert {found["way"] for found in report["prompts"]} == ways and len(report["prompts"]) == 3 * len(ways)
    assert max(found["difference"] for found in report["prompts"]) < 1e-4
    assert report["generated_equal"] == report["generated"] and (report["generated"] > 20) == (family in GENERATES)
    # Elsewhere, with neither base nor adapter.
    elsewhere = peft_export.verify(made.out)
    assert elsewhere.ok and elsewhere.against == "golden logits" and elsewhere.generated == report["generated"]
    assert len(elsewhere.prompts) == len(report["prompts"])


def test_another_model_fails(exported: Any, program: Any, tmp_path: Path) -> None:
    """The base alone is not the adapted model; neither is one whose weights were moved a little."""
    made = exported("qwen3")
    other = tmp_path / "other"
    shutil.copytree(made.out, other)
    weights = np.memmap(other / "model.onnx.data", dtype=np.float32, mode="r+")
    weights += np.float32(2e-3) * np.random.default_rng(0).standard_normal(len(weights), dtype=np.float32)
    weights.flush()
    code, text, _ = program("verify", other, "--base", made.base, "--adapter", made.adapter)
    text = " ".join(text.split())  # lines break where the path's length has it
    assert code == 1 and "FAILED" in text and "logits within 0.001" in text
    assert program("verify", other, "--base", made.base, "--adapter", made.adapter, "--max-kl", "1e9")[0] == 0


def test_inputs_and_outputs(exported: Any) -> None:
    session = onnxruntime.InferenceSession(exported("llama").out / "model.onnx")
    shapes = {found.name: found.shape for found in (*session.get_inputs(), *session.get_outputs())}
    assert shapes == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "total"],
        "position_ids": ["batch", "sequence"],
        **{f"past_key_values.{n}.{what}": ["batch", 2, "past", 12] for n in range(2) for what in ("key", "value")},
        "logits": ["batch", "sequence", 60],
        **{f"present.{n}.{what}": ["batch", 2, "total", 12] for n in range(2) for what in ("key", "value")},
    }
    session = onnxruntime.InferenceSession(exported("bert").out / "model.onnx")
    assert [found.name for found in session.get_inputs()] == ["input_ids", "attention_mask", "token_type_ids"]
    assert [(found.name, found.shape) for found in session.get_outputs()] == [("logits", ["batch", 3])]
    encoder = onnxruntime.InferenceSession(exported("t5").out / "encoder.onnx")
    assert [found.name for found in encoder.get_outputs()][:2] == ["last_hidden_state", "present.0.encoder.key"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_tied_weights_are_stored_once_and_others_apart(family: str, exported: Any) -> None:
    """Llama's head is its own; GPT-2's is the embedding; T5's embedding is read by both files."""
    made = exported(family)
    model = FAMILIES[family].build()
    stored = (made.out / "model.onnx.data").stat().st_size
    assert stored <= 4 * made.parameters  # parameters() counts a tied one once
    assert stored > 4 * 0.95 * made.parameters  # small ones are in the graph
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (family != "llama") == any("one matrix" in note for note in made.report.notes)


@pytest.mark.parametrize(("family", "precision"), [("llama", "fp16"), ("bert", "int8"), ("gpt2", "int4")])
def test_precisions(family: str, precision: str, exported: Any) -> None:
    made = exported(family, precision)
    found = peft_export.verify(made.out, made.base, made.adapter)
    assert found.ok and found.dtype == precision and found.max_difference is None
    assert 0 < found.mean_kl <= found.max_kl == MAX_KL[precision]
    bits = exporting.PRECISIONS[precision]
    if bits == 16:
        assert made.report.bytes < 0.7 * exported(family).report.bytes and made.report.quantized == 0
        return
    assert 0.8 < made.report.quantized < 1
    # Per weight its bits; per block of 16 a scale of 32 bits, and a zero of as many as a weight; 72 is filled up to 80.
    stored = (made.out / "model.onnx.data").stat().st_size
    rest = (1 - made.report.quantized) * 4 * made.parameters
    assert stored <= made.parameters * (bits + 2 + bits / 16) / 8 * 1.15 + rest


def test_what_int4_is_is_said(exported: Any, program: Any) -> None:
    """The tied embedding has 8 bits, and the report says so; that so few bits change what is written is said with the verdict."""
    made = exported("gpt2", "int4")
    table = made.parameters - sum(p.numel() for p in FAMILIES["gpt2"].build().transformer.h.parameters())
    assert made.report.by_bits.keys() == {4, 8} and sum(made.report.by_bits.values()) == made.report.quantized
    assert 0.6 < made.report.by_bits[8] * made.parameters / table <= 1.05
    assert re.fullmatch(r"[0-9.]+ % in 4 bits, [0-9.]+ % in 8 bits, in blocks of 16", made.report.blocks)
    assert made.report.blocks in (made.out / "README.md").read_text()
    arguments = ("--base", made.base, "--adapter", made.adapter)
    _, text, _ = program("verify", made.out, *arguments)
    warning = "int4 is coarse: the first choice is the adapted model's at"
    assert warning in " ".join(text.split()) and warning in (made.out / "README.md").read_text()
    other = exported("bert", "int8")
    assert "coarse" not in program("verify", other.out, "--base", other.base, "--adapter", other.adapter)[1]


def test_quantized_ties_and_gemms(exported: Any) -> None:
    """GPT-2: no Gemm is passed over, and the embedding is read from the head's blocks."""
    nodes = onnx.load(exported("gpt2", "int4").out / "model.onnx", load_external_data=False).graph.node
    kinds = [node.op_type for node in nodes]
    assert kinds.count("MatMulNBits") == 2 * 4 + 1 and kinds.count("GatherBlockQuantized") == 1
    assert "Gemm" not in kinds
    head = [node.input[1] for node in nodes if node.op_type == "MatMulNBits"][-1]
    table = next(node for node in nodes if node.op_type == "GatherBlockQuantized").input[0]
    assert head in next(node for node in nodes if table in node.output).input


def test_nothing_to_quantize_is_an_error() -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(8, 4)

        def forward(self, inputs: dict[str, Tensor]) -> list[Tensor]:
            return [self.table(inputs["input_ids"])]

    graph = graphs.Graph("model", Lookup(), {"input_ids": torch.zeros(2, 3, dtype=torch.long)}, ("out",), {})
    with pytest.raises(pc.MergeError, match="no weight of the model can be quantized"):
        quantizing.quantize(tracing.trace(graph), 4, 16)


def test_what_has_no_onnx_form_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    class Unknown(nn.Module):
        def forward(self, inputs: dict[str, Tensor]) -> list[Tensor]:
            return [torch.linalg.eigvalsh(inputs["x"])]

    class Decides(nn.Module):
        def forward(self, inputs: dict[str, Tensor]) -> list[Tensor]:
            return [inputs["x"] + 1 if inputs["x"].sum() > 0 else inputs["x"]]

    x = {"x": torch.eye(3)}
    with pytest.raises(pc.ModelError, match=r"Unknown cannot be written as ONNX: .* aten\._linalg_eigh") as said:
        tracing.trace(graphs.Graph("model", Unknown(), x, ("y",), {}))
    assert "\n" not in str(said.value)
    with pytest.raises(
        pc.ModelError, match=r"Decides cannot be traced for ONNX: it decides by values .*, in test_onnx"
    ) as said:
        tracing.trace(graphs.Graph("model", Decides(), x, ("y",), {}))
    assert "\n" not in str(said.value) and 'inputs["x"].sum() > 0' in str(said.value)
    assert capfd.readouterr() == ("", "")


def test_a_reason_that_begins_with_a_heading() -> None:
    """What torch says of MPT: the first line alone gives no reason."""
    graph = cast(Any, SimpleNamespace(module=nn.Linear(1, 1)))
    said = tracing._explained(graph, ValueError("The following inconsistencies were found:\nEq(a, 1)\nEq(b, 1)"))
    assert said == "Linear cannot be traced for ONNX: The following inconsistencies were found: Eq(a, 1)"
    assert tracing._explained(graph, ValueError("no:\n")).endswith("ONNX: no:")
    assert tracing._explained(graph, ValueError()).endswith("ONNX: ValueError")


def test_a_clamp_of_what_is_not_finite_is_in_the_graph() -> None:
    """BART and others clamp, in float16, where a value has overflowed: the graph must always do so, and changes nothing else."""

    class Clamps(nn.Module):
        def forward(self, inputs: dict[str, Tensor]) -> list[Tensor]:
            x = 2 * inputs["x"]
            if not torch.isfinite(x).all():
                x = x.clamp(-100, 100)
            if torch.isinf(x).any() or torch.isnan(x).any():
                x = x.clamp(-50, 50)
            return [torch.where(torch.isinf(inputs["x"]), x, x + 1)]

    model = tracing.trace(graphs.Graph("model", Clamps(), {"x": torch.eye(3)}, ("y",), {}))
    session = onnxruntime.InferenceSession(onnxscript.ir.to_proto(model).SerializeToString())
    x = np.array([[1, np.inf, -np.inf]] * 3, dtype=np.float32)
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], [[3, 50, -50]] * 3)


def test_bart_in_float16(any_method: Trial, make: Callable[..., Any], program: Any, tmp_path: Path) -> None:
    sides = {
        f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("attention_heads", 4))
    }
    config = transformers.BartConfig(**TINY, **sides, d_model=48, encoder_ffn_dim=72, decoder_ffn_dim=72)
    torch.manual_seed(0)
    made = make(any_method, "t5", model=transformers.BartForConditionalGeneration(config).eval())
    arguments = ("--base", made.base, "--adapter", made.adapter, "--out", tmp_path / "out", "--precision", "fp16")
    code, text, err = program("export", "onnx", *arguments, "--json")
    assert code == 0 and json.loads(text)["verification"]["ok"], err


def test_a_decoder_that_counts_its_positions_itself(
    any_method: Trial, make: Callable[..., Any], tmp_path: Path
) -> None:
    """A batch padded on the left is another text to it, in transformers too."""
    sides = {f"decoder_{what}": n for what, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 72))}
    config = transformers.BartConfig(**TINY, **sides, d_model=48, is_decoder=True, is_encoder_decoder=False)
    torch.manual_seed(0)
    made = make(any_method, "t5", model=transformers.BartForCausalLM(config).eval())
    peft_export.export_onnx(made.base, made.adapter, tmp_path / "out")
    report = peft_export.verify(tmp_path / "out", made.base, made.adapter)
    assert report.ok and "in a padded batch" in {prompt.way for prompt in report.prompts}


def test_experts(any_method: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    sizes = dict(hidden_size=48, intermediate_size=72, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2)
    heads = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=12)
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**TINY, **sizes, **heads)).eval()
    made = make(any_method, model=model)
    peft_export.export_onnx(made.base, made.adapter, tmp_path / "out")
    found = peft_export.verify(tmp_path / "out", made.base, made.adapter)
    assert found.ok and found.generated_equal == found.generated > 20


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_genai_generates_the_adapted_models_tokens(family: str, exported: Any) -> None:
    out = exported(family).out
    peft_export.verify(out, exported(family).base, exported(family).adapter)
    golden = load_file(out / "verification/golden.safetensors")
    prompt, written = golden["0.input_ids"].tolist(), golden["0.greedy"].tolist()
    model = onnxruntime_genai.Model(str(out))
    settings = onnxruntime_genai.GeneratorParams(model)
    settings.set_search_options(do_sample=False, max_length=len(prompt) + len(written))
    generator = onnxruntime_genai.Generator(model, settings)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    found = generator.get_sequence(0).tolist()[len(prompt) :]
    # It stops at the end of text (2), which the greedy tokens go beyond.
    assert found == written[: len(found)] and (len(found) == len(written) or found[-1] == 2)
    assert len(found) > 3


def test_a_configuration_without_a_padding_token() -> None:
    """CodeGen's has no such field at all."""
    config = transformers.CodeGenConfig(n_layer=1, n_embd=32, n_head=4, eos_token_id=2)
    assert not hasattr(config, "pad_token_id")
    past = {f"past_key_values.0.{name}": torch.empty(1, 4, 0, 8) for name in ("key", "value")}
    found, why_not = genai_config(cast(Any, SimpleNamespace(inputs=past)), config, {})
    assert not why_not and found["model"]["pad_token_id"] == found["model"]["eos_token_id"] == 2


@pytest.mark.parametrize("end", [None, []])
def test_a_configuration_without_an_end(end: Any) -> None:
    config = transformers.CodeGenConfig(n_layer=1, n_embd=32, n_head=4, eos_token_id=end)
    past = {f"past_key_values.0.{name}": torch.empty(1, 4, 0, 8) for name in ("key", "value")}
    found, why_not = genai_config(cast(Any, SimpleNamespace(inputs=past)), config, {"eos_token_id": end})
    assert not found and "has no eos_token_id" in why_not


def test_a_classifier_that_reads_the_last_token_before_the_padding(
    any_method: Trial, make: Callable[..., Any], tmp_path: Path
) -> None:
    """Any other filling of a batch would make it read the filling."""
    sizes = dict(
        hidden_size=48, intermediate_size=72, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2
    )
    config = transformers.LlamaConfig(**{**TINY, "pad_token_id": 5}, **sizes, num_labels=3)
    torch.manual_seed(0)
    made = make(any_method, model=transformers.LlamaForSequenceClassification(config).eval())
    peft_export.export_onnx(made.base, made.adapter, tmp_path / "out")
    report = peft_export.verify(tmp_path / "out", made.base, made.adapter)
    assert report.ok and {found.way for found in report.prompts} == {WHOLE, PADDED}


def test_a_weight_too_large_for_float16(
    any_method: Trial, make: Callable[..., Any], fails: Any, tmp_path: Path
) -> None:
    model: Any = FAMILIES["bert"].build()
    with torch.no_grad():
        model.bert.encoder.layer[0].output.LayerNorm.weight[0] = 1e5
    made = make(any_method, "bert", model=model)
    arguments = ("export", "onnx", "--base", made.base, "--adapter", made.adapter, "--out", tmp_path / "out")
    said = fails(*arguments, "--precision", "fp16")
    assert "layer.0.output.LayerNorm.weight" in said and "too large for fp16" in said
    assert not (tmp_path / "out").exists()


def test_every_method(method: Trial, exported: Any) -> None:
    made = exported("bert", "fp32", method)
    assert peft_export.verify(made.out, made.base, made.adapter).ok


def test_what_is_written(exported: Any, program: Any) -> None:
    made = exported("qwen3")
    report = made.report
    assert report.files == ("model.onnx", "model.onnx.data") and report.seconds > 0 and report.peak_memory > 0
    assert not any("not in the graph" in note for note in report.notes)
    assert report.weights == made.parameters and report.bytes == sum(
        (made.out / file).stat().st_size for file in report.files
    )
    names = {path.name for path in made.out.iterdir()} - {"verification"}
    assert names == {
        *report.files,
        "README.md",
        "config.json",
        "generation_config.json",
        "export.json",
        "genai_config.json",
    }
    # Nothing of the machine that it was traced on.
    graph = (made.out / "model.onnx").read_bytes()
    assert b"torch" not in graph and b"site-packages" not in graph
    peft_export.verify(made.out, made.base, made.adapter)
    card = (made.out / "README.md").read_text()
    assert "`past_key_values.N.key`" in card and "passed" in card and "library_name: onnx" in card


def test_the_command(any_method: Trial, make: Callable[..., Any], program: Any, fails: Any, tmp_path: Path) -> None:
    """Verification is part of it, and its failure is the command's."""
    made = make(any_method, "bert")
    arguments = ("export", "onnx", "--base", made.base, "--adapter", made.adapter, "--out", tmp_path / "out")
    code, out, err = program(*arguments)
    assert code == 0 and "passed" in out and "memory at most" in out and "in a padded batch" in out, err
    (made.base / "generation_config.json").write_text("{not json")
    said = fails(*arguments, "--overwrite", "--no-verify")
    assert "generation_config.json' cannot be read" in said and (tmp_path / "out/model.onnx").is_file()
    (made.base / "generation_config.json").unlink()
    code, out, _ = program(*arguments, "--overwrite", "--no-verify", "--json", "--precision", "int4")
    report = json.loads(out)
    assert code == 0 and "verification" not in report and report["block_size"] == 32
    assert not (tmp_path / "out/verification").exists()


def test_what_is_not_in_the_graph_is_said(any_method: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    """A model of images and text is exported for text: its tower for images is left out, with what was adapted there."""
    sizes = dict(hidden_size=48, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4)
    text = {**TINY, **sizes, "num_key_value_heads": 2, "head_dim": 12}
    tokens = dict(mm_tokens_per_image=4, image_token_index=57, boi_token_index=58, eoi_token_index=59)
    vision = {**sizes, "image_size": 16, "patch_size": 4}
    torch.manual_seed(0)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, **tokens)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    inside = sum(p.numel() for p in model.model.language_model.parameters())
    made = make(any_method, model=model, targets=["q_proj", "v_proj"])
    report = peft_export.export_onnx(made.base, made.adapter, tmp_path / "out")
    assert report.weights == inside
    (note,) = (note for note in report.notes if "not in the graph" in note)
    assert "model.vision_tower" in note and "4 of the 8 layers that the adapter changes are lost with that" in note


def test_bad_input(
    any_method: Trial, make: Callable[..., Any], fails: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(any_method, "bert")
    arguments = ("export", "onnx", "--base", made.base, "--adapter", made.adapter, "--out", tmp_path / "out")
    said = fails(*arguments, "--precision", "int2")
    assert "no precision 'int2'" in said and "fp32, fp16, int8, int4" in said
    assert "block_size is 48; it is one of 16, 32, 64, 128" in fails(*arguments, "--block-size", "48")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    assert "exists; choose another directory" in fails(*arguments)
    short = dict(layer_types=["conv", "full_attention"], vocab_size=60, hidden_size=48, intermediate_size=72)
    heads = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    hybrid = transformers.Lfm2ForCausalLM(transformers.Lfm2Config(**short, **heads))
    for family, reason, model in (
        ("vit", "takes pixel_values", None),
        ("mamba", "no cache of keys and values", None),
        ("llama", "Lfm2ForCausalLM cannot be run on a cache of keys and values alone", hybrid),
    ):
        other = make(any_method, family, name=family, model=model)
        there = ("--base", other.base, "--adapter", other.adapter, "--out", tmp_path / f"out-{family}")
        assert reason in fails("export", "onnx", *there)
        assert not (tmp_path / f"out-{family}").exists()
    monkeypatch.setattr(installed.importlib.util, "find_spec", lambda name: None)
    assert 'ONNX needs onnx, onnxscript, onnxruntime: python -m pip install "peft-export[onnx]"' in fails(*arguments)


def test_disk_full_while_merging(
    any_method: Trial, make: Callable[..., Any], fails: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directory that was asked for is named, not the one within it where the merged model lies meanwhile."""
    made = make(any_method, "bert")

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(peft_export.shards, "_write_at", full)
    said = fails("export", "onnx", "--base", made.base, "--adapter", made.adapter, "--out", tmp_path / "home/out")
    assert f"'{tmp_path / 'home/out'}' could not be written: the disk is full" in said and ".merged" not in said
    assert not list((tmp_path / "home").iterdir())


def test_damaged_exports(exported: Any, fails: Any, tmp_path: Path) -> None:
    made = exported("bert")
    peft_export.verify(made.out, made.base, made.adapter)
    other = tmp_path / "other"
    shutil.copytree(made.out, other)
    data = other / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:1000])
    said = fails("verify", other)
    assert (
        "model.onnx' or its data cannot be loaded" in said
        and "file_length: 1000" in said
        and "/onnxruntime" not in said
    )
    data.unlink()
    assert "model.onnx' or its data cannot be loaded" in fails("verify", other)
    (other / "model.onnx").write_bytes(b"no graph")
    assert "model.onnx' or its data cannot be loaded" in fails("verify", other)
    (other / "model.onnx").unlink()
    assert "model.onnx' is missing" in fails("verify", other)
