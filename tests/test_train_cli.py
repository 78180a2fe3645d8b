"""`peft-core train`: configurations, data in every form, what a run leaves behind, and resuming it."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
import yaml
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertTokenizerFast,
    TrainingArguments,
)

import peft_core as pc
from peft_core import models, reporting
from peft_core.errors import ModelError
from peft_core.testing.families import FAMILIES
from peft_core.trainer import AdapterTrainer
from peft_core.training.batches import CausalCollator, LengthGroupedSampler, PackedCollator
from peft_core.training.checks import BatchConvention, batch_convention, check_packing
from peft_core.training.config import RunConfig, RunError, differences
from peft_core.training.directory import writing
from peft_core.training.examples import IGNORED, Tokens, pack, prepare_causal, prepare_labelled
from peft_core.training.losses import evaluate
from peft_core.training.report import TrainReport
from peft_core.training.rows import Row, classes_of, format_of, hold_out, read_rows
from peft_core.training.run import train

pytestmark = pytest.mark.usefixtures("quiet")
CHAT = (
    "<s>{% for message in messages %}[{{ message.role }}] {{ message.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture(scope="session")
def chat_directory(llama_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with a chat template."""
    directory = tmp_path_factory.mktemp("chat")
    AutoModelForCausalLM.from_pretrained(llama_directory).save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(llama_directory)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def bert_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT encoder, without a head, and its tokenizer."""
    directory = tmp_path_factory.mktemp("bert")
    model: Any = FAMILIES["bert"].build()
    model.bert.save_pretrained(directory)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(55))]
    (directory / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(directory / "vocab.txt"), model_max_length=32).save_pretrained(directory)
    return directory


def words(*numbers: int) -> str:
    return " ".join(f"w{number % 50}" for number in numbers)


PAIRS = [{"prompt": words(n, n + 1), "completion": " " + words(20 + n % 3, 30)} for n in range(24)]
TEXTS = [{"text": words(*range(n, n + 3 + n % 4))} for n in range(24)]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": words(n)},
            {"role": "assistant", "content": words(n, n + 1)},
            {"role": "user", "content": words(n + 2)},
            {"role": "assistant", "content": words(n + 3)},
        ]
    }
    for n in range(24)
]
LABELLED = [{"text": words(*range(n, n + 4), 40 + n % 2), "label": ["no", "yes"][n % 2]} for n in range(24)]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join(f'"{value}"' for value in row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def run_file(folder: Path, base: Path, data: Any = "data.jsonl", method: str = "sound", **changed: Any) -> Path:
    """A RUN.yaml beside its data; keyword arguments `training_…`, `adapter` and others change it."""
    config: dict[str, Any] = {
        "model": str(base),
        "data": data,
        "adapter": {"method": method},
        "training": {"steps": 3, "batch_size": 4, "lr": 0.01},
        "output_dir": "out",
    }
    config["training"].update(changed.pop("training", {}))
    config.update(changed)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "RUN.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def started(path: Path, resume: bool = False) -> TrainReport:
    return train(RunConfig.from_file(path), resume)


# A run


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
    write(tmp_path / "data.jsonl", PAIRS)
    report = started(run_file(tmp_path, llama_directory, training={"steps": 60, "lr": 0.05, "batch_size": 8}))
    assert report.result is not None
    assert report.result["loss"] < 0.5 * report.evaluations[0]["loss"]
    config = RunConfig.from_file(tmp_path / "RUN.yaml")
    assert RunConfig.from_data(yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())) == config
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


# How models read batches


def _decoder(kind: str, **changed: Any) -> Any:
    """A tiny random model that takes positions, padding, labels or lengths in its own way."""
    common = {"vocab_size": 60, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2, "max_position_embeddings": 34}
    more = {
        "roberta": {"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 1, "num_attention_heads": 2}
        | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        "rwkv": {"hidden_size": 24, "num_hidden_layers": 2, "context_length": 34},
        "bart": {
            "d_model": 24,
            "decoder_layers": 1,
            "decoder_attention_heads": 2,
            "decoder_ffn_dim": 36,
            "dropout": 0.0,
        },
        "xlnet": {"d_model": 24, "n_layer": 1, "n_head": 2, "d_inner": 36},
    }[kind]
    if kind in ("rwkv", "xlnet"):
        del common["max_position_embeddings"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **common, **{"is_decoder": True, **more, **changed})
        model = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, 0.0, 0.2)
    return model


def _reference(model: Any, examples: Sequence[Tokens]) -> float:
    """Loss of a token that should be learnt, each example read alone and as the model itself does."""
    total, count = 0.0, 0
    with torch.no_grad():
        for tokens in examples:
            logits = model(input_ids=torch.tensor([tokens.input_ids])).logits[0, :-1]
            labels = torch.tensor(tokens.labels[1:])
            total += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            count += int((labels != IGNORED).sum())
    return total / count


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("llama", BatchConvention(pads_left=True, shifts_labels=True)),
        ("gpt2", BatchConvention(pads_left=True, shifts_labels=True)),
        ("mamba", BatchConvention(pads_left=True, shifts_labels=True)),
        (
            "roberta",
            BatchConvention(pads_left=False, shifts_labels=True),
        ),  # its positions start after the padding's index
        (
            "rwkv",
            BatchConvention(pads_left=False, shifts_labels=True),
        ),  # what comes first enters its state, padding as well
        (
            "bart",
            BatchConvention(pads_left=False, shifts_labels=False),
        ),  # takes no positions; its loss is that of the same token
    ],
)
def test_a_batch_is_read_as_its_examples_alone(
    kind: str, expected: BatchConvention, tmp_path: Path, llama_directory: Path
) -> None:
    model: Any = FAMILIES[kind].build() if expected.pads_left else _decoder(kind)
    tokenizer = AutoTokenizer.from_pretrained(llama_directory)
    rows = [Row(row, "here") for row in TEXTS]
    examples = prepare_causal(rows, "text", tokenizer, 32).tokens
    assert batch_convention(model, examples, tokenizer.pad_token_id) == expected
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    write(tmp_path / "data.jsonl", TEXTS)
    data = {"train": "data.jsonl", "evaluation": "data.jsonl"}
    report = started(run_file(tmp_path, tmp_path / "base", data, training={"steps": 1, "batch_size": 24}))
    alone = _reference(model, examples)
    assert report.losses == [pytest.approx(alone, rel=1e-4)]
    assert report.evaluations[0]["loss"] == pytest.approx(alone, rel=1e-5)


def test_labels_can_be_viewed_as_one_row() -> None:
    """As the losses of many models do; where no logits are needed, there are none."""
    examples = [Tokens([3, 4, 5, 6], [IGNORED, IGNORED, IGNORED, 6]), Tokens([7, 8, 9], [IGNORED, IGNORED, 9])]
    batch = CausalCollator(FAMILIES["llama"].build(), 0)(examples)
    assert batch["logits_to_keep"] == 2
    assert batch["labels"].view(-1).tolist() == [IGNORED, 6, IGNORED, 9]


def test_a_model_that_sees_what_it_should_predict_is_refused(refused: Any) -> None:
    examples = [Tokens(list(range(5, 15)), [IGNORED, *range(6, 15)])]
    with refused(RunError, "RobertaForCausalLM", "those that follow", "is_decoder"):
        batch_convention(_decoder("roberta", is_decoder=False), examples, 0)
    with refused(RunError, "XLNetLMHeadModel", "those that follow"):
        batch_convention(_decoder("xlnet"), examples, 0)


def test_the_shortest_examples_tell_as_much() -> None:
    """Two tokens: one to read, one to predict."""
    examples = [Tokens([7, 9], [IGNORED, 9])]
    assert batch_convention(FAMILIES["llama"].build(), examples, 0) == BatchConvention()
    assert batch_convention(_decoder("bart"), examples, 0) == BatchConvention(pads_left=False, shifts_labels=False)


def test_the_longest_text_of_a_model(llama_directory: Path, tmp_path: Path, refused: Any) -> None:
    assert models.most_tokens(_decoder("xlnet")) is None  # it says -1
    assert models.most_tokens(FAMILIES["gpt2"].build()) == 32
    model = _decoder("roberta")
    assert models.most_tokens(model) == 32
    model(input_ids=torch.full((1, 32), 7))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, 33), 7))
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(llama_directory).save_pretrained(tmp_path / "base")
    write(tmp_path / "data.jsonl", [{"text": words(*range(60))}] * 4)
    started(run_file(tmp_path, tmp_path / "base", training={"steps": 1}))
    with refused(RunError, "data.max_length: 33", "32 tokens"):
        started(run_file(tmp_path, tmp_path / "base", {"train": "data.jsonl", "max_length": 33}, output_dir="other"))


def test_a_classifier_of_any_length(llama_directory: Path, tmp_path: Path) -> None:
    _decoder("xlnet").save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(llama_directory).save_pretrained(tmp_path / "base")
    write(tmp_path / "data.jsonl", LABELLED)
    assert started(run_file(tmp_path, tmp_path / "base", training={"steps": 1})).steps == 1


def test_a_classifier_reads_a_text_alike_in_every_batch(llama_directory: Path, tmp_path: Path) -> None:
    """Though its configuration names another padding token than its tokenizer pads with."""
    model: Any = FAMILIES["llama"].build()
    model.config.pad_token_id = 5
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(llama_directory).save_pretrained(tmp_path / "base")
    rows = [{"text": words(*range(n, n + 1 + n % 5)), "label": "ab"[n % 2]} for n in range(20)]

    def before(size: int) -> float:
        write(tmp_path / str(size) / "data.jsonl", rows)
        data = {"train": "data.jsonl", "hold_out": 0.5}
        path = run_file(tmp_path / str(size), tmp_path / "base", data, training={"steps": 1, "batch_size": size})
        return started(path).evaluations[0]["loss"]

    assert before(8) == pytest.approx(before(1), rel=1e-5)


def test_a_text_that_an_encoder_decoder_would_not_read_once(
    tmp_path: Path, llama_directory: Path, refused: Any
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama_directory)
    row = Row({"text": "w1 </s> w2 </s>", "label": "a"}, "data.jsonl, line 7")
    with refused(pc.DataError, "data.jsonl, line 7", "gives 2 of them"):
        prepare_labelled([row], ["a", "b"], tokenizer, 20, end=tokenizer.eos_token_id)
    model: Any = FAMILIES["t5"].build()
    model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    write(tmp_path / "data.jsonl", LABELLED)
    with refused(pc.DataError, "data.jsonl, line", "gives 0 of them"):  # this tokenizer adds none
        started(run_file(tmp_path, tmp_path / "base"))


@pytest.mark.parametrize("rows", [PAIRS, LABELLED], ids=["pairs", "labels"])
def test_a_tokenizer_without_special_tokens(
    rows: list[dict[str, Any]], llama_directory: Path, tmp_path: Path, refused: Any
) -> None:
    from transformers import PreTrainedTokenizerFast

    shutil.copytree(llama_directory, tmp_path / "base")
    bare = PreTrainedTokenizerFast(tokenizer_object=AutoTokenizer.from_pretrained(llama_directory).backend_tokenizer)
    bare.save_pretrained(tmp_path / "base")
    write(tmp_path / "data.jsonl", rows)
    with refused(ModelError, "neither a padding token nor an end of sequence", "pad_token"):
        started(run_file(tmp_path, tmp_path / "base"))
    with refused(pc.DataError, "a prompt is empty"):
        models.prompt_ids("", bare)


# Packing


def test_packed_examples_do_not_see_each_other(llama_directory: Path) -> None:
    model: Any = FAMILIES["llama"].build()
    tokenizer = AutoTokenizer.from_pretrained(llama_directory)
    rows = [Row(row, "here") for row in [*PAIRS[:4], *TEXTS[:4]]]
    examples = [
        tokens
        for row, kind in zip(rows, ["prompt"] * 4 + ["text"] * 4, strict=True)
        for tokens in prepare_causal([row], kind, tokenizer, 20).tokens
    ]
    packed = pack(examples, 20)
    assert len(packed) < len(examples) and all(sum(len(t.input_ids) for t in row) <= 20 for row in packed)
    assert sorted(map(repr, (t for row in packed for t in row))) == sorted(map(repr, examples))
    batch = PackedCollator(0)(packed)
    model.config.use_cache = False
    alone = evaluate(model, examples, 0)
    assert model(**batch).loss.item() == pytest.approx(alone, rel=1e-5)


def test_a_packed_run(llama_directory: Path, tmp_path: Path, program: Callable[..., Any]) -> None:
    write(tmp_path / "data.jsonl", PAIRS)
    data = {"train": "data.jsonl", "packing": True, "max_length": 16}
    ran = program("train", run_file(tmp_path, llama_directory, data), "--json")
    assert ran.status == 0, ran.err
    report = json.loads(ran.out)
    assert report["packed_rows"] == 8 and report["training_examples"] == 22


class Leaky(nn.Module):
    """Takes positions, and pays no attention to them."""

    dtype = torch.float32

    def forward(self, input_ids: Any, position_ids: Any) -> Any:
        return type("Out", (), {"logits": nn.functional.one_hot(input_ids, 60).float().cumsum(1)})


def test_an_architecture_that_mixes_packed_examples_is_refused(refused: Any) -> None:
    tokens = [Tokens([3, 4, 5], [IGNORED, 4, 5]), Tokens([6, 7], [IGNORED, 7])]
    with refused(RunError, "Leaky", "see each other", "data.packing"):
        check_packing(Leaky(), tokens)
    with refused(RunError, "MambaForCausalLM", "no position_ids", "data.packing"):
        check_packing(FAMILIES["mamba"].build(), tokens)
    fine: Any = FAMILIES["gpt2"].build()
    fine.config.use_cache = False
    check_packing(fine, tokens)


# Tokens


def test_loss_is_on_what_the_assistant_writes(chat_directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_directory)
    (tokens,) = prepare_causal([Row(CHATS[5], "here")], "messages", tokenizer, 512).tokens
    learned = tokenizer.decode([token for token in tokens.labels if token != IGNORED])
    assert learned == "w5 w6 </s> w8 </s>"
    assert [t for t, label in zip(tokens.input_ids, tokens.labels, strict=True) if label not in (IGNORED, t)] == []


def test_lengths_of_conversations(chat_directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_directory)
    rows = [
        Row(row, f"row {n}")
        for n, row in enumerate(
            [
                *CHATS[:3],
                {"messages": [{"role": "user", "content": words(*range(40))}, {"role": "assistant", "content": "w1"}]},
            ]
        )
    ]
    prepared = prepare_causal(rows, "messages", tokenizer, 14)
    assert (len(prepared.tokens), prepared.truncated, prepared.dropped) == (3, 3, 1)
    assert all(len(tokens.input_ids) == 14 for tokens in prepared.tokens)
    with pytest.raises(pc.DataError, match="beyond the first 2 tokens; raise"):
        prepare_causal(rows[3:], "messages", tokenizer, 2)


def test_examples_of_like_length_come_together() -> None:
    lengths = [(7 * n) % 31 for n in range(103)]
    sampler = LengthGroupedSampler(lengths, 4, seed=1)
    first = list(sampler)
    assert sorted(first) == list(range(103)) and list(sampler) == first
    sampler.set_epoch(1)
    assert sorted(sampler) == list(range(103)) and list(sampler) != first
    spread = [max(part) - min(part) for at in range(0, 100, 4) if (part := [lengths[n] for n in first[at : at + 4]])]
    assert sum(spread) / len(spread) < 4


# Resuming


@pytest.mark.parametrize("method, options", [("sound", {}), ("stepper", {"owns": True})], ids=["sound", "stepper"])
def test_an_interrupted_run_is_resumed(
    method: str,
    options: dict[str, Any],
    stepper: Any,
    llama_directory: Path,
    program: Callable[..., Any],
    tmp_path: Path,
    interrupted: Any,
) -> None:
    def made(folder: Path) -> Path:
        write(folder / "data.jsonl", PAIRS)
        adapter = {"method": method, "options": options, **({"dropout": 0.1} if method == "sound" else {})}
        each = {"steps": 9, "save_every": 2, "evaluate_every": 3}
        return run_file(folder, llama_directory, adapter=adapter, training=each)

    whole = started(made(tmp_path / "whole"))
    broken = made(tmp_path / "broken")
    with interrupted(AdapterTrainer, 6):
        ran = program("train", broken)
    assert ran.status == 130
    assert ran.err == "peft-core: interrupted; what was saved is kept: continue with --resume\n"
    ran = program("train", broken)
    assert ran.status == 2 and "holds a run already" in ran.err
    torch.manual_seed(77)
    rest = started(broken, resume=True)
    assert rest.losses == whole.losses and rest.evaluations == whole.evaluations and rest.result == whole.result
    for name in ("adapter.safetensors", *(["state.safetensors"] if method == "stepper" else [])):
        files = [(tmp_path / run / "out" / name).read_bytes() for run in ("whole", "broken")]
        assert files[0] == files[1], f"{name} differs"


def test_an_epochs_evaluation_is_in_its_last_checkpoint(llama_directory: Path, tmp_path: Path) -> None:
    write(tmp_path / "data.jsonl", PAIRS[:10])
    each = {"steps": None, "epochs": 3, "batch_size": 2, "accumulate": 2, "save_every": 3, "keep": 3}
    data = {"train": "data.jsonl", "hold_out": 0.2}
    path = run_file(tmp_path, llama_directory, data, training=each)
    whole = started(path)
    assert [entry["step"] for entry in whole.evaluations] == [0, 2, 4, 6]
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "checkpoint-6")
    assert started(path, resume=True).evaluations == whole.evaluations
    each["save_every"] = 2  # a checkpoint at every epoch's end
    path = run_file(tmp_path, llama_directory, data, training=each, output_dir="ends")
    assert started(path).evaluations == whole.evaluations
    for last in (6, 4):
        shutil.rmtree(tmp_path / "ends" / "checkpoints" / f"checkpoint-{last}")
        assert started(path, resume=True).evaluations == whole.evaluations


def test_resuming_what_was_killed_while_it_saved(llama_directory: Path, tmp_path: Path) -> None:
    write(tmp_path / "data.jsonl", PAIRS)
    path = run_file(tmp_path, llama_directory, training={"steps": 4, "save_every": 2})
    whole = started(path)
    checkpoints = tmp_path / "out" / "checkpoints"
    (checkpoints / "checkpoint-4" / "trainer_state.json").write_text('{"global_step": 4')
    (checkpoints / "checkpoint-4" / "optimizer.pt").unlink()
    again = started(path, resume=True)
    assert again.losses == whole.losses


def test_a_run_is_resumed_from_another_directory(
    llama_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "project" / "data.jsonl", PAIRS)
    run_file(tmp_path / "project", llama_directory, training={"save_every": 1})
    monkeypatch.chdir(tmp_path)
    whole = started(Path("project/RUN.yaml"))
    assert RunConfig.from_file("project/out/run.yaml") == RunConfig.from_file("project/RUN.yaml")
    monkeypatch.chdir(tmp_path / "project")
    assert started(Path("RUN.yaml"), resume=True).losses == whole.losses


@pytest.mark.parametrize("changed", [{}, {"best": True}, {"save_every": 1}], ids=str)
def test_a_finished_run_is_not_trained_further(changed: dict[str, Any], llama_directory: Path, tmp_path: Path) -> None:
    """It may have been killed between its last checkpoint and saving."""
    write(tmp_path / "data.jsonl", PAIRS)
    path = run_file(tmp_path, llama_directory, training=changed)
    whole, saved = started(path), tmp_path / "out" / "adapter.safetensors"
    expected = saved.read_bytes()
    saved.unlink()
    again = started(path, resume=True)
    assert (again.losses, again.evaluations, again.result) == (whole.losses, whole.evaluations, whole.result)
    assert (again.steps, again.optimizer) == (3, whole.optimizer) and saved.read_bytes() == expected


def test_a_folder_of_the_users_own_among_the_checkpoints(llama_directory: Path, tmp_path: Path) -> None:
    write(tmp_path / "data.jsonl", PAIRS)
    path = run_file(tmp_path, llama_directory)
    whole = started(path)
    (tmp_path / "out" / "checkpoints" / "checkpoint-old").mkdir()
    assert started(path, resume=True).losses == whole.losses


def _process(rank: int, port: int, path: Path, resume: bool) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    from peft_core.testing.methods import register_sound

    register_sound()
    started(path, resume)
    torch.distributed.destroy_process_group()


def test_several_processes_resume_within_a_later_epoch(llama_directory: Path, tmp_path: Path, refused: Any) -> None:
    training = {"steps": 10, "batch_size": 2, "save_every": 5, "keep": 9}  # of four steps an epoch
    config = {"model": {"path": str(llama_directory), "device": "cpu"}, "data": {"train": "data.jsonl", "hold_out": 0}}
    write(tmp_path / "data.jsonl", TEXTS[:16])
    path = run_file(tmp_path, llama_directory, training=training, **config)

    def losses(resume: bool) -> Any:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        mp.spawn(_process, (port, path, resume), nprocs=2)
        return json.loads((tmp_path / "out" / "metrics.json").read_text())["losses"]

    whole = losses(resume=False)
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "checkpoint-10")
    with refused(RunError, "divided among 2 processes", "this is one of 1", "resume it with 2"):
        started(path, resume=True)
    assert losses(resume=True) == whole


def test_a_checkpoint_is_whole_after_the_last_process(
    llama_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each writes its random states; the trainer's state, by which a checkpoint is told to be whole, waits for them."""
    seen = []

    def wait(self: Any) -> None:
        for folder in (tmp_path / "out" / "checkpoints").glob("checkpoint-*"):
            seen.append([(folder / name).exists() for name in ("rng_state.pth", "trainer_state.json")])

    monkeypatch.setattr("accelerate.Accelerator.wait_for_everyone", wait)
    write(tmp_path / "data.jsonl", PAIRS)
    started(run_file(tmp_path, llama_directory, training={"steps": 1, "save_every": 1}))
    assert [True, False] in seen


