"""Merging checkpoint files gives what merging in memory gives, byte for byte."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

import peft_core as pc
import peft_export
from peft_core.testing.checks import Trial, same_bits
from peft_core.testing.families import FAMILIES
from peft_export.checkpoint_files import open_checkpoint


def assert_same(found: Path, expected: dict[str, Tensor]) -> None:
    entries = open_checkpoint(found).entries
    stored: dict[str, Tensor] = {}
    for file in {entry.file for entry in entries.values()}:
        stored.update(load_file(file))
    assert stored.keys() == expected.keys()
    different = [key for key in expected if not same_bits(stored[key], expected[key])]
    assert not different, different


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", torch.bfloat16), ("gpt2", torch.float32), ("bert", torch.float32)],
    ids=["llama", "gpt2", "bert"],
)
def test_bytes_are_those_of_merging_in_memory(
    trial: Trial, family: str, dtype: torch.dtype, make: Callable[..., Any], tmp_path: Path
) -> None:
    made = make(trial, family, dtype)
    report = peft_export.merge(made.base, made.adapter, tmp_path / "out")
    assert_same(tmp_path / "out", made.merged_in_memory(tmp_path / "expected"))
    assert report.merged == len(made.handle.plan.sites)
    assert report.trained == sum(map(len, made.handle.plan.trained.values()))
    assert report.merged + report.trained + report.copied == report.tensors
    kept = (tmp_path / "out/config.json").read_bytes() == (made.base / "config.json").read_bytes()
    assert kept, "nothing in the configuration changes"


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "t5", "whisper", "mamba", "phi3", "vit"])
def test_other_architectures(family: str, method: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    made = make(method, family, torch.float16)
    peft_export.merge(made.base, made.adapter, tmp_path / "out")
    assert_same(tmp_path / "out", made.merged_in_memory(tmp_path / "expected"))


def test_sharded_in_and_out(method: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    made = make(method, shards="40KB")
    assert (made.base / "model.safetensors.index.json").is_file()
    report = peft_export.merge(made.base, made.adapter, tmp_path / "out", max_shard_size="60KB")
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 2 and set(report.files) == {*(s.name for s in shards), "model.safetensors.index.json"}
    assert all(sum(t.nbytes for t in load_file(shard).values()) <= 60_000 for shard in shards)
    expected = made.output()
    loaded = type(made.model).from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(made.output(loaded), expected, atol=1e-5, rtol=1e-5)
    assert_same(tmp_path / "out", made.merged_in_memory(tmp_path / "expected"))


def test_without_reading_and_writing_at_a_place(
    any_method: Trial, make: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows."""
    for name in ("copy_file_range", "pread", "preadv", "pwrite", "pwritev"):
        monkeypatch.delattr(os, name, raising=False)
    made = make(any_method, shards="40KB")
    peft_export.merge(made.base, made.adapter, tmp_path / "out", max_shard_size="60KB")
    assert_same(tmp_path / "out", made.merged_in_memory(tmp_path / "expected"))


