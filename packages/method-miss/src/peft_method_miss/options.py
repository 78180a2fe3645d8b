"""The options of MiSS."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator


class Options(BaseModel):
    """Options of MiSS (arXiv 2409.15371)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    variant: Literal["efficient", "expand", "mini", "bat"] = Field(
        default="efficient",
        description="efficient: input shards share (the paper's MiSSᵉ); expand: output shards share; "
        "mini: efficient, with a narrower matrix tiled along the output; bat: block affine in the weight.",
    )
    r: PositiveInt = Field(
        default=64,
        description="Number of shards, the rank of ΔW. bat: side of a block; must divide the layer's inputs and outputs.",
    )
    layout: Literal["interleaved", "contiguous"] = Field(
        default="interleaved",
        description="efficient and mini: column j belongs to shard j mod r (interleaved, as in the authors' code), or "
        "each shard is a run of consecutive columns (contiguous).",
    )
    alpha: PositiveFloat | None = Field(
        default=None, le=1e6, description="Scale alpha/r of ΔW; null: 1, as in the paper."
    )
    mini_r: PositiveInt | None = Field(
        default=None, description="mini: number of columns of the trained matrix; must divide the layer's outputs."
    )
    sizes: tuple[PositiveInt, ...] | None = Field(
        default=None,
        description="expand: lengths of the r output shards; must add up to the layer's outputs; null: as equal as possible.",
    )

    @model_validator(mode="after")
    def _fitting(self) -> Options:
        if self.sizes is not None and self.variant != "expand":
            raise ValueError("sizes is an option of variant 'expand'; leave it out, or set variant to 'expand'")
        if self.sizes is not None and len(self.sizes) != self.r:
            raise ValueError(
                f"sizes has {len(self.sizes)} lengths, but r is {self.r}; give one length for each of the r shards"
            )
        if self.layout == "contiguous" and self.variant in ("expand", "bat"):
            raise ValueError("layout 'contiguous' is for the variants 'efficient' and 'mini'; leave layout out")
        if self.mini_r is not None and self.variant != "mini":
            raise ValueError("mini_r is an option of variant 'mini'; leave it out, or set variant to 'mini'")
        if self.mini_r is None and self.variant == "mini":
            raise ValueError(
                "variant 'mini' needs mini_r, the number of columns of D, which must divide the layer's outputs"
            )
        return self

    @property
    def scale(self) -> float:
        """What ΔW is multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / self.r

    @property
    def interleaved(self) -> bool:
        """Whether column j belongs to shard j mod r."""
        return self.layout == "interleaved"
