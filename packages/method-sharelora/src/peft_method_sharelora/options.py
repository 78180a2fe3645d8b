"""ShareLoRA's own options."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator

Share: TypeAlias = Literal["A", "B", "AB", "none"]
"""Which factors the sites of a group have in common."""


class Options(BaseModel):
    """Options of ShareLoRA (arXiv 2406.10785)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    r: int = Field(default=16, ge=1, description="Rank of A and B.")
    alpha: float = Field(default=16.0, gt=0, le=1e6, allow_inf_nan=False, description="ΔW = (alpha/r)·B·A.")
    share: Share | dict[str, Share] = Field(
        default="A",
        description="What the sites of one module type share: A, B, AB or none (plain LoRA); or a map from "
        "pattern (name, suffix or regex for the whole path) to one of them. The last match wins; a site without a match "
        "shares nothing.",
    )
    scope: Literal["all"] | int = Field(
        default="all",
        description="How far sharing reaches: 'all' layers, or blocks of this many consecutive layers.",
    )

    # Checked before pydantic, whose message would list every branch of the unions.
    @field_validator("share", mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        choices = list(value.values()) if isinstance(value, dict) else [value]
        if not choices or any(choice not in get_args(Share) for choice in choices):
            raise ValueError("expected 'A', 'B', 'AB' or 'none', or a map from patterns to these")
        return value

    @field_validator("scope", mode="before")
    @classmethod
    def _reaching(cls, value: Any) -> Any:
        if value != "all" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError("expected 'all' or a number of consecutive layers (at least 1)")
        return value

    @property
    def scale(self) -> float:
        """What B·A is multiplied by."""
        return self.alpha / self.r
