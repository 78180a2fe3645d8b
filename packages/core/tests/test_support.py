"""`pytest --support`: the README's tables of what is supported come from a run of the conformance suite."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft_core as pc
from peft_core_pytest import BEGIN, END, Support


def report(method: str, model: str, passed: bool, when: str = "call") -> Any:
    shown = {"method": method, "model": model, "topic": "Merging.", "can": {"factors": method == "a" or not passed}}
    return SimpleNamespace(user_properties=[("peft-core", shown)], when=when, passed=passed, failed=not passed)


def test_one_failure_spoils_a_cell(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    support = Support(path)
    for one in (
        report("a", "Llama", True),
        report("a", "Llama", False),
        report("a", "Llama", True),
        report("a", "T5", True),
        report("b", "Llama", True, when="setup"),
        report("b", "Llama", True),
        report("b", "", False, when="setup"),
    ):
        support.pytest_runtest_logreport(one)
    support.pytest_sessionfinish()
    text = path.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{BEGIN}\n") and text.endswith(f"{END}\nafter\n") and "old" not in text
    assert "| Llama | ✗ | ✓ |\n| T5 | ✓ | – |" in text and "| Merging. | ✗ | ✗ |" in text
    assert "| what a method declares | a | b |\n|---|---|---|\n| factors | ✓ | some options |" in text


def test_a_run_of_the_suite_writes_the_tables(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    method = next(name for name, info in sorted(pc.methods().items()) if info.distribution)  # not one of these tests
    suite = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--pyargs",
        "peft_core.testing.test_planning",
    ]
    command = [*suite, "--method", method, "--support", str(path)]
    refused = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert refused.returncode and "needs the lines" in refused.stderr and "Traceback" not in refused.stderr
    path.write_text(f"{BEGIN}\n{END}\n", encoding="utf-8")
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    text = path.read_text(encoding="utf-8")
    assert f"| model | {method} |" in text and "| LlamaForCausalLM | ✓ |" in text and "A plan is pure data" in text


def test_the_readme_has_every_method() -> None:
    text = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    header = text.partition(BEGIN)[2].partition("\n\n")[2].partition("\n")[0]
    shown = {cell.strip() for cell in header.strip("|").split("|")} - {"what a method declares"}
    packages = {path.name.removeprefix("method-") for path in (Path(__file__).parents[2]).glob("method-*")}
    assert packages <= shown
