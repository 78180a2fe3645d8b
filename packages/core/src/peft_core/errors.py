"""Errors that a user can cause, and words for their messages, which name the thing, what was expected and the remedy."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


class PeftCoreError(Exception):
    """Base of every error that a user of this library can cause. Its message is one line, whatever a user's names hold."""

    def __init__(self, message: str = "") -> None:
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message))


class SpecError(PeftCoreError):
    """An `AdapterSpec` or an option of a method is not valid."""


class PluginError(PeftCoreError):
    """A method plugin is missing, is installed twice, or breaks the hook contract."""


class TargetError(PeftCoreError):
    """The targets of a spec do not fit the model."""


class PlanError(PeftCoreError):
    """A method cannot lay out its tensors on these sites, or a stored plan does not fit the model."""


class AdapterError(PeftCoreError):
    """An adapter is used in a state that does not allow it (a name taken, merged, unknown)."""


class CheckpointError(PeftCoreError):
    """An adapter directory cannot be read, or does not belong to this model."""


class MergeError(PeftCoreError):
    """An adapter cannot be merged, unmerged or lowered."""


class OptimizerStepError(PeftCoreError):
    """The optimizer cannot serve the method, or never stepped the adapter's parameters."""


class ModelError(PeftCoreError):
    """A base model cannot be found or read."""


class DataError(PeftCoreError):
    """Training data cannot be read."""


def reason(error: Exception) -> str:
    """Why a file could not be read or written, for a message that names the file already."""
    return getattr(error, "strerror", None) or str(error)


def first_line(error: Exception) -> str:
    """What another library says, without the lines that follow: more than one only where the first ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    many = next((n for n, line in enumerate(lines, start=1) if not line.endswith(":")), len(lines))
    return " ".join(lines[:many]) or type(error).__name__


def suggestion(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the known name nearest to `name`, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""


def divisors(sizes: Iterable[int], most: int = 20) -> str:
    """`1, 2, 3, 6`: the numbers that divide all of these sizes."""
    common = math.gcd(*sizes)
    return listed([str(number) for number in range(1, common + 1) if common % number == 0], most)


def listed(names: Iterable[str], most: int = 8) -> str:
    """`a, b, c and 12 more`: a list short enough for one line of an error."""
    names = list(names)
    head = ", ".join(names[:most])
    return head if len(names) <= most else f"{head} and {len(names) - most} more"


def size(count: float) -> str:
    """Bytes for people: `1.4 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def finding(detail: ErrorDetails, known: Sequence[str] = (), noun: str = "field") -> str:
    """One of pydantic's findings, with the nearest of the known names for one that is not known."""
    place = ".".join(map(str, detail["loc"]))
    if detail["type"] == "extra_forbidden":
        return f"'{place}' is not a {noun}{suggestion(str(detail['loc'][-1]), known)}"
    if detail["type"] == "missing":
        return f"'{place}' is required"
    message, given = detail["msg"].removeprefix("Value error, "), repr(detail["input"])
    shown = given if len(given) <= 60 else given[:57] + "..."
    got = "" if isinstance(detail["input"], dict) else f" (got {shown})"
    return f"'{place}': {message}{got}" if place else message
