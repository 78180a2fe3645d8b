"""Training data from files and datasets: rows with their places, and what they become for a model.

A bad row is named by its line (or row) number. What is cut or left out for its length is counted.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .data import IGNORED, Example, Tokens, tokenise, whole_text
from .errors import DataError, first_line, listed, suggestion
from .runs import FILES

COLUMNS = {"messages": ("messages",), "prompt": ("prompt", "completion"), "label": ("text", "label"), "text": ("text",)}
"""Format → the columns that it needs. The first whose columns a row has is its format."""


class Row(NamedTuple):
    """One example as it was read, and where it stands: `data.jsonl, line 3`."""

    values: Mapping[str, Any]
    place: str


@dataclass(frozen=True)
class Prepared:
    """Examples in tokens.

    Attributes:
        tokens: of each. classes: for a classifier the class of each. truncated: examples that were cut.
        dropped: examples left out because nothing to learn from was left within the length.
    """

    tokens: tuple[Tokens, ...]
    classes: tuple[int, ...] = ()
    truncated: int = 0
    dropped: int = 0


def read_rows(source: str, subset: str | None = None, split: str = "train") -> list[Row]:
    """All rows of a .jsonl, .csv or .parquet file, or of a split of a `datasets` name.

    Raises:
        DataError: it cannot be read; a bad line is named by number.
    """
    path = Path(source)
    readers = dict(zip(FILES, (_jsonl, _csv, _parquet), strict=True))
    if path.suffix in readers:
        if not path.is_file():
            raise DataError(f"there is no file '{source}'")
        try:
            rows = list(readers[path.suffix](path))
        except OSError as error:
            raise DataError(f"'{source}' cannot be read: {error}") from None
    elif path.is_file():
        raise DataError(f"'{source}': files are read as {listed(FILES)}, by their suffix")
    else:
        rows = list(_dataset(source, subset, split))
    if not rows:
        raise DataError(f"'{source}' has no rows")
    return rows


def format_of(rows: Sequence[Row], wanted: str = "auto") -> str:
    """The format of the rows: `wanted`, or the one that the first row's columns make.

    Raises:
        DataError: the columns are those of no format.
    """
    columns = [name for name, value in rows[0].values.items() if value is not None]
    if wanted != "auto":
        return wanted
    for name, needed in COLUMNS.items():
        if set(needed) <= set(columns):
            return name
    known = sorted({column for needed in COLUMNS.values() for column in needed})
    near = "".join(suggestion(column, known) for column in columns[:1])
    raise DataError(
        f"{rows[0].place}: the columns {listed(columns)} are not known{near}; needed are text, or prompt and completion, or "
        "messages, or text and label"
    )


def hold_out(rows: Sequence[Row], part: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(training, held out): at random by `seed`, at least one row each.

    Raises:
        DataError: there are not two rows.
    """
    if len(rows) < 2:
        raise DataError(f"{rows[0].place}: one row cannot be divided; give data.evaluation, or set data.hold_out to 0")
    count = min(max(1, round(part * len(rows))), len(rows) - 1)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    held = set(order[:count])
    return [row for n, row in enumerate(rows) if n not in held], [row for n, row in enumerate(rows) if n in held]


def classes_of(rows: Iterable[Row]) -> list[str]:
    """The labels of the rows, sorted: numbers by size.

    Raises:
        DataError: a label is missing or no class, or all are the same.
    """
    found: dict[str, Any] = {}
    for row in rows:
        found[_label(row)] = row.values["label"]
    if len(found) < 2:
        raise DataError(f"all rows have the label '{next(iter(found))}': there is nothing to tell apart")
    try:
        return sorted(found, key=float)
    except ValueError:
        return sorted(found)


def prepare_labelled(rows: Sequence[Row], classes: Sequence[str], tokenizer: Any, max_length: int) -> Prepared:
    """Text and label, for a sequence classifier.

    Raises:
        DataError: a row is not a text with one of these labels.
    """
    index = {name: number for number, name in enumerate(classes)}
    tokens, numbers = [], []
    for row in rows:
        name = _label(row)
        if name not in index:
            raise DataError(
                f"{row.place}: the label '{name}' does not occur in the training data; there: {listed(classes, 20)}"
            )
        numbers.append(index[name])
        text = text_of(row)
        whole = len(tokenizer(text, truncation=False, verbose=False)["input_ids"])
        ids = tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
        tokens.append(Tokens(list(ids), [], truncated=whole > len(ids)))
    return Prepared(tuple(tokens), tuple(numbers), truncated=sum(t.truncated for t in tokens))


