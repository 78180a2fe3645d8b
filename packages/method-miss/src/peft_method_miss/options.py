"""The options of MiSS."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator


class MissOptions(BaseModel):
    """Options of MiSS (arXiv 2409.15371)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    variant: Literal["efficient", "expand"] = Field(
        default="efficient", description="efficient: input shards share (the paper's MiSSᵉ); expand: output shards share."
    )
    r: PositiveInt = Field(default=64, description="Number of shards: the rank of ΔW.")
    layout: Literal["interleaved", "contiguous"] = Field(
        default="interleaved",
        description="efficient: column j belongs to shard j mod r (as the authors' code does), or shards are runs of columns.",
    )
    alpha: PositiveFloat | None = Field(default=None, description="Scale alpha/r of ΔW; null: 1, as in the paper.")
    sizes: tuple[PositiveInt, ...] | None = Field(
        default=None, description="expand: lengths of the r output shards, which sum to out; null: as equal as possible."
    )

    @model_validator(mode="after")
    def _fitting(self) -> MissOptions:
        if self.sizes is not None and self.variant != "expand":
            raise ValueError("sizes belongs to variant 'expand'")
        if self.sizes is not None and len(self.sizes) != self.r:
            raise ValueError(f"sizes names {len(self.sizes)} shards, r is {self.r}")
        if self.layout == "contiguous" and self.variant == "expand":
            raise ValueError("layout belongs to variant 'efficient'")
        return self

    @property
    def scale(self) -> float:
        """What ΔW is multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / self.r
