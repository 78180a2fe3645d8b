"""The commands: what they print, and that the README names every one of their options."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer

import peft_core as pc
from peft_core.testing.checks import Trial
from peft_export import plugin

README = Path(__file__).parents[1] / "README.md"


def commands() -> Iterator[tuple[str, click.Command]]:
    app = typer.Typer()
    app.callback()(lambda: None)
    plugin.peft_cli(app)
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        inner = getattr(command, "commands", None)
        yield from ((f"{name} {child}", c) for child, c in inner.items()) if inner else [(name, command)]


def test_the_readme_names_every_command_and_option() -> None:
    text = README.read_text(encoding="utf-8")
    found = dict(commands())
    assert {"merge", "export lora", "verify"} <= found.keys()
    for name, command in found.items():
        assert f"peft-core {name}" in text
        for parameter in command.params:
            for option in parameter.opts:
                if option.startswith("--") and option != "--help":
                    assert f"`{option}" in text or f" {option}" in text, f"{name} {option} is not in the README"


def test_merge_prints_what_it_did(any_method: Trial, make: Callable[..., Any], program: Any, tmp_path: Path) -> None:
    made = make(any_method)
    arguments = ("merge", "--base", made.base, "--adapter", made.adapter, "--out")
    code, out, err = program(*arguments, tmp_path / "table")
    assert code == 0 and f"{len(made.handle.plan.sites)} merged" in out, err
    code, out, _ = program(*arguments, tmp_path / "json", "--json")
    report = json.loads(out)
    assert code == 0 and report["merged"] == len(made.handle.plan.sites)
    marker = json.loads((tmp_path / "json/export.json").read_text())
    assert marker["kind"] == "merged" and marker["specs"][0]["method"] == any_method.method


def test_lora_prints_the_flags(any_method: Trial, make: Callable[..., Any], program: Any, tmp_path: Path) -> None:
    made = make(any_method)
    arguments = ("export", "lora", "--base", made.base, "--adapter", made.adapter)
    code, out, err = program(*arguments, "--out", tmp_path / "vllm", "--fit", "vllm", "--json")
    report = json.loads(out)
    assert code == 0, err
    assert f"--enable-lora --max-lora-rank {report['rank']}" in report["command"] and report["rank"] >= 8
    code, out, _ = program(*arguments, "--out", tmp_path / "cpp", "--fit", "llama.cpp", "--verify")
    command = f"convert_lora_to_gguf.py --base {made.base} --outfile adapter.gguf {tmp_path / 'cpp'} && llama-server"
    assert code == 0 and command in out and "passed" in out, "a command is not wrapped"
    code, out, _ = program(*arguments, "--out", tmp_path / "low", "--svd-energy", "0.5", "--svd-rank", "2")
    assert code == 0 and "error" in out
    head = make(any_method, "bert", name="head")
    code, out, _ = program(
        "export", "lora", "--base", head.base, "--adapter", head.adapter, "--out", tmp_path / "h", "--fit", "vllm"
    )
    assert code == 1 and "cannot be served" in out and "classifier" in out


def test_weights_of_adapters(tmp_path: Path) -> None:
    assert plugin.parse_adapters(["a=0.7", "b", "c=-1"]) == {"a": 0.7, "b": 1.0, "c": -1.0}
    named = tmp_path / "rank=8"
    named.mkdir()
    assert plugin.parse_adapters([str(named)]) == {str(named): 1.0}
    assert plugin.parse_adapters([f"{named}=2"]) == {str(named): 2.0}
    for text in (["a", "a=2"], ["a=nan"], ["a="]):
        with pytest.raises(pc.MergeError):
            plugin.parse_adapters(text)


def test_the_plugin_is_light(any_method: Trial) -> None:
    """Listing methods must not cost the import of what only some commands need."""
    heavy = "('transformers', 'onnx', 'onnxruntime', 'triton', 'torch._dynamo')"
    code = f"import sys, peft_core as pc; pc.methods(); print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]" and any_method.method in pc.methods()
