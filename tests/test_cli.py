"""The program: what each command prints, and a user's mistakes as one line and exit status 2."""

import errno
import importlib.metadata
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from transformers import AutoTokenizer

import peft_core as pc
from peft_core import AdapterSpec, models, prompts
from peft_core.testing.checks import randomise
from peft_core.testing.families import FAMILIES


@pytest.fixture
def mistake(program, clear) -> Callable[..., None]:
    """`mistake(["plan", ...], "word", ...)`: one clear line on standard error, no output, exit status 2."""

    def check(arguments: list[object], *words: str) -> None:
        ran = program(*arguments)
        assert (ran.status, ran.out) == (2, ""), ran
        assert ran.err.startswith("peft-core: ")
        clear(ran.err, *words)

    return check


@pytest.fixture
def spec_file(tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text(AdapterSpec(method="sound", targets=["q_proj"]).to_yaml())
    return path


@pytest.fixture(scope="session")
def saved(tmp_path_factory, sound_method):
    directory = tmp_path_factory.mktemp("cli") / "adapter"
    adapter = pc.attach(FAMILIES["llama"].build(), AdapterSpec(method="sound", targets=["q_proj"]))
    randomise(adapter).save(directory)
    return directory


def test_methods(program) -> None:
    ran = program("methods")
    assert ran.status == 0 and ran.err == ""
    for word in ("sound", "for tests", "r=4", "alpha=8.0"):
        assert word in ran.out
    listed = json.loads(program("methods", "--json").out)
    assert set(listed) == set(pc.methods())
    assert set(listed["sound"]["options"]["properties"]) == {"r", "alpha"}


def test_plan(program, llama_directory, spec_file) -> None:
    ran = program("plan", "--model", llama_directory, "--spec", spec_file)
    assert ran.status == 0 and ran.err == ""
    for word in ("q_proj", "LlamaForCausalLM", "sound", "total"):
        assert word in ran.out
    figures = json.loads(program("plan", "--model", llama_directory, "--spec", spec_file, "--json").out)
    assert figures["sites"] == 2
    assert figures["trainable_parameters"] == 8 * 48 + 2 * 4 * 48


def test_inspect(program, saved) -> None:
    ran = program("inspect", saved)
    assert ran.status == 0 and ran.err == ""
    for word in ("sound", "LlamaForCausalLM", "pool.q_proj", "r=4"):
        assert word in ran.out
    header = json.loads(program("inspect", saved, "--json").out)
    assert header["method"]["name"] == "sound" and header["file_bytes"] > 0


def test_of_several_processes_the_first_speaks(program, monkeypatch) -> None:
    spoken = program("methods").out
    monkeypatch.setenv("RANK", "0")
    assert program("methods").out == spoken != ""
    monkeypatch.setenv("RANK", "1")
    assert program("methods") == (0, "", "")


def test_a_damaged_file_is_shown(program, saved, tmp_path) -> None:
    assert json.loads(program("inspect", saved, "--json").out)["damaged"] == []
    shutil.copytree(saved, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter.safetensors"
    for content in (file.read_bytes()[:-10], file.read_bytes()[:-1] + b"x"):
        file.write_bytes(content)
        ran = program("inspect", tmp_path / "adapter")
        assert ran.status == 2 and "LlamaForCausalLM" in ran.out and "damaged files" in ran.out
        assert f"'{file}' is not the file that was saved" in ran.err and ran.err.count("\n") == 1
        assert json.loads(program("inspect", tmp_path / "adapter", "--json").out)["damaged"] == ["adapter.safetensors"]


def test_generate(program, llama_directory, saved) -> None:
    common = ["generate", "--base", llama_directory, "--adapter", saved, "--prompt", "w1 w2 w3"]
    ran = program(*common, "--max-new-tokens", 4, "--dtype", "float32")
    assert ran.status == 0
    again = json.loads(program(*common, "--max-new-tokens", 4, "--dtype", "float32", "--json").out)
    assert again["completion"].strip() == ran.out.strip()


def test_help_lists_the_commands(program) -> None:
    ran = program("--help")
    assert ran.status == 0
    for command in ("methods", "plan", "inspect", "generate", "quickstart"):
        assert command in ran.out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["plan", "--modle", "x"], ["--modle", "--model", "peft-core plan --help"]),
        (["plan"], ["'--model'", "peft-core plan --help"]),
        (["plna"], ["'plna'", "peft-core --help", "peft-export"]),
        (["generate", "--max-new-tokens", "many"], ["'--max-new-tokens'", "integer"]),
        (["new-method", "fresh", "-d", __file__], ["test_cli.py", "cannot write"]),
    ],
)
def test_mistakes_in_typing(mistake, arguments, words) -> None:
    mistake(arguments, *words)


