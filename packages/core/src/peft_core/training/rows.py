"""Training data as it is read: rows of files and of `datasets`, and the columns of each format.

Every row knows its place (`data.jsonl, line 3`), which is what errors name.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import DataError, first_line, listed, reason, suggestion
from ..prompts import whole_text

COLUMNS = {"messages": ("messages",), "prompt": ("prompt", "completion"), "label": ("text", "label"), "text": ("text",)}
"""Format → the columns that it needs. The first whose columns the rows have is theirs."""


_C_LONG = 2**31 - 1
"""The most that `csv` can be told, on any system."""


class Row(NamedTuple):
    """One example as it was read, and its place: `data.jsonl, line 3`."""

    values: Mapping[str, Any]
    place: str


def read_rows(source: str, subset: str | None = None, split: str = "train") -> list[Row]:
    """All rows of a .jsonl, .csv or .parquet file, or of a split of a `datasets` name.

    Raises:
        DataError: it cannot be read; a bad line is named by its number.
    """
    path = Path(source)
    if path.suffix in SUFFIXES:
        return read_file(path, path.suffix)
    if path.is_file():
        raise DataError(f"cannot read '{source}': expected a file named {listed(SUFFIXES)}")
    return _some(_dataset(source, subset, split), source)


def read_file(path: Path, suffix: str) -> list[Row]:
    """All rows of a file, read as files with this suffix are.

    Raises:
        DataError: it cannot be read; a bad line is named by its number.
    """
    if not path.is_file():
        raise DataError(f"there is no file '{path}'")
    try:
        return _some(_READERS[suffix](path), str(path))
    except OSError as error:
        raise DataError(f"cannot read '{path}': {reason(error)}") from None


def format_of(rows: Sequence[Row], wanted: str = "auto") -> str:
    """The format of the rows: `wanted`, or the first one whose columns the rows have between them.

    Raises:
        DataError: the columns fit no format.
    """
    if wanted != "auto":
        return wanted
    columns = list(dict.fromkeys(name for row in rows for name, value in row.values.items() if value is not None))
    known = sorted({column for needed in COLUMNS.values() for column in needed})
    for column in columns:
        meant = column.strip().lower()
        if meant in known and meant not in columns:  # or its values would be left out without a word
            raise DataError(f"{rows[0].place}: there is a column '{column}'; call it '{meant}', or set data.format")
    for name, needed in COLUMNS.items():
        if set(needed) <= set(columns):
            return name
    near = next((suggestion(column, known) for column in columns if column not in known), "")
    shown = [name if name == name.strip() else f"'{name}'" for name in columns]  # a space that nobody sees
    raise DataError(
        f"{rows[0].place}: the columns {listed(shown)} are not known{near}; expected text, or prompt and completion, "
        "or messages, or text and label"
    )


def contents_of(rows: Sequence[Row], kind: str) -> dict[str, Any]:
    """What tells rows of a format from others: `rows`, how many; `sha256` of their values; `labels`, where they have some."""
    digest = hashlib.sha256()
    for row in rows:
        values = [row.values.get(column) for column in COLUMNS[kind]]
        digest.update(json.dumps(values, sort_keys=True, default=str).encode())
    labels = {"labels": sorted({str(row.values.get("label")) for row in rows})} if kind == "label" else {}
    return {"rows": len(rows), **labels, "sha256": digest.hexdigest()}


def hold_out(rows: Sequence[Row], part: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(training, held out): drawn at random by `seed`, at least one row each.

    Raises:
        DataError: there are fewer than two rows.
    """
    if len(rows) < 2:
        raise DataError(f"{rows[0].place}: a single row cannot be divided; set data.evaluation, or data.hold_out to 0")
    count = min(max(1, round(part * len(rows))), len(rows) - 1)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    held = set(order[:count])
    return [row for n, row in enumerate(rows) if n not in held], [row for n, row in enumerate(rows) if n in held]


def classes_of(rows: Iterable[Row]) -> list[str]:
    """The labels of the rows, sorted: numbers by size.

    Raises:
        DataError: a label is missing or of another kind, or all are the same.
    """
    found = list(dict.fromkeys(map(label_of, rows)))
    if len(found) < 2:
        raise DataError(f"all rows to train on have the label '{found[0]}', so there is nothing to tell apart")
    with suppress(ValueError):
        numbers = {label: float(label) for label in found}
        if all(map(math.isfinite, numbers.values())):
            return sorted(found, key=lambda label: (numbers[label], label))
    return sorted(found)