def test_what_cannot_be_resumed(llama_directory: Path, tmp_path: Path, refused: Any) -> None:
    write(tmp_path / "data.jsonl", PAIRS)
    with refused(RunError, "nothing to resume", "without --resume"):
        started(run_file(tmp_path, llama_directory), resume=True)
    started(run_file(tmp_path, llama_directory))
    with refused(RunError, "training.lr was 0.01, now 0.5, training.seed was 0, now 1", "another output_dir"):
        started(run_file(tmp_path, llama_directory, training={"lr": 0.5, "seed": 1}), resume=True)
    with refused(RunError, "adapter.method was"):
        started(run_file(tmp_path, llama_directory, method="miss" if "miss" in pc.methods() else "sound"), resume=True)
    with refused(RunError, "holds a run already", "--resume", "output_dir"):
        started(run_file(tmp_path, llama_directory))
    for text, word in (("", "run.yaml"), ("model: {path: [", "not YAML"), ("model: 3", "model")):
        (tmp_path / "out" / "run.yaml").write_text(text)
        with refused(RunError, "run.yaml", word):
            started(run_file(tmp_path, llama_directory), resume=True)


@pytest.mark.parametrize(
    "edited, found",
    [
        (LABELLED[:20], "it had 24 rows, and has 20"),
        (
            [{**row, "label": row["label"].replace("yes", "aye")} for row in LABELLED],
            "its labels were no, yes, and are aye",
        ),
        (LABELLED[::-1], "24 rows as before, with other values"),
    ],
    ids=["rows deleted", "labels renamed", "rows moved"],
)
def test_a_run_goes_on_with_the_data_that_it_began_with(
    edited: list[dict[str, Any]], found: str, bert_directory: Path, tmp_path: Path, refused: Any
) -> None:
    """Other rows would be held out, and a label's name says which class it is."""
    for key in ("train", "evaluation"):
        write(tmp_path / f"{key}.csv", LABELLED)
    data = {"train": "train.csv", "evaluation": "evaluation.csv"}
    path = run_file(tmp_path, bert_directory, data)
    whole = started(path)
    for key in data:
        write(tmp_path / f"{key}.csv", edited)
        with refused(RunError, f"data.{key}", f"{key}.csv' has changed", found, "put it back", "another output_dir"):
            started(path, resume=True)
        write(tmp_path / f"{key}.csv", LABELLED)
    (tmp_path / "train.csv").write_text((tmp_path / "train.csv").read_text().replace("\n", "\r\n"))  # the same rows
    assert started(path, resume=True).losses == whole.losses
    (tmp_path / "out" / "data.json").write_text("{}")
    with refused(RunError, "data.json", "damaged"):
        started(path, resume=True)


