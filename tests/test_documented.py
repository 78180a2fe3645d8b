"""Every hook, command and option is documented, and every hook is exercised by an installed method or a test."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer

import peft_core as pc
from peft_core import hookspecs
from peft_core.cli import program
from peft_core.training.config import RunConfig

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
HOOKS = [name for name in vars(hookspecs) if name.startswith("peft_")]
SECTIONS = {
    "model": "ModelSection",
    "data": "DataSection",
    "adapter": "AdapterSpec",
    "training": "TrainingSection",
    "pretrain": "PretrainSection",
}
KINDS = {"string": "text", "integer": "whole number", "boolean": "true or false", "object": "mapping", "array": "list"}
METHOD_PACKAGES = sorted((ROOT / "packages").glob("method-*"))


def commands(group: typer.main.TyperGroup, prefix: str = "") -> list[str]:
    found = []
    for name, command in group.commands.items():
        nested = getattr(command, "commands", None)
        found += commands(command, f"{prefix}{name} ") if nested else [f"{prefix}{name}"]
    return found


COMMANDS = commands(typer.main.get_command(program()))


def test_there_is_something_to_document() -> None:
    assert len(HOOKS) == 8 and len(COMMANDS) >= 7 and METHOD_PACKAGES


@pytest.mark.parametrize("hook", HOOKS)
def test_hook_says_when_it_fires(hook: str) -> None:
    first = (inspect.getdoc(getattr(hookspecs, hook)) or "").partition("\n")[0]
    assert first.startswith(("At ", "Around ", "On ")), f"{hook}: {first!r}"


@pytest.mark.parametrize("hook", HOOKS)
def test_hook_is_implemented_somewhere(hook: str) -> None:
    sources = [*(ROOT / "packages").glob("*/src/**/*.py"), *(ROOT / "tests").glob("*.py")]
    assert any(f"def {hook}(" in path.read_text(encoding="utf-8") for path in sources if path.name != "hookspecs.py")


@pytest.mark.parametrize("command", COMMANDS)
def test_command_stands_in_the_readme(command: str) -> None:
    assert f"peft-core {command}" in README


@pytest.mark.parametrize("package", METHOD_PACKAGES, ids=lambda path: path.name)
def test_method_stands_in_the_readme_and_explains_its_options(package: Path) -> None:
    name = package.name.removeprefix("method-")
    text = (package / "README.md").read_text(encoding="utf-8")
    assert f"`{name}`" in README
    assert "arXiv" in text
    missing = [option for option in pc.methods()[name].options.model_fields if f"`{option}" not in text]
    assert not missing, f"{package.name}/README.md does not explain {', '.join(missing)}"


def test_every_name_that_the_documents_use_exists() -> None:
    documents = [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("packages/*/README.md"),
        *ROOT.glob("examples/*/README.md"),
    ]
    used = {name for path in documents for name in re.findall(r"\bpc\.([A-Za-z]\w*)", path.read_text(encoding="utf-8"))}
    assert len(used) > 10
    assert not [name for name in sorted(used) if not hasattr(pc, name)]


def test_every_key_of_a_run_is_documented_as_it_is_described() -> None:
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    schema = RunConfig.model_json_schema()
    sections = {name: schema["$defs"][held] for name, held in SECTIONS.items()}
    assert schema["properties"].keys() == {*sections, "output_dir"}
    rows = [
        f"| `{name}.{key}` | {_kind(field)} | {_default(field, key in section.get('required', ()))} | {field['description']} |"
        for name, section in sections.items()
        for key, field in section["properties"].items()
    ]
    rows.append(f"| `output_dir` | path | required | {schema['properties']['output_dir']['description']} |")
    assert re.findall(r"^\| `.*", page.partition("## Keys")[2].partition("\n## What")[0], re.MULTILINE) == rows


def _kind(schema: dict[str, Any]) -> str:
    """`whole number ≥ 1 or null`."""
    if "anyOf" in schema:
        return " or ".join(map(_kind, schema["anyOf"]))
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    limits = {"minimum": "≥", "exclusiveMinimum": ">", "exclusiveMaximum": "<"}
    given = [f"{sign} {schema[name]:.10g}" for name, sign in limits.items() if name in schema]
    return " ".join([KINDS.get(schema["type"], schema["type"]), *given])


def _default(schema: dict[str, Any], required: bool) -> str:
    return "required" if required else f"`{json.dumps(schema.get('default', {}))}`"


def test_every_capability_is_explained_to_authors() -> None:
    text = (ROOT / "docs" / "writing-a-method.md").read_text(encoding="utf-8")
    assert not [field.name for field in dataclasses.fields(pc.Capabilities) if f"`{field.name}=" not in text]
    assert not [hook for hook in HOOKS if hook != "peft_cli" and f"`{hook}`" not in text]


@pytest.mark.parametrize("package", METHOD_PACKAGES, ids=lambda path: path.name)
def test_methods_import_what_authors_may_import(package: Path) -> None:
    """But for a module that reads another library's files, which does what core's own loading does."""
    guide = (ROOT / "docs" / "writing-a-method.md").read_text(encoding="utf-8")
    table = guide.partition("## What a package may import")[2].partition("\n## ")[0]
    allowed = set(re.findall(r"`peft_core\.(\w+)`", table))
    for path in package.glob("src/**/*.py"):
        if path.name != "exchange.py":
            used = set(re.findall(r"from peft_core\.(\w+)", path.read_text(encoding="utf-8")))
            assert used <= allowed, f"{path}: {used - allowed}"