def text_of(row: Row, column: str = "text", may_be_empty: bool = False) -> str:
    """A row's text.

    Raises:
        DataError: it is missing, empty, or not text.
    """
    value = row.values.get(column)
    if not isinstance(value, str) or not (may_be_empty or value.strip()):
        what = "is missing" if value is None else "is empty" if isinstance(value, str) else f"is {value!r}, not text"
        raise DataError(f"{row.place}: '{column}' {what}")
    return whole_text(value, row.place)


def label_of(row: Row) -> str:
    """A row's label as text.

    Raises:
        DataError: it is missing, or neither text nor a whole number.
    """
    value = row.values.get("label")
    if isinstance(value, bool) or (isinstance(value, (int, str)) and str(value).strip()):
        return whole_text(str(value).strip(), row.place)
    what = "is missing" if value is None or value == "" else f"is {value!r}; expected text or a whole number"
    raise DataError(f"{row.place}: 'label' {what}")


def messages_of(row: Row) -> list[dict[str, Any]]:
    """A row's conversation.

    Raises:
        DataError: it is not a list of messages with role and content.
    """
    messages = row.values.get("messages")
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{row.place}: 'messages' must be a list of messages with role and content")
    for number, message in enumerate(messages, start=1):
        named = message if isinstance(message, Mapping) else {}
        if not (isinstance(named.get("role"), str) and isinstance(named.get("content"), str)):
            raise DataError(f"{row.place}: message {number} must have role and content, both text")
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _some(rows: Iterator[Row], source: str) -> list[Row]:
    found = list(rows)
    if not found:
        raise DataError(f"'{source}' has no rows")
    return found


def _jsonl(path: Path) -> Iterator[Row]:
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            values = json.loads(line.decode())  # of bytes, it would take other encodings, too, but not of each line
        except UnicodeDecodeError:
            raise DataError(f"{place} is not UTF-8; save the file as UTF-8") from None
        except ValueError as error:
            raise DataError(f"{place} is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise DataError(f"{place}: expected an object with named values, got {type(values).__name__}")
        yield Row(values, place)


def _csv(path: Path) -> Iterator[Row]:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, line {data[: error.start].count(10) + 1} is not UTF-8; save the file as UTF-8"
        ) from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)  # lines end at \n, \r or \r\n only
    start = 1
    longest = csv.field_size_limit(min(max(len(text), 1 << 17), _C_LONG))
    try:
        names = next(reader, [])
        if not names or len(set(names)) < len(names):
            raise DataError(
                f"{path}, line 1: expected column names, each of them once; got {listed(names) or 'nothing'}"
            )
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
    finally:
        csv.field_size_limit(longest)


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError('reading .parquet needs pyarrow: pip install "peft-core[train]"') from None
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"cannot read '{path}' as parquet: {first_line(error)}") from None
    classes = _classes(table.schema.metadata or {})
    for number, values in enumerate(table.to_pylist(), start=1):
        yield Row({**values, **_class_names(values, classes)}, f"{path}, row {number}")


def _classes(metadata: Mapping[bytes, bytes]) -> dict[str, Sequence[str]]:
    """Column → the names of its classes, as `datasets` writes them into a .parquet file."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        kinds = {column: kind for column, kind in features.items() if kind.get("_type") == "ClassLabel"}
        return {column: [str(name) for name in kind["names"]] for column, kind in kinds.items()}
    except (ValueError, LookupError, TypeError, AttributeError):  # somebody else's, or of another version
        return {}


def _class_names(values: Mapping[str, Any], classes: Mapping[str, Sequence[str]]) -> dict[str, str | None]:
    """Of a row, the names of the classes that it holds the numbers of; -1 stands for none. What is no number of one stays."""
    numbers = {column: values.get(column) for column in classes}
    return {
        column: classes[column][number] if number >= 0 else None
        for column, number in numbers.items()
        if isinstance(number, int) and -1 <= number < len(classes[column])
    }


def _dataset(name: str, subset: str | None, split: str) -> Iterator[Row]:
    if Path(name, "state.json").is_file():
        raise DataError(f"'{name}' was written by save_to_disk; write it with to_parquet, and give that .parquet file")
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"'{name}' is not a file, and reading a dataset by name needs datasets: pip install \"peft-core[train]\""
        ) from None
    try:
        found = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # its errors are of many kinds
        raise DataError(f"'{name}' is not a data file, and datasets cannot load it: {first_line(error)}") from None
    classes = {column: kind.names for column, kind in found.features.items() if isinstance(kind, datasets.ClassLabel)}
    for number, values in enumerate(found, start=1):
        yield Row({**values, **_class_names(values, classes)}, f"{name} ({split}), row {number}")


_READERS = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
SUFFIXES = tuple(_READERS)
"""Suffixes of the data files that can be read."""