def test_plan_takes_what_a_run_has(program, llama_directory, spec_file, tmp_path) -> None:
    expected = program("plan", "--model", llama_directory, "--spec", spec_file)
    run = tmp_path / "RUN.yaml"
    for adapter in (spec_file.name, "{method: sound, targets: [q_proj]}"):
        run.write_text(f"model: m\ndata: d.jsonl\nadapter: {adapter}\noutput_dir: out")
        assert program("plan", "--model", llama_directory / "config.json", "--spec", run) == expected


@pytest.mark.parametrize("place", ["peft_core.plugins.add_commands", "peft_core.plugins.methods"])
def test_an_interruption_is_one_line(program, place, monkeypatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(place, interrupted)
    assert program("methods") == (130, "", "peft-core: interrupted\n")


def test_an_interruption_while_torch_is_imported_is_one_line(tmp_path) -> None:
    """Even where something that is imported would go on without what was interrupted."""
    interrupt = (
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept KeyboardInterrupt:\n    pass\n"
    )
    (tmp_path / "torch.py").write_text(interrupt)
    usual = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # it may be ignored here
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {usual}; from peft_core_program import main; main()"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (130, "", "peft-core: interrupted\n")


@pytest.mark.parametrize("module", ["peft_core", "peft_core.cli"])
def test_the_program_as_a_module(module) -> None:
    ran = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, f"peft-core {importlib.metadata.version('peft-core')}\n"), ran


def test_mistakes_in_plan(mistake, llama_directory, spec_file, tmp_path) -> None:
    plan = ["plan", "--model", llama_directory, "--spec"]
    mistake([*plan, tmp_path / "missing.yaml"], "missing.yaml")
    for text, words in {
        "method: soundd": ["'soundd'", "did you mean 'sound'?", "pip install"],
        "method: sound\noptions: {rnk: 3}": ["'rnk'"],
        "method: sound\ntargets: [q_prj]": ["'q_prj'", "did you mean 'q_proj'?"],
        "method: sound\noptions: {r: 49}": ["49", "q_proj"],
        "- a": ["mapping"],
    }.items():
        spec_file.write_text(text)
        mistake([*plan, spec_file], *words)
    spec_file.write_text("method: sound")
    mistake(["plan", "--model", tmp_path, "--spec", spec_file], "config.json")
    mistake(["plan", "--model", tmp_path / "nothing", "--spec", spec_file], "nothing")


def test_mistakes_in_inspect(mistake, tmp_path) -> None:
    mistake(["inspect", tmp_path], "adapter.json")
    mistake(["inspect", tmp_path / "missing"], "missing", "does not exist")


def test_mistakes_in_generate(mistake, llama_directory, saved, tmp_path) -> None:
    generate = ["generate", "--prompt", "w1", "--base"]
    mistake([*generate, llama_directory, "--adapter", tmp_path], "adapter.json")
    mistake([*generate, tmp_path / "nothing", "--adapter", saved], "nothing")
    mistake([*generate, tmp_path, "--adapter", saved], "config.json")
    mistake([*generate, llama_directory, "--adapter", saved, "--dtype", "float31"], "'float31'", "float32")
    mistake([*generate, llama_directory, "--adapter", saved, "--device", "nonsense"], "nonsense")
    mistake([*generate, llama_directory, "--adapter", saved, "--chat"], "chat template")
    pc.attach(FAMILIES["bert"].build(), AdapterSpec(method="sound")).save(tmp_path / "classifier")
    words = "BertForSequenceClassification", "writes no text"
    mistake([*generate, llama_directory, "--adapter", tmp_path / "classifier"], *words)
    given = ["generate", "--base", llama_directory, "--adapter", saved, "--prompt"]
    mistake([*given, " ".join(["w1"] * 40)], "40 tokens", "can have 32", "shorten the prompt")
    mistake([*given, os.fsdecode(b"caf\xe9")], "--prompt", "\\udce9", "not UTF-8")


def test_writing_ends_with_the_models_positions(llama_directory) -> None:
    model, tokenizer = FAMILIES["gpt2"].build(), AutoTokenizer.from_pretrained(llama_directory)
    model.generation_config.eos_token_id = None
    written = prompts.complete(model, tokenizer, " ".join(["w1"] * 29), max_new_tokens=64)
    assert written == prompts.complete(model, tokenizer, " ".join(["w1"] * 29), max_new_tokens=3) != ""


