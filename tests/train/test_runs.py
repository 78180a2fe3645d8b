"""`peft-core train`: data in every form, what a run learns and leaves behind."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainingArguments,
)

import peft_core as pc
from peft_core.testing.families import FAMILIES
from peft_core.training.config import RunConfig
from peft_core.training.examples import prepare_causal
from peft_core.training.losses import evaluate
from peft_core.training.rows import hold_out, read_rows
from tests.train.runs import CHATS, LABELLED, PAIRS, TEXTS, run_file, started, words, write

pytestmark = pytest.mark.usefixtures("quiet")


# A cell of a CSV file holds no list, so no messages.
@pytest.mark.parametrize(
    ("kind", "suffix"),
    [
        *itertools.product(["text", "prompt", "label"], [".jsonl", ".csv", ".parquet"]),
        ("messages", ".jsonl"),
        ("messages", ".parquet"),
    ],
)
def test_every_format_from_every_file(
    kind: str, suffix: str, chat_directory: Path, bert_directory: Path, program: Callable[..., Any], tmp_path: Path
) -> None:
    rows = {"text": TEXTS, "prompt": PAIRS, "messages": CHATS, "label": LABELLED}[kind]
    write(tmp_path / f"data{suffix}", rows)
    model = bert_directory if kind == "label" else chat_directory
    ran = program("train", run_file(tmp_path, model, f"data{suffix}", training={"steps": 2}))
    assert ran.status == 0, ran.err
    for word in (
        f"22 to train, 2 held out ({kind})",
        "trainable parameters",
        "training loss",
        "held-out loss",
        "2 of AdamW",
    ):
        assert word in ran.out
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        "README.md",
        "adapter.json",
        "adapter.safetensors",
        "checkpoints",
        "data.json",
        "loss.png",
        "metrics.json",
        "run.yaml",
    }
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["format"] == kind and metrics["steps"] == 2 and len(metrics["losses"]) == 2
    assert [entry["step"] for entry in metrics["evaluations"]] == [0, 2]
    assert metrics["result"] == metrics["evaluations"][-1]
    assert "sound adapter" in (out / "README.md").read_text()


def test_json_is_all_that_a_program_reads(llama_directory: Path, program: Callable[..., Any], tmp_path: Path) -> None:
    write(tmp_path / "data.jsonl", PAIRS)
    ran = program("train", run_file(tmp_path, llama_directory), "--json")
    assert ran.status == 0
    report = json.loads(ran.out)
    assert report == json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert "training" in ran.err  # the progress bar


def test_a_run_learns_and_its_adapter_is_loaded(llama_directory: Path, tmp_path: Path) -> None:
    pairs = [{**row, "completion": " " + words(30, 31)} for row in PAIRS]  # which rows never seen have, too
    write(tmp_path / "data.jsonl", pairs)
    report = started(run_file(tmp_path, llama_directory, training={"steps": 60, "lr": 0.02, "batch_size": 8}))
    assert report.result is not None
    assert report.result["loss"] < 0.5 * report.evaluations[0]["loss"]
    config = RunConfig.from_file(tmp_path / "RUN.yaml")
    assert RunConfig.from_file(tmp_path / "out" / "run.yaml") == config
    model = AutoModelForCausalLM.from_pretrained(llama_directory)
    pc.load(model, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(llama_directory)
    rows = read_rows(str(tmp_path / "data.jsonl"))
    _, held = hold_out(rows, 0.1, 0)
    again = evaluate(model, prepare_causal(held, "prompt", tokenizer, 512).tokens, 0)
    assert again == pytest.approx(report.result["loss"], rel=1e-4)


def test_a_run_of_one_step_trains(llama_directory: Path, tmp_path: Path) -> None:
    write(tmp_path / "data.jsonl", PAIRS[:6])
    report = started(run_file(tmp_path, llama_directory, training={"steps": None, "batch_size": 8}))
    assert report.steps == 1 and report.result is not None
    assert report.result["loss"] < report.evaluations[0]["loss"]


def test_a_classifier_trains_its_new_head(bert_directory: Path, tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", LABELLED)
    write(tmp_path / "test.csv", LABELLED[:7])
    path = run_file(
        tmp_path,
        bert_directory,
        {"train": "train.jsonl", "evaluation": "test.csv"},
        training={"steps": 60, "lr": 0.01, "batch_size": 8, "evaluate_every": 20, "save_every": 20, "best": True},
    )
    report = started(path)
    assert report.labels == ["no", "yes"] and report.trained_modules == ["classifier"]
    assert report.training_examples == 24 and report.held_out_examples == 7
    assert report.result is not None and report.result["accuracy"] == 1.0
    assert report.result["loss"] == min(entry["loss"] for entry in report.evaluations)
    model = AutoModelForSequenceClassification.from_pretrained(bert_directory, num_labels=2)  # another random head
    pc.load(model, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(bert_directory)
    for row in LABELLED[:4]:
        logits = model.eval()(**tokenizer(row["text"], return_tensors="pt")).logits
        assert report.labels[logits.argmax()] == row["label"]


def test_the_best_checkpoint_is_what_is_saved(llama_directory: Path, tmp_path: Path) -> None:
    """Trained on one thing and evaluated on another, a model gets worse."""
    write(tmp_path / "data.jsonl", PAIRS)
    write(tmp_path / "other.jsonl", [{"prompt": words(1), "completion": words(45, 46, 47)}] * 4)
    each = {"steps": 8, "lr": 0.05, "evaluate_every": 2, "save_every": 2, "best": True, "keep": 1}
    data = {"train": "data.jsonl", "evaluation": "other.jsonl"}
    report = started(run_file(tmp_path, llama_directory, data, training=each))
    assert report.result is not None
    assert report.result["loss"] == min(entry["loss"] for entry in report.evaluations[1:])
    assert report.result["step"] < 8
    best = tmp_path / "out" / "checkpoints" / f"checkpoint-{report.result['step']:.0f}" / "adapter.safetensors"
    assert (tmp_path / "out" / "adapter.safetensors").read_bytes() == best.read_bytes()


def test_without_held_out_data(llama_directory: Path, tmp_path: Path) -> None:
    write(tmp_path / "data.jsonl", PAIRS[:5])
    report = started(run_file(tmp_path, llama_directory, {"train": "data.jsonl", "hold_out": 0}))
    assert (report.training_examples, report.evaluations, report.result) == (5, [], None)


def test_what_is_cut_is_counted(llama_directory: Path, tmp_path: Path, program: Callable[..., Any]) -> None:
    long = {"text": words(*range(30))}
    write(tmp_path / "data.jsonl", [*TEXTS, long, long, {"text": "w1"}])
    ran = program("train", run_file(tmp_path, llama_directory, {"train": "data.jsonl", "max_length": 9}))
    assert ran.status == 0 and "2, and 0 left out" in ran.out


def test_accumulating_gives_the_same_step(llama_directory: Path, bert_directory: Path, tmp_path: Path) -> None:
    """However many tokens each part has: every token (or every text) of a step weighs the same."""
    pairs = [{"prompt": words(n), "completion": words(*range(1 + 3 * n))} for n in range(4)]
    for rows, model in ((pairs, llama_directory), (LABELLED[:4], bert_directory)):
        saved = []
        for size, accumulate in ((4, 1), (1, 4)):
            folder = tmp_path / f"{model.name}-{size}"
            write(folder / "data.jsonl", rows)
            once = {
                "steps": 1,
                "batch_size": size,
                "accumulate": accumulate,
                "optimizer": "sgd",
                "max_grad_norm": 0,
                "warmup": 0,
            }
            started(run_file(folder, model, {"train": "data.jsonl", "hold_out": 0}, training=once))
            base = FAMILIES["llama" if rows is pairs else "bert"].build()
            if rows is pairs:
                saved.append(dict(pc.load(base, folder / "out").named_parameters()))
            else:
                classifier = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
                saved.append(dict(pc.load(classifier, folder / "out").named_parameters()))
        for key, value in saved[0].items():
            torch.testing.assert_close(value, saved[1][key], rtol=1e-4, atol=1e-6)


def test_the_methods_own_optimizer(
    stepper: Any, llama_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It was the default of older torch, by whose name nobody had asked for it.
    monkeypatch.setattr(TrainingArguments.__dataclass_fields__["optim"], "default", "adamw_torch")
    write(tmp_path / "data.jsonl", PAIRS)
    assert started(run_file(tmp_path, llama_directory, method="stepper")).optimizer == "StepperAdamW"
    path = run_file(tmp_path, llama_directory, method="stepper", training={"optimizer": "adamw"}, output_dir="other")
    assert started(path).optimizer == "AdamW"
    assert stepper.steps[-1].total_steps == 3


def test_a_run_in_bfloat16_with_everything_on(llama_directory: Path, tmp_path: Path) -> None:
    write(tmp_path / "data.jsonl", PAIRS)
    fields = {
        "autocast": True,
        "checkpoint_activations": True,
        "accumulate": 2,
        "schedule": "cosine",
        "weight_decay": 0.1,
    }
    model = {"path": str(llama_directory), "dtype": "bfloat16", "device": "cpu"}
    report = started(run_file(tmp_path, llama_directory, model=model, training=fields))
    assert report.dtype == "bfloat16" and all(loss == loss for loss in report.losses)


# The examples


def example(name: str, tmp_path: Path, **training: Any) -> Path:
    """A copy of an example whose run is short."""
    source = Path(__file__).parents[2] / "examples" / name
    for file in source.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config = yaml.safe_load((source / "RUN.yaml").read_text())
    config["training"] = {**config["training"], **training}
    (tmp_path / "RUN.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "RUN.yaml"


def test_the_classifier_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = started(example("classifier", tmp_path))
    readme = (tmp_path / "README.md").read_text()
    code = readme.partition("```python\n")[2].partition("```")[0]
    exec(code.replace("examples/classifier/out", str(tmp_path / "out")), {})
    assert capsys.readouterr().out.splitlines()[-1] == "delivery"
    assert report.trained_modules == ["classifier"] and report.result is not None
    assert report.result["accuracy"] >= 0.9 > report.evaluations[0]["accuracy"]


def test_the_chat_example(tmp_path: Path) -> None:
    path = example("chat", tmp_path, epochs=None, steps=3, batch_size=2)
    report = started(path)
    assert report.format == "messages" and report.result is not None
    assert report.result["loss"] < report.evaluations[0]["loss"]
