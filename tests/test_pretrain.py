"""`peft-core train` from random weights: what it starts from, what it learns, and that it can be loaded, merged and resumed."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer

import peft_core as pc
from peft_core.errors import DataError, ModelError
from peft_core.training import pretrain
from peft_core.training.config import RunConfig, RunError
from peft_core.training.examples import IGNORED, prepare_stream
from peft_core.training.losses import evaluate
from peft_core.training.report import TrainReport
from peft_core.training.rows import Row, hold_out, read_rows
from peft_core.training.run import train

pytestmark = pytest.mark.usefixtures("quiet")
EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "pretrain"
Run = Callable[..., Path]
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
IN_FULL = ["embed_tokens", "input_layernorm", "post_attention_layernorm", "norm", "lm_head"]
TEXTS = [f"def area_{n}(width, height):\n    return {n} * width * height\n" for n in range(40)]


@pytest.fixture
def run_file(tmp_path: Path) -> Run:
    """`run_file(name, key=value, ...)`: a RUN.yaml in a folder of this name, beside its data."""

    def make(name: str = "run", **changed: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
        config: dict[str, Any] = {
            "model": "llama",
            "pretrain": {"config": TINY, "vocab_size": 300},
            "data": {"train": "data.jsonl", "max_length": 16},
            "adapter": {"method": "sound", "train_modules": IN_FULL},
            "training": {"steps": 4, "batch_size": 4, "lr": 0.01},
            "output_dir": "out",
        }
        for key, value in changed.items():
            config[key] = {**config[key], **value} if key in ("data", "training") else value
        (folder / "RUN.yaml").write_text(yaml.safe_dump(config))
        return folder / "RUN.yaml"

    return make


def started(path: Path, resume: bool = False, from_scratch: bool = False) -> TrainReport:
    return train(RunConfig.from_file(path, from_scratch), resume)


def held_out_loss(model: Any, run: Path) -> float:
    tokenizer = AutoTokenizer.from_pretrained(run / "out" / "base")
    _, held = hold_out(read_rows(str(run / "data.jsonl")), 0.1, 0)
    return evaluate(model, prepare_stream(held, tokenizer, 16).tokens, 0)


@pytest.mark.parametrize("method", ["sound", "stepper"])
def test_what_was_learnt_is_loaded_and_merged_from_the_directory_alone(
    method: str, stepper: Any, run_file: Run
) -> None:
    options = {"owns": True} if method == "stepper" else {}
    adapter = {"method": method, "options": options, "train_modules": IN_FULL}
    run = run_file(adapter=adapter, training={"steps": 40, "lr": 0.02}).parent
    report = started(run / "RUN.yaml")
    assert report.result is not None and report.method == method
    assert report.result["loss"] < 0.6 * report.evaluations[0]["loss"]
    assert not any(path.is_relative_to(run / "out" / "base") for path in run.rglob("adapter*"))
    base = run / "out" / "base"
    assert held_out_loss(AutoModelForCausalLM.from_pretrained(base), run) == pytest.approx(
        report.evaluations[0]["loss"]
    )
    loaded = pc.load(AutoModelForCausalLM.from_pretrained(base), run / "out")
    assert held_out_loss(loaded.model, run) == pytest.approx(report.result["loss"], rel=1e-5)
    assert held_out_loss(loaded.merge_and_detach(), run) == pytest.approx(report.result["loss"], rel=1e-4)


def test_without_adapter_all_weights_are_trained_and_saved(run_file: Run) -> None:
    run = run_file(adapter=None, training={"steps": 40}).parent
    report = started(run / "RUN.yaml")
    assert report.result is not None
    assert report.trainable_parameters == report.base_parameters and report.method == "full rank"
    assert report.result["loss"] < 0.6 * report.evaluations[0]["loss"]
    start = AutoModelForCausalLM.from_pretrained(run / "out" / "base")
    model = AutoModelForCausalLM.from_pretrained(run / "out")
    assert model.config.use_cache is start.config.use_cache is True  # transformers' trainer sets it aside
    assert held_out_loss(model, run) == pytest.approx(report.result["loss"], rel=1e-5)
    assert AutoTokenizer.from_pretrained(run / "out").decode([40, 50]) != ""
    after = dict(model.named_parameters())
    assert all(not torch.equal(before, after[name]) for name, before in start.named_parameters())
    with pytest.raises(RunError, match="holds a run already"):
        started(run / "RUN.yaml")


def test_runs_of_one_seed_start_alike_whatever_they_train(run_file: Run, tmp_path: Path) -> None:
    adapters = {"adapted": {"method": "sound"}, "full": None, "other": None}
    for name, adapter in adapters.items():
        started(run_file(name, adapter=adapter, training={"steps": 1, "seed": int(name == "other")}))

    def files(name: str) -> list[bytes]:
        base = tmp_path / name / "out" / "base"
        return [(base / file).read_bytes() for file in ("model.safetensors", "tokenizer.json")]

    assert files("adapted") == files("full")
    assert files("other")[0] != files("full")[0]


@pytest.mark.parametrize("adapter", [{"method": "stepper", "train_modules": IN_FULL}, None], ids=["adapter", "full"])
def test_an_interrupted_run_is_resumed(adapter: Any, stepper: Any, run_file: Run, interrupted: Any) -> None:
    changed = {"adapter": adapter, "training": {"steps": 7, "save_every": 2, "evaluate_every": 3}}
    whole = started(run_file("whole", **changed))
    broken = run_file("broken", **changed)
    with interrupted(Trainer, 6), pytest.raises(KeyboardInterrupt):
        started(broken)
    rest = started(broken, resume=True)
    assert rest.losses == whole.losses and rest.result == whole.result
    name = "model.safetensors" if adapter is None else "adapter.safetensors"
    assert (broken.parent / "out" / name).read_bytes() == (broken.parent.parent / "whole" / "out" / name).read_bytes()


def test_the_flag_starts_any_run_from_random_weights(run_file: Run, llama_directory: Path) -> None:
    path = run_file(model=str(llama_directory), pretrain=None)
    report = started(path, from_scratch=True)
    assert report.evaluations[0]["loss"] == pytest.approx(
        torch.tensor(60.0).log().item(), abs=0.3
    )  # 60 words, all alike
    there = AutoConfig.from_pretrained(llama_directory).to_dict()
    made = AutoConfig.from_pretrained(path.parent / "out" / "base").to_dict()
    assert all(made[key] == there[key] for key in TINY)


def test_nothing_of_an_earlier_base_is_left_to_be_loaded(run_file: Run) -> None:
    path = run_file()
    base = path.parent / "out" / "base"
    base.mkdir(parents=True)
    for stale in ("chat_template.jinja", "model-00002-of-00002.safetensors", "vocab.txt", "notes.md"):
        (base / stale).write_text("of the run before")
    started(path)
    left = {entry.name for entry in base.iterdir()}
    assert not left & {"chat_template.jinja", "model-00002-of-00002.safetensors", "vocab.txt"} and "notes.md" in left
    assert AutoTokenizer.from_pretrained(base).chat_template is None


@pytest.mark.parametrize("key", ["model", "tokenizer"])
def test_what_a_run_starts_from_is_not_replaced(key: str, run_file: Run, llama_directory: Path, refused: Any) -> None:
    there = "out/base"
    path = run_file(**({"model": there} if key == "model" else {"pretrain": {"config": TINY, "tokenizer": there}}))
    shutil.copytree(llama_directory, path.parent / there)
    before = (path.parent / there / "model.safetensors").read_bytes()
    with refused(RunError, "out/base", "would be replaced", "another output_dir"):
        started(path)
    assert (path.parent / there / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("form", ["directory", "file"])
def test_a_configuration_without_weights_and_a_tokenizer_from_elsewhere(
    form: str, run_file: Run, llama_directory: Path, tmp_path: Path
) -> None:
    (tmp_path / "only").mkdir()
    shutil.copy(llama_directory / "config.json", tmp_path / "only")
    source = tmp_path / "only" / ("config.json" if form == "file" else "")
    asked = {"tokenizer": str(llama_directory), "config": {"num_hidden_layers": 1}}
    path = run_file(model=str(source), pretrain=asked)
    started(path)
    model = AutoModelForCausalLM.from_pretrained(path.parent / "out" / "base")
    tokenizer = AutoTokenizer.from_pretrained(path.parent / "out" / "base")
    assert len(model.model.layers) == 1 and model.config.vocab_size == len(tokenizer) == 60
    assert model.config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("adapter", [{"method": "sound", "train_modules": IN_FULL}, None], ids=["adapter", "full"])
def test_modules_with_a_learning_rate_of_their_own(adapter: Any, run_file: Run) -> None:
    """With next to none, they stay where they started, and only they."""
    asked = {"module_lr": {"embed_tokens": 1e-30, "input_layernorm": 1e-30}, "optimizer": "adamw"}
    path = run_file(adapter=adapter, training=asked)
    started(path)
    out = path.parent / "out"
    base = AutoModelForCausalLM.from_pretrained(out / "base")
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    trained = AutoModelForCausalLM.from_pretrained(out) if adapter is None else pc.load(base, out).merge_and_detach()
    still = {name for name, parameter in trained.named_parameters() if torch.equal(parameter, before[name])}
    expected = {name for name in before if "embed_tokens" in name or "input_layernorm" in name}
    assert still == expected and len(expected) == 3


def test_a_learning_rate_for_what_is_not_trained_in_full(run_file: Run, refused: Any) -> None:
    path = run_file(training={"module_lr": {"embed_token": 0.1}})
    with refused(RunError, "training.module_lr", "did you mean 'embed_tokens'", "lm_head"):
        started(path)


def test_the_tokenizer_is_trained_on_the_texts_and_loses_nothing() -> None:
    tokenizer = pretrain.train_tokenizer(TEXTS, 320)
    assert len(tokenizer) == 320
    strange = TEXTS[3] + "\n\tnaïve → ∑ \x00 数\n"
    assert tokenizer.decode(tokenizer(strange)["input_ids"]) == strange
    assert len(tokenizer(TEXTS[3])["input_ids"]) < len(TEXTS[3]) / 3
    assert tokenizer.eos_token_id == tokenizer("<|endoftext|>")["input_ids"][0]


def test_rows_are_full_and_hold_all_texts_in_order() -> None:
    tokenizer = pretrain.train_tokenizer(TEXTS, 300)
    rows = [Row({"text": text}, f"row {n}") for n, text in enumerate(TEXTS)]
    prepared = prepare_stream(rows, tokenizer, 32)
    assert {len(tokens.input_ids) for tokens in prepared.tokens} == {32}
    assert all(t.labels == [IGNORED, *t.input_ids[1:]] for t in prepared.tokens)
    found = [token for tokens in prepared.tokens for token in tokens.input_ids]
    whole = [token for text in TEXTS for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    assert found == whole[: len(found)] and len(whole) - len(found) < 32
    with pytest.raises(DataError, match="less than one example of 100000"):
        prepare_stream(rows, tokenizer, 100_000)


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"pretrain": {"config": {"hiden_size": 32}, "vocab_size": 300}}, ModelError, ["hiden_size", "hidden_size"]),
        ({"pretrain": {"config": {"num_attention_heads": 0}, "vocab_size": 300}}, ModelError, ["llama"]),
        (
            {"pretrain": {"config": {**TINY, "vocab_size": 20}, "vocab_size": 300}},
            ModelError,
            ["vocab_size", "leave it"],
        ),
        (
            {"pretrain": {"config": TINY}},
            ModelError,
            ["without a tokenizer", "pretrain.tokenizer", "pretrain.vocab_size"],
        ),
        ({"model": "lama"}, ModelError, ["lama", "llama"]),
        ({"pretrain": {"vocab_size": 3}}, RunError, ["pretrain.vocab_size", "260"]),
        ({"pretrain": {"vocab_size": 300, "tokenizer": "x"}}, RunError, ["choose one"]),
        ({"pretrain": {"tokeniser": "x"}}, RunError, ["pretrain.tokeniser", "tokenizer"]),
        ({"pretrain": None, "adapter": None}, RunError, ["adapter", "pre-training only"]),
        ({"data": {"packing": True}}, RunError, ["remove data.packing"]),
    ],
)
def test_mistakes(
    changed: dict[str, Any], error: type[Exception], words: list[str], run_file: Run, refused: Any
) -> None:
    path = run_file(**changed)
    with refused(error, *words):
        started(path)
    assert not (path.parent / "out" / "base").exists()


def test_only_texts_are_read(run_file: Run, refused: Any) -> None:
    path = run_file()
    (path.parent / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 9)
    with refused(RunError, "pre-training reads texts", "prompts"):
        started(path)


# The example


def example_module() -> Any:
    """examples/pretrain/pretrain.py, imported anew."""
    spec = importlib.util.spec_from_file_location("pretrain_example", EXAMPLE / "pretrain.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def example() -> Any:
    return example_module()


def test_every_run_of_the_example_can_be_planned(example: Any, lora_method: None) -> None:
    config = RunConfig.from_file(EXAMPLE / "RUN.yaml")
    assert config.pretrain is not None and config.data.max_length is not None
    with torch.device("meta"):
        made = AutoConfig.for_model(config.model.path, **config.pretrain.config, vocab_size=config.pretrain.vocab_size)
        model = AutoModelForCausalLM.from_config(made)
    adapters = {name: adapter for name, (adapter, _) in example.RUNS.items() if adapter}
    plans = {name: pc.plan(model, pc.AdapterSpec(**adapter)) for name, adapter in adapters.items()}
    assert len({plan.num_trainable for plan in plans.values()}) == 1 and len(plans) == len(example.RUNS) - 1
    assert all(len(plan.sites) == 7 * 4 for plan in plans.values())
    trained = [path for plan in plans.values() for path in plan.trained]
    assert all(any(path.endswith(name) for path in trained) for name in config.training.module_lr)


@pytest.mark.parametrize("fast", [torch.bfloat16, torch.float32])
def test_the_example_computes_in_what_the_processor_is_fast_in(
    fast: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft_core.models.fast_dtype", lambda device: fast)
    assert example_module().RUN["training"]["autocast"] == (fast == torch.bfloat16)


def test_the_examples_parts_have_no_package_in_common(example: Any, tmp_path: Path) -> None:
    for number in range(300):
        folder = tmp_path / "library" / (f"package{number // 3}" if number < 30 else "")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"module{number}.py").write_text(f"number = {number}\n" * 20)
    (tmp_path / "library" / "test").mkdir()
    (tmp_path / "library" / "test" / "left_out.py").write_text("left = out\n")
    example.write_text(tmp_path / "text", tmp_path / "library")
    parts = {
        part: [json.loads(line)["text"] for line in (tmp_path / "text" / f"{part}.jsonl").read_text().splitlines()]
        for part in ("train", "validation", "test")
    }
    found = [int(text.split()[2]) for texts in parts.values() for text in texts]
    assert sorted(found) == list(range(300))
    packages = [{number // 3 for text in texts if (number := int(text.split()[2])) < 30} for texts in parts.values()]
    assert sum(map(len, packages)) == len(set().union(*packages)) == 10
    assert all(1 <= len(parts[part]) <= 3 for part in ("validation", "test"))
