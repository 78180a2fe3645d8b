from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from peft_core import DataError
from peft_core.quickstart.docstrings import Pair, docstring_pairs, read_pairs, split_by_module
from peft_core.quickstart.loop import batches
from peft_core.training.batches import collate
from peft_core.training.examples import IGNORED, Tokens, pair_tokens

SHAPES = '''
class Square:
    def area(self):
        """Return the area.

        In square metres.
        """
        return self.side**2

    def alone(self):
        """Nothing but this docstring."""

    def broken(self):
        """A sentence that goes on
        in the next line."""
        return 1

    def short(self): "On one line."; return 1
'''


def test_docstring_pairs_are_many_and_in_a_fixed_order() -> None:
    pairs = docstring_pairs()
    assert 3_000 < len(pairs) < 8_000
    assert pairs == docstring_pairs()
    assert len({pair.prompt for pair in pairs}) == len(pairs)


def test_a_pair_is_a_function_without_its_docstring(tmp_path: Path) -> None:
    (tmp_path / "shapes.py").write_text(SHAPES)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "skipped.py").write_text('def f():\n    """Not the library."""\n    return 1\n')
    (tmp_path / "template.py").write_text("def {name}():\n")
    (pair,) = docstring_pairs(tmp_path)
    assert pair.prompt == 'def area(self):\n    return self.side**2\n\ndef area(self):\n    """'
    assert (pair.completion, pair.module, pair.name) == ("Return the area.", "shapes", "area")


def test_no_library_source_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no documented functions"):
        docstring_pairs(tmp_path)


def test_no_module_is_in_both_parts() -> None:
    pairs = docstring_pairs()
    training, held_out = split_by_module(pairs)
    assert sorted(map(id, training + held_out)) == sorted(map(id, pairs))
    tops = [{pair.module.partition(".")[0] for pair in part} for part in (training, held_out)]
    assert not tops[0] & tops[1]
    assert 0.05 < len(held_out) / len(pairs) <= 0.10


def test_a_split_always_leaves_both_parts() -> None:
    two = [Pair("a", "b", module) for module in ("x", "y")]
    training, held_out = split_by_module(two)
    assert len(training) == len(held_out) == 1
    with pytest.raises(DataError, match="one module"):
        split_by_module([Pair("a", "b", "x"), Pair("c", "d", "x.inner")])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ('{"prompt": "a"}', "line 2: 'completion' is missing"),
        ('["prompt"]', "line 2: expected an object"),
        ('{"prompt": "a", "completion": ""}', "line 2: 'completion' is empty"),
        ('{"prompt": 1, "completion": "b"}', "line 2: 'prompt' is 1, not text"),
        ('{"prompt": "\\ud800", "completion": "b"}', r"line 2: .*not a character"),
    ],
)
def test_a_bad_line_is_named_by_number(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n' + line)
    with pytest.raises(DataError, match=message):
        read_pairs(file)


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "a\u2028b", "completion": "c\x85d"}\n' * 2, encoding="utf-8", newline="")
    assert [(pair.prompt, pair.completion) for pair in read_pairs(file)] == [("a\u2028b", "c\x85d")] * 2


def test_a_module_that_is_null_is_none(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "a", "completion": "b", "module": null}\n' * 2)
    assert [pair.module for pair in read_pairs(file)] == ["1", "2"]


def test_unreadable_and_too_small_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file"):
        read_pairs(tmp_path / "absent.jsonl")
    (tmp_path / "one.jsonl").write_text('{"prompt": "a", "completion": "b"}\n\n')
    with pytest.raises(DataError, match="only one pair"):
        read_pairs(tmp_path / "one.jsonl")


def test_loss_is_taken_on_the_completion_and_its_end(checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokens = pair_tokens("w0 w1 w2", "w3 w4", tokenizer, 16)
    assert tokens.input_ids == [3, 4, 5, 6, 7, tokenizer.eos_token_id]
    assert tokens.labels == [IGNORED] * 3 + [6, 7, tokenizer.eos_token_id]
    assert not tokens.truncated


def test_truncation_cuts_the_middle_of_the_prompt(checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    prompt = " ".join(f"w{number}" for number in range(10))
    tokens = pair_tokens(prompt, "w20", tokenizer, 6)
    assert tokens.input_ids == [3, 4, 11, 12, 23, tokenizer.eos_token_id]
    assert tokens.truncated
    long_completion = pair_tokens("w0 w1", prompt, tokenizer, 4)
    assert long_completion.labels == [IGNORED, 3, 4, 5]
    assert long_completion.truncated


def test_an_empty_prompt_still_has_a_token(checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokens = pair_tokens("", "w0", tokenizer, 8)
    assert tokens.labels[0] == IGNORED and tokens.labels[1:] == [3, tokenizer.eos_token_id]


def test_collate_pads_on_the_left() -> None:
    batch = collate([Tokens([5, 6], [-100, 6]), Tokens([7, 8, 9, 1], [-100, -100, 9, 1])], 0)
    assert batch["input_ids"].tolist() == [[0, 0, 5, 6], [7, 8, 9, 1]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 6], [-100, -100, 9, 1]]


def test_collate_pads_on_the_right_and_leaves_counting_to_the_model() -> None:
    batch = collate([Tokens([5, 6], [-100, 6]), Tokens([7, 8, 9], [-100, -100, 9])], 0, left=False)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 0], [7, 8, 9]],
        "attention_mask": [[1, 1, 0], [1, 1, 1]],
        "labels": [[-100, 6, -100], [-100, -100, 9]],
    }


def test_batches_depend_on_the_seed_alone_and_visit_everything() -> None:
    tokens = [Tokens([number] * (1 + number % 5), [number] * (1 + number % 5)) for number in range(64)]

    def first(seed: int, count: int) -> list[list[int]]:
        stream = batches(tokens, 8, 99, seed)
        return [next(stream)["input_ids"][:, -1].tolist() for _ in range(count)]

    assert first(0, 20) == first(0, 20) != first(1, 20)
    assert sorted(itertools.chain.from_iterable(first(0, 8))) == list(range(64))
    stream = batches(tokens, 8, 99, 0)
    widths = [next(stream)["input_ids"] for _ in range(8)]
    assert sum(int((batch == 99).sum()) for batch in widths) < 24  # of 128, if lengths were mixed


def test_more_examples_asked_for_than_there_are() -> None:
    batch = next(batches([Tokens([1], [1])] * 3, 8, 0, 0))
    assert torch.equal(batch["input_ids"], torch.ones(3, 1, dtype=torch.long))
