"""Directories of models that runs start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, BertTokenizerFast

from peft_core.testing.families import FAMILIES
from tests.train.runs import CHAT


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
