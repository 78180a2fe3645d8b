"""Original weights, kept so that what was changed can be undone bit for bit: in memory, in files, or not at all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import safetensors.torch
import torch
from torch import Tensor

from .errors import MergeError, suggestion

CHOICES = ("host", "none")


@dataclass(frozen=True)
class KeptFile:
    """A weight that is kept in a file."""

    path: Path


Kept: TypeAlias = Tensor | KeptFile | None
"""A weight that was put aside; None: it was not kept."""


def check_choice(keep: str | Path) -> None:
    """Refuse what cannot be meant as a place for originals.

    Raises:
        MergeError: a file, or what looks like a misspelt choice and would otherwise be the name of a new directory.
    """
    if str(keep) in CHOICES or (str(keep) and Path(keep).is_dir()):
        return
    meant = suggestion(str(keep), CHOICES) if str(keep).isalpha() else ""
    if meant or Path(keep).exists():
        raise MergeError(f"keep='{keep}': expected 'host' (memory), 'none' or a directory{meant}")


def put_aside(weight: Tensor, name: str, keep: str | Path) -> Kept:
    """A copy of a weight where `keep` says: `host` (memory), `none`, or a directory, in a file of this name.

    Raises:
        MergeError: the directory cannot be written, or keeps another weight of this name already.
    """
    if keep == "none":
        return None
    if keep == "host":
        return weight.detach().cpu().clone()
    file = KeptFile(Path(keep) / f"{name}.safetensors")
    weight = weight.detach().cpu().contiguous()
    if file.path.exists():
        if torch.equal(look_up(file), weight):
            return file
        raise MergeError(f"keep='{keep}': '{file.path}' is an original of another model; choose a directory of its own")
    try:
        file.path.parent.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file({"weight": weight}, file.path)
    except (OSError, safetensors.SafetensorError) as error:
        raise MergeError(f"keep='{keep}': the original of '{name}' cannot be written: {error}") from None
    return file


def look_up(kept: Tensor | KeptFile) -> Tensor:
    """The weight that was put aside.

    Raises:
        MergeError: its file is gone, or damaged.
    """
    if not isinstance(kept, KeptFile):
        return kept
    try:
        return safetensors.torch.load_file(kept.path)["weight"]
    except (OSError, KeyError, safetensors.SafetensorError) as error:
        raise MergeError(f"the original weight in '{kept.path}' cannot be read: {error}") from None


def drop(kept: object) -> None:
    """What was put aside is not needed any more."""
    if isinstance(kept, KeptFile):
        kept.path.unlink(missing_ok=True)
