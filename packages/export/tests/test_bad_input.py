"""Whatever is wrong with the input is said in one line, and nothing is written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import peft_export
from peft_core import MergeError
from peft_core.testing.checks import Trial

MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"


def header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the header of a safetensors file; the bytes of the tensors stay."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    found = json.loads(raw[8 : 8 + length])
    change(found)
    text = json.dumps(found).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def index(path: Path, change: Callable[[dict[str, str]], None]) -> None:
    found = json.loads((path / INDEX).read_text())
    change(found["weight_map"])
    (path / INDEX).write_text(json.dumps(found))


def shard(path: Path, number: int = 0) -> Path:
    return sorted(path.glob("model-*.safetensors"))[number]


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def first(found: dict[str, Any]) -> str:
    return next(key for key in found if key != "__metadata__")


def last(found: dict[str, Any]) -> str:
    return max((key for key in found if key != "__metadata__"), key=lambda key: found[key]["data_offsets"][1])


def elsewhere(weight_map: dict[str, str]) -> None:
    key = next(iter(weight_map))
    weight_map[key] = next(file for file in weight_map.values() if file != weight_map[key])


def spoil(tensors: dict[str, torch.Tensor]) -> None:
    next(tensor for tensor in tensors.values() if tensor.is_floating_point()).view(-1)[0] = float("nan")


def grow(found: dict[str, Any]) -> None:
    begin, end = found[last(found)]["data_offsets"]
    found[last(found)] |= {"shape": [2 * (end - begin) // 4], "data_offsets": [begin, begin + 2 * (end - begin)]}


def no_weights(path: Path) -> None:
    for file in path.glob("*.safetensors"):
        file.unlink()


BASES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "nothing there": ("5GB", shutil.rmtree, "no base model"),
    "a file": (
        "5GB",
        lambda path: (shutil.rmtree(path), path.write_text("")),
        "no base model|is a file, not a checkpoint",
    ),
    "no configuration and no weights": (
        "5GB",
        lambda path: (no_weights(path), (path / "config.json").unlink()),
        "is not a safetensors checkpoint: it has neither",
    ),
    "no weights": ("5GB", no_weights, "is not a safetensors checkpoint: it has neither model.safetensors nor"),
    "pickled": (
        "5GB",
        lambda path: (path / MODEL).rename(path / "pytorch_model.bin"),
        "it has pytorch_model.bin, which must be saved as safetensors",
    ),
    "no tensors": ("5GB", lambda path: save_file({}, path / MODEL), "has no tensors; restore it"),
    "empty file": ("5GB", lambda path: cut(path / MODEL, 0), "is empty"),
    "text": (
        "5GB",
        lambda path: (path / MODEL).write_text("not tensors at all, but text"),
        "is not a safetensors file",
    ),
    "git lfs": (
        "5GB",
        lambda path: (path / MODEL).write_text("version https://git-lfs.github.com/spec/v1\n"),
        "Git LFS pointer.*git lfs pull",
    ),
    "cut in the header": ("5GB", lambda path: cut(path / MODEL, 100), "is cut short within its header"),
    "cut in the tensors": (
        "5GB",
        lambda path: cut(path / MODEL, 100_000),
        r"is cut short: its header claims \d+ bytes, the file has 100000",
    ),
    "claims more": ("5GB", lambda path: header(path / MODEL, grow), "is cut short: its header claims"),
    "claims less": (
        "5GB",
        lambda path: header(path / MODEL, lambda h: h.pop(last(h))),
        "bytes that its header does not know of",
    ),
    "wrong shape": (
        "5GB",
        lambda path: header(path / MODEL, lambda h: h[first(h)].update(shape=[1, 2])),
        "the header is wrong: .* claims the bytes",
    ),
    "overlapping": (
        "5GB",
        lambda path: header(path / MODEL, lambda h: h.update({"again": dict(h[first(h)])})),
        "does not begin where the tensor before it ends",
    ),
    "negative": (
        "5GB",
        lambda path: header(path / MODEL, lambda h: h[first(h)].update(data_offsets=[-8, 8])),
        "the header is wrong",
    ),
    "header of nonsense": (
        "5GB",
        lambda path: header(path / MODEL, lambda h: h.update(extra=[1])),
        "its header cannot be read",
    ),
    "configuration of nonsense": (
        "5GB",
        lambda path: (path / "config.json").write_text("{"),
        "config.json' cannot be read",
    ),
    "missing shard": ("40KB", lambda path: shard(path, 1).unlink(), "is missing; the index says that it holds '"),
    "index of nonsense": (
        "40KB",
        lambda path: (path / INDEX).write_text("[]"),
        "it is not an index of a sharded checkpoint",
    ),
    "index names another shard": (
        "40KB",
        lambda path: index(path, elsewhere),
        "is wrong: '.*' is in '.*', the index says in '",
    ),
    "index names too much": (
        "40KB",
        lambda path: index(path, lambda m: m.update({"more.weight": shard(path).name})),
        "does not hold 'more.weight'",
    ),
    "index names too little": (
        "40KB",
        lambda path: index(path, lambda m: m.pop(next(iter(m)))),
        "the index says nowhere",
    ),
    "index leads elsewhere": (
        "40KB",
        lambda path: index(path, lambda m: m.update({next(iter(m)): "../secret.safetensors"})),
        "which is not a file name",
    ),
}


@pytest.mark.parametrize("case", BASES)
def test_base(
    case: str, any_method: Trial, make: Callable[..., Any], fails: Callable[..., str], tmp_path: Path
) -> None:
    shards, damage, message = BASES[case]
    made = make(any_method, shards=shards)
    base = tmp_path / "damaged"
    shutil.copytree(made.base, base)
    damage(base)
    line = fails("merge", "--base", base, "--adapter", made.adapter, "--out", tmp_path / "exports/out")
    assert_says(line, message)
    assert not (tmp_path / "exports").exists()


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    found = json.loads((path / "adapter.json").read_text())
    change(found)
    (path / "adapter.json").write_text(json.dumps(found))


def resave(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change tensors, and everything in the header that speaks of them."""
    found = load_file(path / "adapter.safetensors")
    change(found)
    save_file(found, path / "adapter.safetensors")
    stored = {key: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")} for key, t in found.items()}
    edit(path, lambda header: (header["checksums"].clear(), header.update(tensors=stored)))


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


ADAPTERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nothing there": (shutil.rmtree, "does not exist"),
    "empty directory": (
        lambda path: (shutil.rmtree(path), path.mkdir()),
        "is not an adapter directory: it has no adapter.json",
    ),
    "of another library": (
        lambda path: (shutil.rmtree(path), path.mkdir(), (path / "adapter_config.json").write_text("{}")),
        "is an adapter of Hugging Face PEFT",
    ),
    "header cut": (lambda path: cut(path / "adapter.json", 50), "is damaged"),
    "newer": (lambda path: edit(path, lambda h: h.update(format_version=99)), "format version 99.*upgrade peft-core"),
    "method not installed": (
        lambda path: edit(path, lambda h: h["method"].update(name="unheard-of")),
        "method 'unheard-of' is not installed.*pip install",
    ),
    "no tensors": (lambda path: (path / "adapter.safetensors").unlink(), "adapter.safetensors' is missing"),
    "truncated": (lambda path: cut(path / "adapter.safetensors", 2000), "is cut short"),
    "a bit flipped": (lambda path: flip(path / "adapter.safetensors"), "SHA-256 differs"),
    "not finite": (lambda path: resave(path, spoil), "holds NaN or infinite values"),
    "a tensor too many": (
        lambda path: resave(path, lambda t: t.update({"model.layers.9.up_proj.X": torch.zeros(2)})),
        "'model.layers.9.up_proj.X' would not be used",
    ),
    "a tensor too few": (
        lambda path: resave(path, lambda t: t.pop(next(iter(t)))),
        "the tensor '.*' of '.*' is missing",
    ),
    "a site without tensors": (
        lambda path: edit(path, lambda h: h["sites"].append({**h["sites"][0], "path": "model.layers.7.q_proj"})),
        "no tensor belongs to the layer 'model.layers.7.q_proj'",
    ),
    "a shape differs": (
        lambda path: edit(path, lambda h: next(iter(h["tensors"].values())).update(shape=[3, 3])),
        r"has shape .*, expected \[3, 3\]",
    ),
}


