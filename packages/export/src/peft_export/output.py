"""Where an export goes: a directory that appears whole or not at all, never inside its inputs, and says what it is."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft_core import CheckpointError, MergeError
from peft_core.adapter_file import AdapterFile
from peft_core.errors import reason
from peft_core.files import whole_directory

MARKER = "export.json"
FOLDER = "verification"
FORMAT_VERSION = 1
# Weights in other formats and copies of them: they would be the weights from before.
_WEIGHTS = {
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
    ".onnx_data",
    ".ot",
    ".mlmodel",
}
_WEIGHT_FOLDERS = {"onnx", "openvino", "original", "coreml", "gguf", "checkpoints", FOLDER}
# Where transformers finds an adapter of Hugging Face PEFT beside a model, whose weights are left out.
_ADAPTER = "adapter_config.json"
# Where sentence-transformers says which folders are layers of the model.
_MODULES = "modules.json"


@contextmanager
def export_directory(out: str | Path, inputs: Iterable[str | Path], overwrite: bool) -> Iterator[Path]:
    """A temporary directory that becomes `out` when the block ends well.

    Raises:
        MergeError: `out` exists, or lies within an input, or an input within it. CheckpointError: it cannot be written.
    """
    target = Path(out)
    here = target.resolve()
    for source in inputs:
        there = Path(source).resolve()
        if here == there or there in here.parents:
            raise MergeError(
                f"the output '{out}' lies inside the input '{source}'; inputs are never changed: choose another directory"
            )
        if here in there.parents:
            raise MergeError(
                f"the input '{source}' lies inside the output '{out}', which would be replaced: choose another directory"
            )
    _check_replaceable(target, overwrite, "")
    with whole_directory(target, [MARKER, *_replaced(target)]) as temporary:
        yield temporary
        _check_replaceable(target, overwrite, temporary.name)  # somebody else may have written there meanwhile
        written = sorted(entry.name for entry in temporary.iterdir())
        write_json(temporary / MARKER, {**read_marker(temporary), "written": written})


def _check_replaceable(target: Path, overwrite: bool, ours: str) -> None:
    """Raises MergeError where anything but `ours` is in the way that was not to be replaced, or is no export."""
    if not target.is_dir() or all(entry.name == ours for entry in target.iterdir()):
        return
    if not overwrite:
        raise MergeError(f"the output '{target}' exists; choose another directory, or replace it with --overwrite")
    if not (target / MARKER).is_file():
        raise MergeError(
            f"the output '{target}' is not an export (it has no {MARKER}) and will not be replaced: "
            "choose another directory"
        )


def _replaced(target: Path) -> list[str]:
    """What goes when an earlier export is replaced: what was written with it, and weights, which runtimes would load beside
    the new ones. Anything else is somebody's own, and stays.
    """
    if not (target / MARKER).is_file():
        return []
    written = read_marker(target).get("written")
    return [
        entry.name
        for entry in target.iterdir()
        if written is None or entry.name in {*written, FOLDER} or entry.suffix in _WEIGHTS
    ]


def read_config(directory: Path, name: str = "config.json") -> dict[str, Any]:
    """The model's `config.json`, or another of its files; empty if there is none.

    Raises:
        CheckpointError: it is not a JSON object.
    """
    path = directory / name
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"'{path}' cannot be read: {reason(error)}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"'{path}' is not a configuration: expected a JSON object")
    return config


def edited(config: Mapping[str, Any], edits: Mapping[str, Any]) -> dict[str, Any]:
    """A model's configuration with some fields changed: where they are, in it or in its inner one; new ones in it."""
    inner = config.get("text_config")
    if not isinstance(inner, dict):
        return {**config, **edits}
    own = {name: value for name, value in edits.items() if name in config or name not in inner}
    return {**config, **own, "text_config": {name: edits.get(name, value) for name, value in inner.items()}}


def write_json(path: Path, value: Any) -> None:
    """As transformers formats its files."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def marker(
    kind: str, headers: Sequence[AdapterFile], config: Mapping[str, Any], report: Mapping[str, Any]
) -> dict[str, Any]:
    """`export.json`: what an export is, and what it was made from. `config`: how the base's configuration must change."""
    return {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "made_by": f"peft-export {importlib.metadata.version('peft-export')}",
        "architecture": headers[0].base.architecture,
        "base_fingerprint": headers[0].base.fingerprint,
        "methods": [header.method.model_dump(mode="json") for header in headers],
        "specs": [header.spec for header in headers],
        "config": dict(config),
        "report": dict(report),
    }


def read_marker(directory: str | Path) -> dict[str, Any]:
    """`export.json` of an export.

    Raises:
        CheckpointError: it is not an export, is damaged, or a newer peft-export wrote it.
    """
    path = Path(directory) / MARKER
    if not path.is_file():
        what = (
            "does not exist" if not Path(directory).exists() else f"is not an export of peft-export: it has no {MARKER}"
        )
        raise CheckpointError(f"'{directory}' {what}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        version, _ = found["format_version"], found["kind"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"'{path}' is damaged: {error!r}") from None
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CheckpointError(
            f"'{directory}' has format version {version}; this peft-export reads up to {FORMAT_VERSION}: upgrade it"
        )
    return dict(found)


def copy_rest(base: Path, out: Path, skip: Collection[str]) -> list[str]:
    """Copy what belongs to a model besides its weights: tokenizer, templates, generation config, licence, code.

    Returns:
        What was left out: weights in other formats and in folders, adapters, and links that lead nowhere.
    """
    left: list[str] = []
    parts = _parts(base)

    def copy(folder: Path, skipped: Collection[str]) -> None:
        for entry in sorted(folder.iterdir()):
            place = entry.relative_to(base)
            if entry.name in skipped or entry.name.startswith("."):
                continue
            if entry.is_dir() and place.as_posix() in parts:
                shutil.copytree(entry, out / place)
            elif entry.is_dir() and (entry.name in _WEIGHT_FOLDERS or _leads_inside(entry, base)):
                left.append(f"{place.as_posix()}/")
            elif entry.is_dir():
                (out / place).mkdir()
                copy(entry, ())
            elif (
                entry.suffix in _WEIGHTS
                or entry.name.endswith(".index.json")
                or entry.name == _ADAPTER
                or not entry.is_file()
            ):
                left.append(place.as_posix())
            else:
                shutil.copy2(entry, out / place)

    copy(base, skip)
    return left


def _leads_inside(entry: Path, base: Path) -> bool:
    """Whether this is a link to what is copied anyway, or around in a circle."""
    there, here = entry.resolve(), base.resolve()
    return entry.is_symlink() and (there.is_relative_to(here) or here.is_relative_to(there))


def _parts(base: Path) -> set[str]:
    """Folders that hold layers of the model itself, with weights that stay as they are."""
    try:
        modules = json.loads((base / _MODULES).read_text(encoding="utf-8"))
        return {str(module["path"]) for module in modules if module["path"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()
