"""Original weights, kept so that what was changed can be undone bit for bit: in memory, in files, or not at all."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import safetensors.torch
from torch import Tensor

from .errors import MergeError, reason, suggestion

CHOICES = ("host", "none")


@dataclass(frozen=True)
class KeptFile:
    """A weight that is kept in a file. A copy of the model gets the weight itself: the file goes with its first owner."""

    path: Path

    def __deepcopy__(self, memo: dict[int, object]) -> Tensor:
        return look_up(self)


Kept: TypeAlias = Tensor | KeptFile | None
"""A weight that was put aside; None: it was not kept."""


def check_choice(keep: str | Path) -> None:
    """Refuse what cannot be meant as a place for originals.

    Raises:
        MergeError: it is a file, or a bare word that is neither a choice nor a directory that exists.
    """
    if isinstance(keep, str) and keep in CHOICES:
        return
    if isinstance(keep, str | Path) and str(keep):
        bare = isinstance(keep, str) and "/" not in keep
        if Path(keep).is_dir() or not (bare or Path(keep).exists()):
            return
    meant = suggestion(str(keep), CHOICES)
    raise MergeError(
        f"keep={str(keep)!r}: expected 'host' (memory), 'none' or a directory such as './originals'{meant}"
    )


def put_aside(weight: Tensor, name: str, keep: str | Path) -> Kept:
    """A copy of a weight where `keep` says: `host` (memory), `none`, or a directory, in a new file that begins with this name.

    Raises:
        MergeError: the directory cannot be written.
    """
    if keep == "none":
        return None
    if keep == "host":
        return weight.detach().cpu().clone()
    file = KeptFile(Path(keep).resolve() / f"{name}.{uuid.uuid4().hex[:12]}.safetensors")
    try:
        file.path.parent.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file({"weight": weight.detach().cpu().contiguous()}, file.path)
    except (OSError, safetensors.SafetensorError) as error:
        raise MergeError(f"keep='{keep}': the original of '{name}' cannot be written: {reason(error)}") from None
    return file


def check(kept: object) -> None:
    """See that a weight in a file is still there, without reading it.

    Raises:
        MergeError: its file is gone, or truncated.
    """
    if isinstance(kept, KeptFile):
        with _read(kept):
            pass


def look_up(kept: Tensor | KeptFile) -> Tensor:
    """The weight that was put aside.

    Raises:
        MergeError: its file is gone, or damaged.
    """
    if not isinstance(kept, KeptFile):
        return kept
    with _read(kept) as file:
        return file.get_tensor("weight").clone()


def drop(kept: object) -> None:
    """What was put aside is not needed any more."""
    if isinstance(kept, KeptFile):
        kept.path.unlink(missing_ok=True)


@contextmanager
def _read(kept: KeptFile) -> Iterator[Any]:
    try:
        with safetensors.safe_open(kept.path, framework="pt", device="cpu") as file:
            yield file
    except (OSError, safetensors.SafetensorError) as error:
        raise MergeError(f"the original weight in '{kept.path}' cannot be read: {reason(error)}") from None