def prepare_causal(rows: Sequence[Row], kind: str, tokenizer: Any, max_length: int) -> Prepared:
    """Text, prompt and completion, or messages, for a causal language model; loss on what it should learn to write.

    Raises:
        DataError: a row does not have the format; the tokenizer has no chat template, or one that cannot be used.
    """
    if kind == "messages" and not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "messages need a chat template, which this model's tokenizer has not; use prompt and completion"
        )
    if kind == "messages" and not tokenizer.is_fast:
        raise DataError("messages need a fast tokenizer, to know which tokens the assistant wrote")
    make = {"text": _text_tokens, "prompt": _prompt_tokens, "messages": _chat_tokens}[kind]
    made = [make(row, tokenizer, max_length) for row in rows]
    kept = tuple(tokens for tokens in made if any(label != IGNORED for label in tokens.labels[1:]))
    if not kept:
        raise DataError(
            f"{rows[0].place}: no example has anything to learn within {max_length} tokens; raise data.max_length"
        )
    return Prepared(kept, truncated=sum(tokens.truncated for tokens in kept), dropped=len(made) - len(kept))


def prepare_stream(rows: Sequence[Row], tokenizer: Any, max_length: int) -> Prepared:
    """Texts one after the other, each with its end of sequence, cut into examples of `max_length` tokens: nothing is lost
    but the rest that fills no example. For pre-training.

    Raises:
        DataError: a row has no text; together they do not fill one example.
    """
    ids = [token for row in rows for token in _ended(row, tokenizer)]
    if len(ids) < max_length:
        raise DataError(
            f"{rows[0].place}: all texts together have {len(ids)} tokens, less than one example of {max_length}; "
            "lower data.max_length"
        )
    cut = (ids[at : at + max_length] for at in range(0, len(ids) - max_length + 1, max_length))
    return Prepared(tuple(Tokens(part, [IGNORED, *part[1:]]) for part in cut))  # nothing predicts the first


def pack(examples: Sequence[Tokens], max_length: int) -> list[list[Tokens]]:
    """Examples in rows of at most `max_length` tokens, the longest first into the fullest row that takes it."""
    rows: list[list[Tokens]] = []
    by_room: dict[int, list[int]] = {}
    for tokens in sorted(examples, key=lambda tokens: len(tokens.input_ids), reverse=True):
        length = len(tokens.input_ids)
        room = min((room for room, open_rows in by_room.items() if room >= length and open_rows), default=None)
        if room is None:
            rows.append([tokens])
            number, room = len(rows) - 1, max_length
        else:
            number = by_room[room].pop()
            rows[number].append(tokens)
        by_room.setdefault(room - length, []).append(number)
    return rows


def text_of(row: Row, column: str = "text") -> str:
    """A row's text.

    Raises:
        DataError: it is missing, empty, or no text.
    """
    value = row.values.get(column)
    if not isinstance(value, str) or not value.strip():
        what = "is missing" if value is None else "is empty" if isinstance(value, str) else f"is {value!r}, not text"
        raise DataError(f"{row.place}: '{column}' {what}")
    return whole_text(value, row.place)


def _jsonl(path: Path) -> Iterator[Row]:
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            values = json.loads(line)
        except ValueError as error:  # of JSON, or of UTF-8
            raise DataError(f"{place} is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise DataError(f"{place}: expected an object with named values, found {type(values).__name__}")
        yield Row(values, place)


def _csv(path: Path) -> Iterator[Row]:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, line {data[: error.start].count(10) + 1} is not UTF-8") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)  # lines end at \n, \r or \r\n only
    start = 1
    try:
        names = next(reader, [])
        if not names or len(set(names)) < len(names):
            raise DataError(f"{path}, line 1: the column names must be there, none twice; found {listed(names)}")
        while True:
            start = reader.line_num + 1
            fields = next(reader, None)
            if fields is None:
                return
            if fields and len(fields) != len(names):
                raise DataError(f"{path}, line {start}: {len(fields)} values for {len(names)} columns")
            if fields:
                yield Row(dict(zip(names, fields, strict=True)), f"{path}, line {start}")
    except csv.Error as error:
        raise DataError(f"{path}, line {start} is not CSV: {error}") from None


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError('.parquet files need pyarrow: pip install "peft-core[train]"') from None
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"'{path}' cannot be read as parquet: {first_line(error)}") from None
    for number, values in enumerate(table.to_pylist(), start=1):
        yield Row(values, f"{path}, row {number}")


