"""`peft-core train`: mistakes in the configuration and in the data, each named in one line."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_core as pc
from peft_core import reporting
from peft_core.training.config import RunConfig, differences
from peft_core.training.examples import prepare_causal, prepare_labelled
from peft_core.training.rows import Row, classes_of, format_of, hold_out, read_rows
from tests.train.runs import CHAT, CHATS, LABELLED, PAIRS, run_file, started, write

pytestmark = pytest.mark.usefixtures("quiet")


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
        ({"training": {"lr": float("inf")}}, ["'training.lr'", "finite"]),
        ({"training": {"steps": None, "epochs": float("inf")}}, ["'training.epochs'", "finite"]),
        ({"training": {"seed": 2**32}}, ["'training.seed'", "4294967296"]),
        ({"output_dir": "~no-such-user/out"}, ["'output_dir'", "no user", "~no-such-user"]),
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


@pytest.mark.parametrize("rows", [PAIRS, LABELLED], ids=["language model", "classifier"])
@pytest.mark.parametrize("lost", ["a layer", "another size"])
def test_a_base_that_lacks_weights_is_no_base(
    lost: str, rows: Any, llama_directory: Path, tmp_path: Path, refused: Any
) -> None:
    """transformers draws at random what the files do not hold, which is right for a new head alone."""
    base = tmp_path / "base"
    shutil.copytree(llama_directory, base)
    config = json.loads((base / "config.json").read_text())
    changed = {"num_hidden_layers": 3} if lost == "a layer" else {"vocab_size": 77}
    (base / "config.json").write_text(json.dumps(config | changed))
    write(tmp_path / "data.jsonl", rows)
    name = "model.layers.2.input_layernorm.weight" if lost == "a layer" else "model.embed_tokens.weight"
    with refused(
        pc.ModelError, str(base), f"do not hold '{name}'" if rows is LABELLED or lost == "a layer" else "lm_head"
    ):
        started(run_file(tmp_path, base))
    assert not (tmp_path / "out" / "adapter.json").exists()


def test_a_causal_model_without_its_head_is_no_base(bert_directory: Path, tmp_path: Path, refused: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(bert_directory, is_decoder=True)
    model.bert.save_pretrained(tmp_path / "trunk")
    AutoTokenizer.from_pretrained(bert_directory).save_pretrained(tmp_path / "trunk")
    write(tmp_path / "data.jsonl", PAIRS)
    with refused(pc.ModelError, "do not hold 'cls.predictions", "BertLMHeadModel", "random"):
        started(run_file(tmp_path, tmp_path / "trunk"))


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


def test_a_configuration_of_the_wrong_types_is_one_line(llama_directory: Path, tmp_path: Path, refused: Any) -> None:
    base = tmp_path / "base"
    shutil.copytree(llama_directory, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"hidden_size": "64"}))
    for rows in (PAIRS, LABELLED):
        write(tmp_path / "data.jsonl", rows)
        with refused(pc.ModelError, str(base), "'hidden_size' expected int, got str"):
            started(run_file(tmp_path, base))
    with refused(pc.ModelError, str(base), "'hidden_size' expected int, got str"):
        pc.plan(base, pc.AdapterSpec(method="sound"))


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
    for row in ({"prompt": "a", " completion": "b"}, {"text": "a", " label": "b"}, {"text": "a", "Label": "b"}):
        column = list(row)[1]  # rows of texts alone would do, and the labels be left out without a word
        with refused(pc.DataError, "data.csv, line 2", f"column '{column}'", f"call it '{column.strip().lower()}'"):
            format_of([Row(row, "data.csv, line 2")])
        assert format_of([Row(row, "data.csv, line 2")], "text") == "text"
    assert format_of([Row({"text": "a", "label": "b", "Label": "B"}, "data.csv, line 2")]) == "label"
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
    for source in (tmp_path / "corpus", tmp_path / "corpus" / "train.parquet"):
        found = [row.values for row in read_rows(str(source))]
        assert found == [{"text": "a", "label": "good"}, {"text": "b", "label": "bad"}, {"text": "c", "label": None}]


@pytest.mark.parametrize(
    "labels",
    [["10", "9", "1.5"], ["nan", "2", "1"], ["1.0", "1", "01"], ["inf", "-3", "2"]],
    ids=lambda labels: labels[0],
)
def test_the_order_of_classes_is_not_that_of_the_rows(labels: list[str]) -> None:
    rows = [Row({"text": "a", "label": label}, "") for label in labels]
    assert classes_of(rows) == classes_of(rows[::-1]) == classes_of([rows[1], rows[0], rows[2]])
    if labels[0] == "10":
        assert classes_of(rows) == ["1.5", "9", "10"]


@pytest.mark.parametrize(
    "features",
    [
        "no json",
        "[]",
        '{"info": {"features": {"label": 1}}}',
        '{"info": {"features": {"label": {"_type": "ClassLabel", "names": ["only"]}}}}',
        '{"info": {"features": {"absent": {"_type": "ClassLabel", "names": ["only"]}}}}',
    ],
)
def test_what_a_parquet_file_says_of_its_columns_may_be_anything(features: str, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist([{"text": "a", "label": 7}])
    table = table.replace_schema_metadata({b"huggingface": features.encode()})
    pyarrow.parquet.write_table(table, tmp_path / "data.parquet")
    assert [row.values for row in read_rows(str(tmp_path / "data.parquet"))] == [{"text": "a", "label": 7}]


def test_a_long_csv_field(tmp_path: Path) -> None:
    """Python's csv reads no more than 128 kB, unless it is told; what others have told it stays."""
    before = csv.field_size_limit()
    long = "word " * 60_000
    assert read_rows(str(write(tmp_path / "data.csv", [{"text": long}, {"text": "w1"}])))[0].values["text"] == long
    assert csv.field_size_limit() == before


def test_a_model_named_like_mathematics(llama_directory: Path, tmp_path: Path) -> None:
    """It stands in the title of the curve of losses, where dollars are mathematics, and in that of a table."""
    base = tmp_path / "a$b_$[/c]"
    shutil.copytree(llama_directory, base)
    write(tmp_path / "data.jsonl", PAIRS)
    report = started(run_file(tmp_path, base))
    console = Console(file=io.StringIO(), width=300)
    console.print(report)
    assert "a$b_$[/c]" in console.file.getvalue()  # type: ignore[attr-defined]
    assert (tmp_path / "out" / "loss.png").is_file()


def test_a_run_that_diverges_says_so(llama_directory: Path, tmp_path: Path, refused: Any) -> None:
    write(tmp_path / "data.jsonl", PAIRS)
    each = {"lr": 1e30, "optimizer": "sgd", "warmup": 0, "max_grad_norm": 0, "steps": 6}
    with refused(reporting.TrainingError, "lower training.lr"):
        started(run_file(tmp_path, llama_directory, training=each))