@pytest.mark.parametrize("command", [("merge",), ("export", "lora")], ids=["merge", "lora"])
@pytest.mark.parametrize("case", ADAPTERS)
def test_adapter(
    case: str,
    command: tuple[str, ...],
    any_method: Trial,
    make: Callable[..., Any],
    fails: Callable[..., str],
    tmp_path: Path,
) -> None:
    damage, message = ADAPTERS[case]
    made = make(any_method)
    adapter = tmp_path / "damaged"
    shutil.copytree(made.adapter, adapter)
    damage(adapter)
    line = fails(*command, "--base", made.base, "--adapter", adapter, "--out", tmp_path / "exports/out")
    assert_says(line, message)
    assert not (tmp_path / "exports/out").exists()


def test_output(
    any_method: Trial, make: Callable[..., Any], fails: Callable[..., str], program: Any, tmp_path: Path
) -> None:
    made = make(any_method)

    def refused(out: Path, *more: str) -> str:
        return fails("merge", "--base", made.base, "--adapter", made.adapter, "--out", out, *more)

    out = tmp_path / "out"
    assert_says(refused(made.base), "lies inside the input")
    assert_says(refused(made.base / "deep/er"), "lies inside the input")
    assert_says(refused(made.adapter / "out"), "lies inside the input")
    assert_says(refused(tmp_path), "the input '.*' lies inside the output")
    link = tmp_path / "link"
    link.symlink_to(made.base)
    assert_says(refused(link / "out"), "lies inside the input")
    link.unlink()
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    assert_says(refused(out), "exists; choose another directory, or replace it with --overwrite")
    assert_says(refused(out, "--overwrite"), "is not an export.*will not be replaced")
    assert (out / "thesis.txt").is_file()
    (out / "thesis.txt").unlink()
    (tmp_path / "file").write_text("")
    assert_says(refused(tmp_path / "file"), "is a file")
    arguments = ("merge", "--base", made.base, "--adapter", made.adapter, "--out", out)
    assert program(*arguments)[0] == 0, "an empty directory is no obstacle"
    (out / "stale.safetensors").write_text("")
    (out / "notes.txt").write_text("years of work")
    (out / "figures").mkdir()
    assert_says(refused(out), "exists")
    assert program(*arguments, "--overwrite", "--max-shard-size", "40KB", "--verify")[0] == 0
    assert not (out / "stale.safetensors").exists() and not (out / MODEL).exists(), "weights would be loaded as well"
    assert (out / "notes.txt").read_text() == "years of work" and (out / "figures").is_dir()
    assert program(*arguments, "--overwrite")[0] == 0
    assert (out / MODEL).is_file() and not list(out.glob("model-*")) and not (out / INDEX).exists()
    assert not (out / "verification").exists(), "that was of the export before"
    assert (out / "notes.txt").is_file()


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_appears_meanwhile(
    overwrite: bool, any_method: Trial, make: Callable[..., Any], tmp_path: Path
) -> None:
    """Of two merges into one directory, and before somebody's own files, the later one must not win unasked."""
    made, out = make(any_method), tmp_path / "out"

    def appears(done: int, total: int) -> None:
        out.mkdir(exist_ok=True)
        (out / "thesis.txt").write_text("years of work")

    with pytest.raises(MergeError, match="is not an export" if overwrite else "exists"):
        peft_export.merge(made.base, made.adapter, out, progress=appears, overwrite=overwrite)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--dtype", "bfloat61"], r"no dtype 'bfloat61' \(did you mean 'bfloat16'\?\)"),
        (["--dtype", "int8"], "no dtype 'int8'"),
        (["--max-shard-size", "5 apples"], "'5 apples' is not a size"),
        (["--max-shard-size", "0"], "'0' is not a size"),
        (["--adapter", "A=heavy"], "'heavy' is not a weight"),
        (["--adapter", "A=inf"], "the weight must be finite"),
    ],
)
def test_options(
    more: list[str],
    message: str,
    any_method: Trial,
    make: Callable[..., Any],
    fails: Callable[..., str],
    tmp_path: Path,
) -> None:
    made = make(any_method)
    line = fails("merge", "--base", made.base, "--adapter", made.adapter, "--out", tmp_path / "out", *more)
    assert_says(line, message)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_base_that_is_not_finite(
    value: float, quantizable: Trial, make: Callable[..., Any], fails: Callable[..., str], tmp_path: Path
) -> None:
    made = make(quantizable)
    broken = tmp_path / "broken"
    shutil.copytree(made.base, broken)
    stored = load_file(broken / MODEL)
    stored["model.layers.1.mlp.up_proj.weight"][3, 3] = value
    save_file(stored, broken / MODEL, {"format": "pt"})
    line = fails("merge", "--base", broken, "--adapter", made.adapter, "--out", tmp_path / "out")
    assert_says(line, "'model.layers.1.mlp.up_proj': the merged weight has NaN or infinite values")
    assert not (tmp_path / "out").exists()


