"""Prompt and completion pairs: read, split by module, turned into tokens with loss on the completion only."""

from __future__ import annotations

import ast
import hashlib
import json
import sysconfig
import textwrap
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import DataError

IGNORED = -100
"""The label of a token that no loss is taken on (what torch's and transformers' losses skip)."""

# Not the library itself: tests, demos, and what is installed beside it.
_SKIPPED_FOLDERS = frozenset(
    {
        "test",
        "tests",
        "idle_test",
        "idlelib",
        "lib2to3",
        "turtledemo",
        "ensurepip",
        "pydoc_data",
        "__phello__",
        "site-packages",
        "dist-packages",
    }
)


@dataclass(frozen=True)
class Example:
    """One training pair; ``module`` names where it is from, and is what a split keeps together."""

    prompt: str
    completion: str
    module: str = ""
    name: str = ""


@dataclass(frozen=True)
class Tokens:
    """One tokenised example: ``labels`` are ``input_ids`` where loss is taken, else IGNORED."""

    input_ids: list[int]
    labels: list[int]
    truncated: bool = False


def docstring_pairs(root: Path | None = None) -> list[Example]:
    """Functions of Python's standard library and the first lines of their docstrings, in a fixed order.

    The prompt is the function's source without its docstring, then its signature with an opening quote: the
    completion stands next. Functions without a body of their own, first lines that are no sentence,
    and repeated functions are left out. About 5 000 pairs, somewhat more or fewer by Python version.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    pairs: dict[str, Example] = {}
    for path in _modules(root):
        module = path.relative_to(root).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        for example in _module_pairs(path, module):
            pairs.setdefault(example.prompt, example)
    if not pairs:
        raise DataError(f"no documented functions under {root}; is the standard library there as source?")
    return list(pairs.values())


def read_pairs(path: Path) -> list[Example]:
    """Pairs from a JSON Lines file with ``prompt`` and ``completion`` on every line.

    Raises DataError naming the line that is not such a pair.
    """
    pairs = []
    try:
        lines = path.read_text(encoding="utf-8").split(
            "\n"
        )  # not splitlines: JSON may hold U+2028 and others as they are
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt, completion = row["prompt"], row["completion"]
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}, line {number}: not a JSON object with prompt and completion") from error
        if not (isinstance(prompt, str) and isinstance(completion, str) and completion.strip()):
            raise DataError(f"{path}, line {number}: prompt and completion must be text, the completion not empty")
        whole_text(prompt + completion, f"{path}, line {number}")
        pairs.append(Example(prompt, completion, module=str(row.get("module", number)), name=f"line {number}"))
    if len(pairs) < 2:
        raise DataError(f"{path} has {len(pairs)} pairs; training and holding out need at least two")
    return pairs


def split_by_module(examples: Sequence[Example], percent: int = 10) -> tuple[list[Example], list[Example]]:
    """``(training, held out)``: up to ``percent`` % of the examples held out, by whole top-level modules.

    Modules are taken in the order of a hash of their names while they fit, so none is in both parts, no large
    one makes up the held-out part alone, and the choice hardly changes when a module is added.
    """
    sizes = Counter(_top(example) for example in examples)
    if len(sizes) < 2:
        raise DataError("all examples are of one module: nothing would be left to train on or to hold out")
    room = len(examples) * percent // 100
    held_out: set[str] = set()
    for module in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if sizes[module] <= room:
            held_out.add(module)
            room -= sizes[module]
    held_out = held_out or {min(sizes, key=lambda name: (sizes[name], name))}
    training = [example for example in examples if _top(example) not in held_out]
    return training, [example for example in examples if _top(example) in held_out]


def tokenise(example: Example, tokenizer: Any, max_length: int) -> Tokens:
    """Tokens of prompt, completion and end-of-sequence; loss on the last two.

    A prompt that is too long loses its middle, so that what opens it (a signature) and what closes it (the
    question) both stay. A completion that fills ``max_length`` alone is cut at its end.
    """
    prompt = prompt_ids(example.prompt, tokenizer)
    completion = list(tokenizer(example.completion, add_special_tokens=False)["input_ids"])
    if tokenizer.eos_token_id is not None:
        completion.append(tokenizer.eos_token_id)
    kept = completion[: max_length - 1]  # one prompt token at least: the first completion token needs a predecessor
    room = max_length - len(kept)
    truncated = len(kept) < len(completion) or room < len(prompt)
    prompt = cut_middle(prompt, room)
    return Tokens(prompt + kept, [IGNORED] * len(prompt) + kept, truncated)


def whole_text(text: str, place: str) -> str:
    """``text``, if a tokenizer can take it. JSON can hold half of a character, an argument bytes that are not UTF-8.

    Raises DataError naming the place.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: {text[error.start]} is no character, but half of a surrogate pair or a byte that is not UTF-8; "
            "take it out"
        ) from None
    return text


