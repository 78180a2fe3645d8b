"""`peft-core new-method` writes a method that works before anything of it is changed."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import peft_core as pc
from peft_core import plugins
from peft_core.scaffold import new_method
from peft_core.testing.families import FAMILIES


@pytest.fixture
def method(tmp_path: Path) -> Iterator[str]:
    source = new_method("fresh", tmp_path) / "src" / "peft_method_fresh" / "__init__.py"
    specification = importlib.util.spec_from_file_location("peft_method_fresh", source)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["peft_method_fresh"] = module
    specification.loader.exec_module(module)
    plugins.register(module, "fresh")
    yield "fresh"
    plugins.unregister("fresh")
    del sys.modules["peft_method_fresh"]


def test_the_package_asks_for_versions_that_keep_the_contract(tmp_path: Path) -> None:
    project = (new_method("other", tmp_path) / "pyproject.toml").read_text()
    assert 'dependencies = ["peft-core>=0.1,<0.2"]' in project and 'other = "peft_method_other"' in project


def test_what_its_tests_need_is_installed_with_it(tmp_path: Path, program: Callable[..., Any]) -> None:
    said = program("new-method", "other", "-d", tmp_path).out
    root = tmp_path / "peft-method-other"
    assert 'testing = ["peft-core[testing]>=0.1,<0.2"]' in (root / "pyproject.toml").read_text()
    assert 'pip install -e ".[testing]"' in (root / "README.md").read_text()
    assert f'pip install -e "{root}[testing]"' in said


def test_the_new_method_attaches_trains_and_merges(method: str) -> None:
    family = FAMILIES["llama"]
    model, inputs = family.build(), family.inputs()
    base = family.forward(model, inputs)
    adapter = pc.attach(model, pc.AdapterSpec(method=method, options={"r": 3}))
    assert torch.equal(family.forward(model, inputs), base)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.1)
    adapted = family.forward(model, inputs)
    adapted.square().mean().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    adapter.merge()
    torch.testing.assert_close(family.forward(model, inputs), adapted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["Mine", "1st", "a-b", "class", ""])
def test_a_name_that_python_cannot_import_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(pc.PluginError, match="cannot name a method"):
        new_method(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "peft-method-other").mkdir()
    with pytest.raises(pc.PluginError, match="exists already"):
        new_method("other", tmp_path)