def _dataset(name: str, subset: str | None, split: str) -> Iterator[Row]:
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"'{name}' is no file; names of datasets need datasets: pip install \"peft-core[train]\""
        ) from None
    try:
        found = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # its errors are of many kinds
        raise DataError(f"'{name}' is no data file, and datasets cannot load it: {first_line(error)}") from None
    for number, values in enumerate(found, start=1):
        yield Row(values, f"{name} ({split}), row {number}")


def _label(row: Row) -> str:
    value = row.values.get("label")
    if isinstance(value, bool) or (isinstance(value, (int, str)) and str(value).strip()):
        return whole_text(str(value).strip(), row.place)
    what = "is missing" if value is None or value == "" else f"is {value!r}: classes are text or whole numbers"
    raise DataError(f"{row.place}: 'label' {what}")


def _text_tokens(row: Row, tokenizer: Any, max_length: int) -> Tokens:
    ids = _ended(row, tokenizer)
    kept = ids[:max_length]
    return Tokens(kept, [IGNORED, *kept[1:]], truncated=len(kept) < len(ids))  # nothing predicts the first


def _ended(row: Row, tokenizer: Any) -> list[int]:
    """The text's tokens with an end of sequence, if the tokenizer has one."""
    ids = list(tokenizer(text_of(row), verbose=False)["input_ids"])
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    return ids


def _prompt_tokens(row: Row, tokenizer: Any, max_length: int) -> Tokens:
    prompt = row.values.get("prompt")
    if not isinstance(prompt, str):
        raise DataError(f"{row.place}: 'prompt' {'is missing' if prompt is None else f'is {prompt!r}, not text'}")
    return tokenise(Example(whole_text(prompt, row.place), text_of(row, "completion")), tokenizer, max_length)


def _chat_tokens(row: Row, tokenizer: Any, max_length: int) -> Tokens:
    """A conversation through the chat template, with loss on what the assistant writes, its end included."""
    messages = [_message(row, number, message) for number, message in enumerate(_list(row), start=1)]
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{row.place}: no message is the assistant's: there is nothing to learn")
    whole = whole_text(_rendered(row, tokenizer, messages, False), row.place)
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _rendered(row, tokenizer, messages[:number], True)
        after = _rendered(row, tokenizer, messages[: number + 1], False)
        if not (whole.startswith(before) and whole.startswith(after.rstrip())):
            raise DataError(
                f"{row.place}: the chat template writes message {number + 1} otherwise when others follow; "
                "split the conversation into one row per answer"
            )
        spans.append((len(before), len(after.rstrip())))
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = list(encoded["input_ids"])
    labels = [
        token if any(start < end and low <= start < high for low, high in spans) else IGNORED
        for token, (start, end) in zip(ids, encoded["offset_mapping"], strict=True)
    ]
    return Tokens(ids[:max_length], labels[:max_length], truncated=len(ids) > max_length)


def _list(row: Row) -> list[Any]:
    messages = row.values.get("messages")
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{row.place}: 'messages' must be a list of messages with role and content")
    return messages


def _message(row: Row, number: int, message: Any) -> dict[str, Any]:
    role = message.get("role") if isinstance(message, Mapping) else None
    content = message.get("content") if isinstance(message, Mapping) else None
    if not (isinstance(role, str) and isinstance(content, str)):
        raise DataError(f"{row.place}: message {number} must have role and content, both text")
    return {key: value for key, value in message.items() if value is not None}


def _rendered(row: Row, tokenizer: Any, messages: list[dict[str, Any]], prompt: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    except Exception as error:  # templates raise what they like
        raise DataError(f"{row.place}: the chat template refuses: {first_line(error)}") from None