def prompt_ids(prompt: str, tokenizer: Any) -> list[int]:
    """Tokens of a prompt, with what the tokenizer puts at the start of a text; never empty."""
    ids = list(tokenizer(prompt)["input_ids"])
    while ids and ids[-1] == tokenizer.eos_token_id:  # an end of sequence would end it before its completion
        ids.pop()
    return ids or [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]


def cut_middle(ids: list[int], length: int) -> list[int]:
    """``ids`` without its middle, if it is longer than ``length``."""
    if len(ids) <= length:
        return ids
    tail = length // 2
    return ids[: length - tail] + ids[len(ids) - tail :]


def collate(batch: Sequence[Tokens], pad_id: int, left: bool = True) -> dict[str, torch.Tensor]:
    """Input ids, ``attention_mask``, ``position_ids`` and ``labels``, [batch, length], padded on the left.

    On the left, so that completions end together and the vocabulary's logits are needed for a few last
    positions only. With ``left`` false on the right, where no token sees the padding, and without
    ``position_ids``: the model counts as it does for one example.
    """
    length = max(len(tokens.input_ids) for tokens in batch)
    ids = torch.full((len(batch), length), pad_id)
    mask = torch.zeros((len(batch), length), dtype=torch.long)
    labels = torch.full((len(batch), length), IGNORED)
    for row, tokens in enumerate(batch):
        start = length - len(tokens.input_ids) if left else 0
        end = start + len(tokens.input_ids)
        ids[row, start:end] = torch.tensor(tokens.input_ids)
        labels[row, start:end] = torch.tensor(tokens.labels)
        mask[row, start:end] = 1
    positions = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if left else {}
    return {"input_ids": ids, "attention_mask": mask, **positions, "labels": labels}


def batches(
    tokens: Sequence[Tokens], size: int, pad_id: int, seed: int, window: int = 16
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of ``size`` without end, in an order that depends on ``seed`` alone.

    Within ``window`` batches of a shuffled epoch, examples of like length share a batch: else half the time of
    a step would go into padding. What does not fill the last batch of a window is dropped.
    """
    generator = torch.Generator().manual_seed(seed)
    size = min(size, len(tokens))
    while True:
        order = torch.randperm(len(tokens), generator=generator).tolist()
        for start in range(0, len(order), window * size):
            chunk = order[start : start + window * size]
            chunk.sort(key=lambda index: len(tokens[index].input_ids))
            groups = [chunk[at : at + size] for at in range(0, len(chunk) - size + 1, size)]
            for at in torch.randperm(len(groups), generator=generator).tolist():
                yield collate([tokens[index] for index in groups[at]], pad_id)


def _top(example: Example) -> str:
    return example.module.partition(".")[0]


def _modules(root: Path) -> Iterable[Path]:
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts):
        if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts[:-1]):
            yield path


def _module_pairs(path: Path, module: str) -> Iterator[Example]:
    try:
        with tokenize.open(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # the library's own doubtful escapes
            text = file.read()
            tree = ast.parse(text)
    except (OSError, SyntaxError, UnicodeDecodeError):
        return  # a template or a deliberately broken file
    lines = text.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        first, _, rest = (ast.get_docstring(node) or "").strip().partition("\n")
        first = first.strip()
        # Left out: one word, a doctest, a sentence that goes on in the next line, a body of docstring alone.
        continues = rest.partition("\n")[0].strip() and not first.endswith(".")
        if len(first.split()) < 2 or first.startswith(">>>") or continues or len(node.body) < 2:
            continue
        docstring = node.body[0]
        assert docstring.end_lineno is not None and node.end_lineno is not None
        signature = lines[node.lineno - 1 : docstring.lineno - 1]
        body = lines[docstring.end_lineno : node.end_lineno]
        if signature:  # none: the docstring is on the line of the def
            prompt = f'{_dedented(signature + body)}\n\n{_dedented(signature)}\n    """'
            yield Example(prompt, first, module, node.name)


def _dedented(lines: Sequence[str]) -> str:
    return textwrap.dedent("\n".join(lines)).strip()
