"""The card of an export: how to load it, and for which task hubs show it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml

import peft_export
from peft_core.testing.checks import Trial
from peft_core.testing.families import FAMILIES


def front(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((directory / "README.md").read_text().split("---")[1])
    return found


@pytest.mark.parametrize("family", ["llama", "bert", "t5", "whisper"])
def test_the_class_that_it_names_loads_it(
    family: str, any_method: Trial, make: Callable[..., Any], tmp_path: Path
) -> None:
    """ForConditionalGeneration is the end of many names, and no one class of transformers loads all of them."""
    made = make(any_method, family)
    peft_export.merge(made.base, made.adapter, tmp_path / "out")
    (load,) = (line for line in (tmp_path / "out/README.md").read_text().splitlines() if line.startswith("model ="))
    loaded = getattr(transformers, load.split()[2].partition(".")[0]).from_pretrained(tmp_path / "out")
    assert type(loaded) is type(made.family.build())


def test_another_head_has_another_task(any_method: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    base = tmp_path / "encoder"
    transformers.RobertaForMaskedLM(FAMILIES["roberta"].build().config).save_pretrained(base)
    (base / "README.md").write_text("---\nlicense: mit\npipeline_tag: fill-mask\n---\n")
    model = transformers.RobertaForSequenceClassification.from_pretrained(base)
    made = make(any_method, "roberta", model=model, base=base, train_modules=("classifier",))
    peft_export.merge(base, made.adapter, tmp_path / "out")
    assert front(tmp_path / "out")["pipeline_tag"] == "text-classification"
    assert front(tmp_path / "out")["license"] == "mit"


def test_a_task_that_the_base_states_is_kept(any_method: Trial, make: Callable[..., Any], tmp_path: Path) -> None:
    made = make(any_method)
    (made.base / "README.md").write_text("---\npipeline_tag: translation\n---\n")
    peft_export.merge(made.base, made.adapter, tmp_path / "out")
    assert front(tmp_path / "out")["pipeline_tag"] == "translation"
    (made.base / "README.md").unlink()
    peft_export.merge(made.base, made.adapter, tmp_path / "again")
    assert front(tmp_path / "again")["pipeline_tag"] == "text-generation"