def test_one_file_from_many(any_method: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    made = make(any_method, shards="40KB")
    report = peft_export.merge(made.base, made.adapter, tmp_path / "out")
    assert report.files == ("model.safetensors",)
    assert not (tmp_path / "out/model.safetensors.index.json").exists()
    assert_same(tmp_path / "out", made.merged_in_memory(tmp_path / "expected"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_dtype(dtype: str, method: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    made = make(method)
    report = peft_export.merge(made.base, made.adapter, tmp_path / "out", dtype=dtype)
    expected = made.merged_in_memory(tmp_path / "expected")
    assert_same(tmp_path / "out", {key: tensor.to(getattr(torch, dtype)) for key, tensor in expected.items()})
    assert report.dtype == dtype
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize("where", ["model.norm.weight", "model.layers.1.mlp.down_proj.weight"])
def test_a_dtype_that_is_too_narrow(
    where: str, any_method: Trial, make: Callable[..., Any], fails: Any, tmp_path: Path
) -> None:
    """What is only copied is rounded, too, and nothing becomes infinite unsaid; what is infinite already stays."""
    model = FAMILIES["llama"].build()
    with torch.no_grad():
        model.get_parameter(where).view(-1)[0] = 1e5
    made = make(any_method, model=model)
    arguments = ("merge", "--base", made.base, "--adapter", made.adapter, "--out", tmp_path / "out", "--dtype")
    said = fails(*arguments, "float16")
    assert f"'{where}'" in said and "1e+05" in said and "too large for float16" in said and "bfloat16" in said
    assert not (tmp_path / "out").exists()
    peft_export.merge(made.base, made.adapter, tmp_path / "out", dtype="bfloat16")
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "out/model.safetensors").values())
    shutil.copytree(made.base, tmp_path / "infinite")
    stored = load_file(made.base / "model.safetensors")
    stored[where].view(-1)[0] = 1.0
    stored["model.norm.weight"][0] = float("inf")
    save_file(stored, tmp_path / "infinite/model.safetensors")
    peft_export.merge(tmp_path / "infinite", made.adapter, tmp_path / "other", dtype="float16")
    assert load_file(tmp_path / "other/model.safetensors")["model.norm.weight"][0].isinf()


def test_several_adapters_with_weights(additive: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    one = make(additive, name="one")
    two = make(additive, name="two", model=one.model, base=one.base, seed=1)
    weights = {str(one.adapter): 0.7, str(two.adapter): 0.3}
    report = peft_export.merge(one.base, weights, tmp_path / "out")
    assert report.adapters == weights
    pc.activate(one.model, {"one": 0.7, "two": 0.3})
    one.handle.merge()
    two.handle.merge()
    two.handle.merge_and_detach()
    assert_same(tmp_path / "out", one.merged_in_memory(tmp_path / "expected"))


def test_a_change_that_is_not_added(exclusive: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    """Half of it is not defined, and another adapter cannot join it."""
    made = make(exclusive)
    reason = "moved weight into the base" if exclusive.can.owns_base_weight else "is not an added Δ"
    with pytest.raises(pc.MergeError, match=rf"{reason}.*weight 0.5; give it weight 1"):
        peft_export.merge(made.base, {str(made.adapter): 0.5}, tmp_path / "out")
    other = tmp_path / "other"
    made.handle.save(other)
    with pytest.raises(pc.MergeError, match=r"not an added Δ.*another adapter"):
        peft_export.merge(made.base, [made.adapter, other], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_weights_are_finite(weight: float, any_method: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    made = make(any_method)
    with pytest.raises(pc.MergeError, match="must be a finite number"):
        peft_export.merge(made.base, {str(made.adapter): weight}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_adapter_under_two_paths(
    any_method: Trial, make: Callable[..., Any], fails: Callable[..., str], tmp_path: Path
) -> None:
    made = make(any_method)
    link = tmp_path / "link"
    link.symlink_to(made.adapter)
    for also in (f"{made.adapter}/", made.adapter / "." / ".." / made.adapter.name, link):
        with pytest.raises(pc.MergeError, match="is given twice"):
            peft_export.merge(made.base, [made.adapter, also], tmp_path / "out")
        adapters = ("--adapter", made.adapter, "--adapter", f"{also}=0.5")
        assert "is given twice" in fails("merge", "--base", made.base, *adapters, "--out", tmp_path / "out")
    with pytest.raises(pc.MergeError, match="no adapter is given"):
        peft_export.merge(made.base, [], tmp_path / "out")


def test_everything_else_of_the_base_comes_along(any_method: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    base = tmp_path / "base"
    made = make(any_method)
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", "modeling_own.py"):
        (base / name).write_text(name)
    (base / "README.md").write_text("---\nlicense: apache-2.0\nlanguage:\n- no\n- en\n---\nThe base.\n")
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling/config.json").write_text("{}")
    (base / "pytorch_model.bin").write_text("weights from before")
    (base / "onnx").mkdir()
    (base / "modules.json").write_text('[{"path": ""}, {"path": "2_Dense"}]')
    for folder in (
        "2_Dense",
        "quantized",
        "checkpoints/checkpoint-5",
    ):  # the first is a layer that comes after the base
        (base / folder).mkdir(parents=True)
        for name in ("model.safetensors", "config.json"):
            (base / folder / name).write_text(folder)
    (base / "quantized/round").symlink_to(base)
    (base / "gone.txt").symlink_to(tmp_path / "nowhere")
    (base / "adapter_config.json").write_text(
        "{}"
    )  # an adapter of Hugging Face PEFT, which transformers would look for
    report = peft_export.merge(base, made.adapter, tmp_path / "out")
    (base / "adapter_config.json").unlink()
    out = tmp_path / "out"
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", "modeling_own.py", "generation_config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert (out / "1_Pooling/config.json").is_file()
    left_out = {
        "pytorch_model.bin",
        "onnx/",
        "checkpoints/",
        "quantized/model.safetensors",
        "quantized/round/",
        "gone.txt",
        "adapter_config.json",
    }
    assert set(report.left_out) == left_out
    assert (out / "2_Dense/model.safetensors").is_file() and (out / "quantized/config.json").is_file()
    assert not (out / "checkpoints").exists() and not (out / "quantized/model.safetensors").exists()
    assert not (out / "pytorch_model.bin").exists() and not (out / "onnx").exists()
    card = (out / "README.md").read_text()
    assert "license: apache-2.0" in card and "The base." not in card
    assert yaml.safe_load(card.split("---")[1])["language"] == ["no", "en"]  # Norwegian is no falsehood
    for path in (
        "tokenizer.json",
        "chat_template.jinja",
        "LICENSE",
        "modeling_own.py",
        "README.md",
        "pytorch_model.bin",
        "modules.json",
        "gone.txt",
    ):
        (base / path).unlink()
    for path in ("1_Pooling", "2_Dense", "quantized", "checkpoints", "onnx"):
        shutil.rmtree(base / path)


def test_a_quantized_base(quantizable: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    """An adapter trained on 4-bit layers, merged into the dequantized weights, as in memory."""
    made = make(quantizable, dtype=torch.bfloat16)
    made.handle.detach()
    model = made.model
    for site in made.handle.plan.sites:
        parent, _, child = site.path.rpartition(".")
        weight = model.get_parameter(f"{site.path}.weight").detach()
        layer = bnb.nn.Linear4bit(site.in_features, site.out_features, bias=False, compute_dtype=torch.bfloat16)
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
        setattr(model.get_submodule(parent), child, layer.to("cpu"))
    handle = pc.attach(model, quantizable.spec(made.family), name="four")
    for parameter in handle.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    handle.save(tmp_path / "four")
    dequantized = tmp_path / "dequantized"
    plain = load_file(made.base / "model.safetensors")
    for site in handle.plan.sites:
        weight = model.get_submodule(site.path).weight
        plain[f"{site.path}.weight"] = bnb.functional.dequantize_4bit(weight.data, weight.quant_state).contiguous()
    dequantized.mkdir()
    save_file(plain, dequantized / "model.safetensors")
    report = peft_export.merge(dequantized, tmp_path / "four", tmp_path / "out")
    assert any("4-bit (nf4)" in note and str(dequantized) in note for note in report.notes), report.notes
    handle.merge_and_detach()
    merged = load_file(tmp_path / "out/model.safetensors")
    for site in handle.plan.sites:
        assert same_bits(merged[f"{site.path}.weight"], model.get_parameter(f"{site.path}.weight").detach())


def test_no_model_of_transformers_is_imported(any_method: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    made = make(any_method)
    code = f"""
import sys, peft_export
peft_export.merge({str(made.base)!r}, {str(made.adapter)!r}, {str(tmp_path / "out")!r})
print([name for name in sys.modules if name.startswith("transformers")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def _in_the_middle(what: str, made: Any, out: Path) -> subprocess.CompletedProcess[str]:
    """Merge in a process that does `what` once a third is written."""
    code = f"""
import os, resource, signal, sys
import peft_export

def progress(done, total):
    if done > total / 3:
        {what}

{"resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))" if "FSIZE" in what else ""}
try:
    peft_export.merge({str(made.base)!r}, {str(made.adapter)!r}, {str(out)!r}, progress=progress, max_shard_size="60KB")
except Exception as error:
    sys.exit(f"{{type(error).__name__}}: {{error}}")
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_killed_in_the_middle_leaves_no_output(any_method: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    made = make(any_method)
    home = tmp_path / "exports"
    done = _in_the_middle("os.kill(os.getpid(), signal.SIGKILL)", made, home / "out")
    assert done.returncode == -signal.SIGKILL
    assert not (home / "out").exists()
    # What the killed process left is swept away by the next one.
    assert len(list(home.iterdir())) == 1
    peft_export.merge(made.base, made.adapter, home / "out")
    assert [path.name for path in home.iterdir()] == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_failure_in_the_middle_leaves_things_as_they_were(
    overwrite: bool, any_method: Trial, make: Callable[..., Any], tmp_path: Path
) -> None:
    made = make(any_method)
    home = tmp_path / "exports"
    home.mkdir()
    if overwrite:
        peft_export.merge(made.base, made.adapter, home / "out")
    before = sorted(os.listdir(home)), sorted(os.listdir(home / "out")) if overwrite else None

    def progress(done: int, total: int) -> None:
        if done > total / 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        peft_export.merge(made.base, made.adapter, home / "out", overwrite=overwrite, progress=progress)
    assert (sorted(os.listdir(home)), sorted(os.listdir(home / "out")) if overwrite else None) == before


def test_terminated_in_the_middle(tmp_path: Path) -> None:
    """The commands remove what they had begun to write."""
    code = f"""
import os, signal
from peft_export import output, plugin

for shown in (plugin._progress("merging", True), plugin._status(True)):
    before = signal.getsignal(signal.SIGTERM)
    try:
        with shown, output.export_directory({str(tmp_path / "out")!r}, [], False) as temporary:
            (temporary / "half").write_text("")
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
    except SystemExit as end:
        print(end.code, signal.getsignal(signal.SIGTERM) == before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["143", "True"] * 2, done.stderr
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_half_way(any_method: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    made = make(any_method)
    home = tmp_path / "exports"
    done = _in_the_middle("FSIZE = None", made, home / "out")
    assert done.stderr.strip().startswith("CheckpointError: ") and "larger than the system allows" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(home.iterdir())


def test_progress_counts_every_byte(any_method: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    made = make(any_method)
    seen: list[tuple[int, int]] = []
    report = peft_export.merge(made.base, made.adapter, tmp_path / "out", progress=lambda *both: seen.append(both))
    assert seen == sorted(seen) and seen[-1] == (report.bytes, report.bytes)


def test_the_result_loads_without_a_word(
    method: Trial, make: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = make(method, "bert")
    expected = made.output()
    peft_export.merge(made.base, made.adapter, tmp_path / "out")
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(made.output(model.eval()), expected, atol=1e-5, rtol=1e-5)
