"""The quickstart's data: functions and what their docstrings say, or a user's pairs, split by module."""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import textwrap
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError
from ..training.rows import read_file, text_of

# Not the library itself: tests, demos, and what is installed beside it.
_SKIPPED_FOLDERS = {
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


@dataclass(frozen=True)
class Pair:
    """A prompt and its completion; `module` is where they are from, and what a split keeps together."""

    prompt: str
    completion: str
    module: str = ""
    name: str = ""


def docstring_pairs(root: Path | None = None) -> list[Pair]:
    """Functions of Python's standard library and the first lines of their docstrings, in a fixed order.

    The prompt is the function's source without its docstring, then its signature with an opening quote: the completion
    comes next. Functions without a body of their own, first lines that are not a sentence, and repeated functions are
    left out. About 5 000 pairs, depending on the Python version.

    Raises:
        DataError: there is no library source.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    pairs: dict[str, Pair] = {}
    for path in _modules(root):
        module = path.relative_to(root).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        for pair in _module_pairs(path, module):
            pairs.setdefault(pair.prompt, pair)
    if not pairs:
        raise DataError(
            f"there are no documented functions under {root}; it should hold Python's standard library as source"
        )
    return list(pairs.values())


def read_pairs(path: Path) -> list[Pair]:
    """Pairs from a JSON Lines file with `prompt`, `completion` and, if it likes, `module` on every line.

    Raises:
        DataError: the file cannot be read, a line is not such a pair (it is named by its number), or there is only one.
    """
    pairs = []
    for row in read_file(path, ".jsonl"):
        number, module = row.place.rpartition(" ")[2], row.values.get("module")
        prompt, completion = text_of(row, "prompt", may_be_empty=True), text_of(row, "completion")
        pairs.append(Pair(prompt, completion, str(number if module is None else module), f"line {number}"))
    if len(pairs) < 2:
        raise DataError(f"'{path}' has only one pair; training and holding out need at least two")
    return pairs


def split_by_module(pairs: Sequence[Pair], percent: int = 10) -> tuple[list[Pair], list[Pair]]:
    """(training, held out): up to `percent` % of the pairs held out, by whole top-level modules.

    Modules are taken in the order of a hash of their names while they fit: none is in both parts, no large one makes up
    the held-out part alone, and the choice hardly changes when a module is added.

    Raises:
        DataError: all pairs are of one module.
    """
    sizes = Counter(map(_top, pairs))
    if len(sizes) < 2:
        raise DataError("all examples are of one module, so none could be held out; give them at least two")
    room = len(pairs) * percent // 100
    held_out: set[str] = set()
    for module in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if sizes[module] <= room:
            held_out.add(module)
            room -= sizes[module]
    held_out = held_out or {min(sizes, key=lambda name: (sizes[name], name))}
    parts: tuple[list[Pair], list[Pair]] = ([], [])
    for pair in pairs:
        parts[_top(pair) in held_out].append(pair)
    return parts


def _top(pair: Pair) -> str:
    return pair.module.partition(".")[0]


def _modules(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts):
        if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts[:-1]):
            yield path


def _module_pairs(path: Path, module: str) -> Iterator[Pair]:
    try:
        with tokenize.open(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # the library's own doubtful escapes
            text = file.read()
            tree = ast.parse(text)
    except (OSError, SyntaxError, UnicodeDecodeError):
        return  # a template or a deliberately broken file
    lines = text.split("\n")  # as ast counts them
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
            yield Pair(prompt, first, module, node.name)


def _dedented(lines: Sequence[str]) -> str:
    return textwrap.dedent("\n".join(lines)).strip()
