"""Names of dtypes as they stand in files: `float32`."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import AfterValidator


def name_of(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """torch.float32 for `float32`.

    Raises:
        ValueError: torch has no such dtype.
    """
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"'{name}' is not a dtype")
    return found


DtypeName = Annotated[str, AfterValidator(lambda name: name_of(dtype_of(name)))]
"""In a pydantic model: the name of a dtype."""