def test_a_base_without_a_configuration(
    any_method: Trial, make: Callable[..., Any], program: Any, tmp_path: Path
) -> None:
    """Its tensors can be merged; that nothing loads the result is said."""
    made = make(any_method)
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(made.base / MODEL, bare / MODEL)
    code, text, _ = program("merge", "--base", bare, "--adapter", made.adapter, "--out", tmp_path / "out")
    assert code == 0 and "has no config.json" in " ".join(text.replace("│", " ").split())


def as_float8(key: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return {key: weight.to(torch.float8_e4m3fn), f"{key}_scale": torch.ones(1)}


def as_bitsandbytes(key: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    packed = torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8)
    return {key: packed, f"{key}.absmax": torch.ones(8), f"{key}.quant_map": torch.ones(16)}


def as_gptq(key: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    layer = key.removesuffix(".weight")
    packed = torch.zeros(weight.shape[1] // 8, weight.shape[0], dtype=torch.int32)
    return {f"{layer}.qweight": packed, f"{layer}.scales": torch.ones(1, len(weight), dtype=torch.float16)}


@pytest.mark.parametrize(("pack", "code"), [(as_float8, "F8_E4M3"), (as_bitsandbytes, "U8"), (as_gptq, "I32")])
def test_a_quantized_checkpoint(
    pack: Callable[[str, torch.Tensor], dict[str, torch.Tensor]],
    code: str,
    any_method: Trial,
    make: Callable[..., Any],
    fails: Callable[..., str],
    tmp_path: Path,
) -> None:
    """Nothing can be merged into it; but exact factors are exact whatever the base's weights are."""
    made = make(any_method)
    packed = tmp_path / "packed"
    shutil.copytree(made.base, packed)
    stored = load_file(packed / MODEL)
    parts = (pack(key, tensor) if "proj" in key else {key: tensor} for key, tensor in stored.items())
    save_file({key: tensor for part in parts for key, tensor in part.items()}, packed / MODEL, {"format": "pt"})
    arguments = ("--base", packed, "--adapter", made.adapter, "--out", tmp_path / "out")
    for command in (("merge",), ("export", "onnx")):
        line = fails(*command, *arguments)
        assert_says(line, f"is quantized .{code}.; merge into the original-precision checkpoint, or a dequantized one")
    if not any_method.can.lowrank:
        return
    peft_export.export_lora(packed, made.adapter, tmp_path / "lora")
    peft_export.export_lora(made.base, made.adapter, tmp_path / "expected")
    found, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("lora", "expected"))
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    # That it is another base is still seen, where something is not packed.
    stored["model.norm.weight"] = torch.ones(47)
    parts = (pack(key, tensor) if "proj" in key else {key: tensor} for key, tensor in stored.items())
    save_file({key: tensor for part in parts for key, tensor in part.items()}, packed / MODEL, {"format": "pt"})
    assert_says(fails("export", "lora", *arguments), "'model.norm.weight' is .47. here and .48. there")


def test_an_svd_on_a_quantized_checkpoint(
    inexact: Trial, make: Callable[..., Any], fails: Callable[..., str], tmp_path: Path
) -> None:
    made = make(inexact)
    packed = tmp_path / "packed"
    shutil.copytree(made.base, packed)
    parts = (as_float8(key, t) if "proj" in key else {key: t} for key, t in load_file(packed / MODEL).items())
    save_file({key: tensor for part in parts for key, tensor in part.items()}, packed / MODEL, {"format": "pt"})
    arguments = ("--base", packed, "--adapter", made.adapter, "--out", tmp_path / "out")
    line = fails("export", "lora", *arguments, "--svd-rank", "2")
    assert_says(line, "an SVD compares with the base's weights: give the original-precision checkpoint")


def assert_says(line: str, message: str) -> None:
    __tracebackhide__ = True

    assert re.search(message, line), f"{line!r} does not say {message!r}"