def test_a_chat_template_that_writes_the_first_token(program, mistake, llama_directory, saved, tmp_path) -> None:
    """The model reads what it was trained on: the template's tokens, and none of the tokenizer's before them."""
    base = tmp_path / "base"
    shutil.copytree(llama_directory, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    begins = [("<s>", tokenizer.convert_tokens_to_ids("<s>"))]
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=begins)
    tokenizer.backend_tokenizer.post_processor = template
    tokenizer.chat_template = "<s> {{ messages[0].content }} w7"
    tokenizer.save_pretrained(base)
    model, tokenizer = models.load_base(base, "float32")
    ids = prompts.prompt_ids("<s> w1 w7", tokenizer, rendered=True)
    assert prompts.prompt_ids("w1 w7", tokenizer) == ids and ids.count(begins[0][1]) == 1
    pc.load(model, saved)
    generate = ["generate", "--base", base, "--adapter", saved, "--prompt", "w1", "--chat"]
    ran = program(*generate, "--dtype", "float32", "--max-new-tokens", "4", "--json")
    assert json.loads(ran.out)["completion"] == prompts.complete(model, tokenizer, "w1 w7", 4)
    tokenizer.chat_template = "{{ raise_exception('no user may begin') }}"
    tokenizer.save_pretrained(base)
    mistake(generate, "the chat template refuses", "no user may begin")


def test_a_prompt_that_is_not_utf8(mistake, llama_directory, saved, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    mistake(["generate", "--base", llama_directory, "--adapter", saved, "--prompt", "-"], "prompt", "UTF-8")


@pytest.mark.parametrize("name", ["adapter.json", "adapter.safetensors"])
def test_a_file_that_may_not_be_read(
    program, mistake, clear, llama_directory, saved, name, tmp_path, monkeypatch
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(saved, adapter)
    opened = Path.open

    def refuse(path: Path, *arguments: object, **named: object) -> Any:
        if path == adapter / name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *arguments, **named)

    monkeypatch.setattr(Path, "open", refuse)
    mistake(
        ["generate", "--base", llama_directory, "--adapter", adapter, "--prompt", "w1"], str(adapter / name), "denied"
    )
    ran = program("inspect", adapter)
    assert ran.status == 2
    clear(ran.err, f"'{adapter / name}' cannot be read: Permission denied")


def test_a_base_without_its_tokenizer(mistake, llama_directory, saved, tmp_path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((llama_directory / name).read_bytes())
    mistake(["generate", "--base", tmp_path, "--adapter", saved, "--prompt", "x"], "tokenizer", "save_pretrained")


@pytest.mark.parametrize("length", [0, 100, -100])
def test_damaged_weights_are_named(mistake, llama_directory, saved, length, tmp_path) -> None:
    base = tmp_path / "base"
    shutil.copytree(llama_directory, base)
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:length])
    named = f"'{weights}' is truncated or damaged"
    mistake(["generate", "--base", base, "--adapter", saved, "--prompt", "w1"], named, "restore it")
    mistake(["quickstart", "--out", tmp_path / "out", "--model", base, "--method", "sound"], named)
    weights.unlink()
    (base / "pytorch_model.bin").write_bytes(b"PK" * length)
    mistake(["generate", "--base", base, "--adapter", saved, "--prompt", "w1"], str(base))


def test_mistakes_in_quickstart(mistake, llama_directory, tmp_path) -> None:
    quickstart = ["quickstart", "--out", tmp_path / "out", "--model", llama_directory, "--method"]
    mistake([*quickstart, "soundd"], "'soundd'", "did you mean 'sound'?")
    mistake([*quickstart, "sound", "-o", "r"], "NAME=VALUE")
    mistake([*quickstart, "sound", "-o", "rank=3"], "'rank'")
    mistake([*quickstart, "sound", "--data", tmp_path / "nothing.jsonl"], "nothing.jsonl")
    assert not (tmp_path / "out").exists(), "a mistake has left something behind"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (
            ["generate", "--base", "{base}", "--adapter", "{adapter}", "--prompt", "w1", "--device", "cuda"],
            ["cuda"],
        ),
        (["inspect", "/nothing/here"], ["/nothing/here"]),
        (["no-such-command"], ["no-such-command"]),
    ],
    ids=["cuda where there is none", "no adapter", "no command"],
)
def test_real_process_prints_no_traceback(arguments, words, llama_directory, saved) -> None:
    command = [
        sys.executable,
        "-c",
        "import peft_core.testing.methods as m; m.register_sound(); from peft_core.cli import main; main()",
    ]
    filled = [argument.format(base=llama_directory, adapter=saved) for argument in arguments]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run([*command, *filled], capture_output=True, text=True, env=environment)
    assert ran.returncode == 2, ran
    assert "Traceback" not in ran.stderr and not ran.stdout
    for word in words:
        assert word in ran.stderr