def test_a_run_that_is_interrupted_before_it_begins(
    llama_directory: Path, tmp_path: Path, program: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("peft_core.training.run.read_rows", interrupted)
    ran = program("train", run_file(tmp_path, llama_directory))
    assert ran == (130, "", "peft-core: interrupted; nothing was trained yet: start again\n")


@pytest.mark.parametrize("what", ["torch.save", "matplotlib.figure.Figure.savefig"])
def test_a_run_that_finds_no_room_loses_nothing(
    what: str,
    llama_directory: Path,
    tmp_path: Path,
    program: Callable[..., Any],
    clear: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("whole", "broken"):
        write(tmp_path / name / "data.jsonl", PAIRS)
        run_file(tmp_path / name, llama_directory, training={"steps": 4, "save_every": 2})
    whole = started(tmp_path / "whole" / "RUN.yaml")
    save, asked = torch.save, []

    def full(value: Any, *place: Any, **more: Any) -> None:
        asked.append(place)
        if what != "torch.save":
            raise OSError(28, "No space left on device")
        if len(asked) > 3:  # in the second checkpoint
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 192 vs 84")
        save(value, *place, **more)

    monkeypatch.setattr(what, full)
    ran = program("train", tmp_path / "broken" / "RUN.yaml")
    assert ran.status == 2 and ran.err.count("\n") == 1
    clear(ran.err, f"'{tmp_path / 'broken' / 'out'}'", "is there room?", "what was saved is kept", "--resume")
    monkeypatch.undo()
    rest = started(tmp_path / "broken" / "RUN.yaml", resume=True)
    assert (rest.losses, rest.result) == (whole.losses, whole.result)


def test_a_checkpoint_that_waits_for_a_process_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Any
) -> None:
    config = RunConfig.from_file(run_file(tmp_path, tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refused(reporting.TrainingError, "do all processes still run?", "start again"), writing(config):
        raise RuntimeError("Connection closed by peer")
    with refused(reporting.TrainingError, "(is there room?)"), writing(config):
        raise OSError(28, "No space left on device")


def test_how_many_checkpoints_are_kept_may_change(
    llama_directory: Path, tmp_path: Path, program: Callable[..., Any]
) -> None:
    write(tmp_path / "data.jsonl", PAIRS)
    whole = started(run_file(tmp_path, llama_directory, training={"save_every": 1, "keep": 2}))
    ran = program("train", run_file(tmp_path, llama_directory, training={"save_every": 1, "keep": 9}), "--resume")
    assert ran.status == 0 and "continuing from step 3" in ran.out
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert report["losses"] == whole.losses
    last = json.loads((tmp_path / "out" / "checkpoints" / "checkpoint-3" / "trainer_state.json").read_text())
    assert report["seconds"] > last["log_history"][-1]["seconds"] > 0


# Mistakes in the configuration


@pytest.mark.parametrize(
    "change, found",
    [
        ({"modle": "x"}, ["'modle' is not a key", "did you mean 'model'?"]),
        ({"data": {"trian": "x"}}, ["'data.trian'", "did you mean 'train'?"]),
        ({"data": {"train": "data.jsonl", "format": "jsonl"}}, ["'data.format'", "'messages'"]),
        ({"training": {"learning_rate": 1}}, ["'training.learning_rate'", "the keys are"]),
        ({"training": {"epoch": 1}}, ["'training.epoch'", "did you mean 'epochs'?"]),
        ({"training": {"lr": "fast"}}, ["'training.lr'", "'fast'"]),
        ({"training": {"batch_size": 0}}, ["'training.batch_size'", "got 0"]),
        ({"training": {"epochs": 1}}, ["epochs and steps", "choose one"]),
        ({"training": {"best": True, "save_every": 2}}, ["save_every and evaluate_every"]),
        ({"adapter": {"method": "soundd"}}, ["'soundd'", "did you mean 'sound'?"]),
        ({"adapter": {"method": "sound", "options": {"rr": 1}}}, ["'rr'", "r, alpha"]),
        ({"adapter": {"method": "sound", "targets": ["q_prj"]}}, ["'q_prj'", "did you mean 'q_proj'?"]),
        ({"adapter": "nowhere.yaml"}, ["nowhere.yaml"]),
        ({"model": "smollm2-135"}, ["did you mean 'smollm2-135m'?"]),
        ({"model": "package:nothing_here/model"}, ["'nothing_here'"]),
        ({"model": 3}, ["'model'", "path, dtype, device"]),
        ({"model": {"path": "x", "dtype": "int8"}}, ["'model.dtype'", "'bfloat16'"]),
        ({"data": "nowhere.jsonl"}, ["no file", "nowhere.jsonl"]),
        ({"data": {"train": "data.jsonl", "max_length": 100000}}, ["data.max_length", "100000"]),
        ({"data": {"train": "data.jsonl", "hold_out": 0}, "training": {"best": True}}, ["training.best", "hold_out"]),
        ({"output_dir": "data.jsonl/out"}, ["output_dir", "data.jsonl"]),
        ({"output_dir": None}, ["'output_dir'"]),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_mistakes_in_the_configuration(
    change: dict[str, Any],
    found: list[str],
    llama_directory: Path,
    program: Callable[..., Any],
    clear: Any,
    tmp_path: Path,
) -> None:
    write(tmp_path / "data.jsonl", PAIRS)
    ran = program("train", run_file(tmp_path, llama_directory, **change))
    assert (ran.status, ran.out) == (2, ""), ran
    assert ran.err.splitlines()[-1].startswith("peft-core: ")
    clear(ran.err.splitlines()[-1], *found)
    assert not (tmp_path / "out" / "run.yaml").exists()


@pytest.mark.parametrize(
    "text, found",
    [
        ("model: [", "not YAML"),
        ("- 1", "got list"),
        (None, "RUN.yaml': No such file or directory"),
        ("", "got NoneType"),
    ],
)
def test_files_that_are_no_configuration(
    text: str | None, found: str, program: Callable[..., Any], clear: Any, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "RUN.yaml").write_text(text)
    ran = program("train", tmp_path / "RUN.yaml")
    assert ran.status == 2
    clear(ran.err, "RUN.yaml", found)
    assert ran.err.count("RUN.yaml") == 1


def test_damaged_weights_are_named(
    llama_directory: Path, bert_directory: Path, program: Callable[..., Any], clear: Any, tmp_path: Path
) -> None:
    for rows, model in ((PAIRS, llama_directory), (LABELLED, bert_directory)):
        base = tmp_path / model.name
        shutil.copytree(model, base)
        weights = base / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        write(tmp_path / "data.jsonl", rows)
        ran = program("train", run_file(tmp_path, base))
        assert (ran.status, ran.out) == (2, "")
        clear(ran.err, f"'{weights}' is truncated or damaged", "restore it")


def test_a_gpu_that_is_not_there_is_named(
    llama_directory: Path, tmp_path: Path, refused: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    write(tmp_path / "data.jsonl", PAIRS)
    with refused(pc.ModelError, "device cuda is not available here"):
        started(run_file(tmp_path, llama_directory, model={"path": str(llama_directory), "device": "cuda"}))
    assert not (tmp_path / "out").exists()


def test_paths_are_relative_to_the_file(llama_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(pc.AdapterSpec(method="sound").to_yaml())
    write(tmp_path / "data.jsonl", PAIRS)
    config = RunConfig.from_file(
        run_file(tmp_path, llama_directory, adapter="spec.yaml", data={"train": "data.jsonl", "evaluation": "./e.csv"})
    )
    assert config.adapter == pc.AdapterSpec(method="sound")
    assert config.data.train == str(tmp_path / "data.jsonl") and config.data.evaluation == str(tmp_path / "e.csv")
    assert config.output_dir == tmp_path / "out"
    assert RunConfig.from_data({**config.model_dump(mode="json"), "data": "some/dataset"}).data.train == "some/dataset"
    assert differences(config, config) == []


def test_every_key_is_described() -> None:
    def described(schema: dict[str, Any]) -> None:
        for section in schema["$defs"].values():
            for name, field in section.get("properties", {}).items():
                assert field.get("description"), name

    described(RunConfig.model_json_schema())


# Mistakes in the data


def test_a_bad_line_is_named(tmp_path: Path, refused: Any) -> None:
    def jsonl(*lines: str) -> str:
        path = tmp_path / "data.jsonl"
        path.write_bytes("\n".join(lines).encode())
        return str(path)

    good = json.dumps(PAIRS[0])
    with refused(pc.DataError, "data.jsonl, line 3 is not JSON"):
        read_rows(jsonl(good, "", "{'a': 1}"))
    with refused(pc.DataError, "data.jsonl, line 2: expected an object"):
        read_rows(jsonl(good, "[1]"))
    with refused(pc.DataError, "has no rows"):
        read_rows(jsonl("", ""))
    for encoded, place in ((good.encode() + b'\n{"text": "\xff"}', "line 2"), (good.encode("utf-16"), "line 1")):
        (tmp_path / "data.jsonl").write_bytes(encoded)
        with refused(pc.DataError, f"data.jsonl, {place} is not UTF-8; save the file as UTF-8"):
            read_rows(str(tmp_path / "data.jsonl"))

    def csv(text: str) -> str:
        (tmp_path / "data.csv").write_bytes(text.encode("latin-1"))
        return str(tmp_path / "data.csv")

    rows = read_rows(csv('text,label\n"two\nlines",a\n\nx,b\n'))
    assert [row.place.rpartition(", ")[2] for row in rows] == ["line 2", "line 5"]
    assert rows[0].values == {"text": "two\nlines", "label": "a"}
    with refused(pc.DataError, "data.csv, line 4: 3 values for 2 columns"):
        read_rows(csv('text,label\n"two\nlines",a\nx,y,z\n'))
    with refused(pc.DataError, "data.csv, line 3 is not CSV"):
        read_rows(csv('text,label\nx,a\n"open,b\n'))
    with refused(pc.DataError, "data.csv, line 2 is not UTF-8"):
        read_rows(csv("text,label\n\xff,a\n"))
    with refused(pc.DataError, "line 1: expected column names"):
        read_rows(csv("text,text\nx,a\n"))
    (tmp_path / "data.parquet").write_bytes(b"PAR1 nothing")
    with refused(pc.DataError, "data.parquet", "parquet"):
        read_rows(str(tmp_path / "data.parquet"))
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    with refused(pc.DataError, "saved", "save_to_disk", "to_parquet"):
        read_rows(str(tmp_path / "saved"))
    (tmp_path / "data.txt").write_text("text")
    with refused(pc.DataError, "data.txt", ".jsonl, .csv, .parquet"):
        read_rows(str(tmp_path / "data.txt"))


@pytest.mark.parametrize("inside", ["\u2028", "\x85", "\f"])
def test_only_a_line_end_ends_a_line(inside: str, tmp_path: Path) -> None:
    row = {"text": f"one{inside}row", "label": "a"}
    (tmp_path / "data.csv").write_text(f"text,label\n{row['text']},a\r\n", encoding="utf-8", newline="")
    (tmp_path / "data.jsonl").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8", newline="")
    for suffix in ("csv", "jsonl") if inside != "\f" else ("csv",):  # JSON wants control characters escaped
        assert [read.values for read in read_rows(str(tmp_path / f"data.{suffix}"))] == [row]


@pytest.mark.parametrize(
    "kind, values, found",
    [
        ("text", {"text": "  "}, "'text' is empty"),
        ("text", {"text": 3}, "'text' is 3, not text"),
        ("text", {}, "'text' is missing"),
        ("prompt", {"prompt": "a"}, "'completion' is missing"),
        ("prompt", {"completion": "a"}, "'prompt' is missing"),
        ("prompt", {"prompt": ["a"], "completion": "a"}, "'prompt' is ['a'], not text"),
        ("messages", {"messages": "hello"}, "must be a list of messages"),
        ("messages", {"messages": []}, "must be a list of messages"),
        ("messages", {"messages": [{"role": "user"}]}, "message 1 must have role and content"),
        ("messages", {"messages": [{"role": "user", "content": "w1"}]}, "no message is the assistant's"),
        ("label", {"text": "w1"}, "'label' is missing"),
        ("label", {"text": "w1", "label": 0.5}, "'label' is 0.5; expected text or a whole number"),
        (
            "label",
            {"text": "w1", "label": "maybe"},
            "the label 'maybe' does not occur in the training data, which has no, yes",
        ),
        ("label", {"text": "", "label": "no"}, "'text' is empty"),
        ("text", {"text": "w1 \ud800"}, "\\ud800 is not a character"),
        ("prompt", {"prompt": "\udfff", "completion": "w1"}, "\\udfff is not a character"),
        ("prompt", {"prompt": "w1", "completion": "\ud800"}, "\\ud800 is not a character"),
        ("messages", {"messages": [*CHATS[0]["messages"], {"role": "user", "content": "\ud800"}]}, "\\ud800 is not"),
        ("label", {"text": "w1", "label": "\ud800"}, "\\ud800 is not a character"),
    ],
)
def test_a_bad_row_is_named(kind: str, values: dict[str, Any], found: str, chat_directory: Path, refused: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_directory)
    rows = [Row(values, "data.jsonl, line 7")]
    with refused(pc.DataError, "data.jsonl, line 7: ", found):
        if kind == "label":
            prepare_labelled(rows, ["no", "yes"], tokenizer, 20)
        else:
            prepare_causal(rows, kind, tokenizer, 20)


def test_columns_and_templates_that_do_not_do(chat_directory: Path, llama_directory: Path, refused: Any) -> None:
    rows = [Row({"txt": "w1"}, "data.csv, line 2")]
    with refused(pc.DataError, "data.csv, line 2", "txt", "did you mean 'text'?"):
        format_of(rows)
    assert format_of(rows, "text") == "text"
    with refused(pc.DataError, "the columns label are not known; expected"):
        format_of([Row({"label": "a"}, "data.csv, line 2")])
    with refused(pc.DataError, "prompt, ' completion' are not known (did you mean 'completion'?)"):
        format_of([Row({"prompt": "a", " completion": "b"}, "data.csv, line 2")])
    unlabelled_first = [Row({"text": "w1", "label": label}, "x") for label in (None, "a")]
    assert format_of(unlabelled_first) == "label"
    with refused(pc.DataError, "chat template"):
        prepare_causal([Row(CHATS[0], "x")], "messages", AutoTokenizer.from_pretrained(llama_directory), 20)
    tokenizer = AutoTokenizer.from_pretrained(chat_directory)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with refused(pc.DataError, "line 4: the chat template refuses: roles must alternate"):
        prepare_causal([Row(CHATS[0], "line 4")], "messages", tokenizer, 20)
    tokenizer.chat_template = "{{ messages | length }} " + CHAT
    with refused(pc.DataError, "line 4: the chat template writes message 2 differently"):
        prepare_causal([Row(CHATS[0], "line 4")], "messages", tokenizer, 20)
    with refused(pc.DataError, "the label 'a'", "nothing to tell apart"):
        classes_of([Row({"label": "a"}, "x")] * 2)
    with refused(pc.DataError, "a single row cannot be divided"):
        hold_out([Row({}, "x")], 0.1, 0)
    assert classes_of([Row({"label": n}, "x") for n in (10, 9, 2)]) == ["2", "9", "10"]


def test_a_datasets_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Any) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write(tmp_path / "corpus" / "train.jsonl", PAIRS)
    rows = read_rows(str(tmp_path / "corpus"))
    assert [dict(row.values) for row in rows] == PAIRS
    assert rows[2].place == f"{tmp_path / 'corpus'} (train), row 3"
    with refused(pc.DataError, "nobody/nothing", "datasets cannot load it"):
        read_rows("nobody/nothing")


def test_a_class_of_datasets_keeps_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is stored as a number, -1 for none."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    rows = {"text": ["a", "b", "c"], "label": [1, 0, -1]}
    (tmp_path / "corpus").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "corpus" / "train.parquet")
    found = [row.values for row in read_rows(str(tmp_path / "corpus"))]
    assert found == [{"text": "a", "label": "good"}, {"text": "b", "label": "bad"}, {"text": "c", "label": None}]


def test_a_run_that_diverges_says_so(llama_directory: Path, tmp_path: Path, refused: Any) -> None:
    write(tmp_path / "data.jsonl", PAIRS)
    each = {"lr": 1e30, "optimizer": "sgd", "warmup": 0, "max_grad_norm": 0, "steps": 6}
    with refused(reporting.TrainingError, "lower training.lr"):
        started(run_file(tmp_path, llama_directory, training=each))


# The examples


def example(name: str, tmp_path: Path, **training: Any) -> Path:
    """A copy of an example whose run is short."""
    source = Path(__file__).parent.parent / "examples" / name
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
