"""A tiny checkpoint with a real tokenizer, and data for it: what the command line is tried on."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import peft_core as pc

WORDS = ["<pad>", "<end>", "<unknown>", *(f"w{number}" for number in range(40))]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two small layers, saved with its tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unknown>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<end>", unk_token="<unknown>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty pairs of one pattern, which a few steps can learn."""
    file = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = ({"prompt": f"w{n % 20} w{n % 7}", "completion": f"w{20 + n % 3} w30"} for n in range(60))
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def method() -> str:
    """A method that is installed, whichever."""
    return min(pc.methods())


@pytest.fixture(scope="session")
def fitting(checkpoint: Path) -> Callable[[str], dict[str, object]]:
    """Method → the first of its trial options that fits the tiny checkpoint."""

    def first(method: str) -> dict[str, object]:
        for trial in pc.methods()[method].trials:
            with contextlib.suppress(pc.PlanError):
                pc.plan(checkpoint, pc.AdapterSpec(method=method, options=dict(trial)))
                return dict(trial)
        raise AssertionError(f"no trial options of {method} fit the tiny checkpoint")

    return first


@pytest.fixture(scope="session")
def options(method: str, fitting: Callable[[str], dict[str, object]]) -> dict[str, object]:
    """Options of `method` that fit the tiny checkpoint."""
    return fitting(method)
