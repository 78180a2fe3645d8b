"""MoS's own options."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class RandomScaling(BaseModel):
    """A fixed factor N(mean, std)/mean between A and B, for each rank of each site."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: float = Field(
        default=1.0,
        allow_inf_nan=False,
        description="Mean of the normal distribution; its absolute value at least 0.001.",
    )
    std: float = Field(default=0.5, ge=0, allow_inf_nan=False, description="Its standard deviation.")

    @model_validator(mode="after")
    def _divisible(self) -> RandomScaling:
        if abs(self.mean) < 1e-3:
            raise ValueError(
                f"mean {self.mean:g} is too close to 0, as factors are divided by it; use an absolute value ≥ 0.001"
            )
        return self


def _switched(value: Any) -> Any:
    """Accepts `true` and `false`, as the other strategies do."""
    return ({} if value else None) if isinstance(value, bool) else value


class Options(BaseModel):
    """Options of MoS (arXiv 2410.00938)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    r: int = Field(default=16, ge=1, description="Rank of every site.")
    equivalent_rank: int = Field(
        default=2,
        ge=1,
        description="Budget e: the pools have as many parameters as LoRA of this rank, whatever the other options.",
    )
    shards: int = Field(
        default=4, ge=1, description="Pieces l that make up a row of A or a column of B; 1: whole rows."
    )
    private_rank: int = Field(
        default=1, ge=0, description="Number p of a site's ranks whose shards no other site uses."
    )
    alpha: float = Field(default=16.0, gt=0, le=1e6, allow_inf_nan=False, description="ΔW = (alpha/r)·B·A.")
    subset_selection: bool = Field(
        default=True,
        description="Every site draws its own shards. Off: pure sharing; every site uses the whole pool in order, so that "
        "r = L·equivalent_rank, shards = 1 and private_rank = 0.",
    )
    pair_dissociation: bool = Field(
        default=True,
        description="A and B of a site draw their public shards independently. Off: both use the same indices.",
    )
    random_scaling: Annotated[RandomScaling | None, BeforeValidator(_switched)] = Field(
        default=None,
        description="Fixed random factors between A and B, one per rank and site: {mean, std} or true; null: none.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Options:
        if not self.subset_selection:
            return self
        e, r, p = self.equivalent_rank, self.r, self.private_rank
        if e > r:
            raise ValueError(
                f"equivalent_rank {e} is greater than r {r}, so part of the pools would never be used; set r ≥ {e}"
            )
        if p > e:
            raise ValueError(
                f"private_rank {p} is greater than the budget, equivalent_rank {e}; set private_rank ≤ {e}"
            )
        if p == e < r:
            raise ValueError(
                f"private_rank {p} = equivalent_rank leaves no public shards, of which r {r} needs some; "
                f"set private_rank ≤ {e - 1} or r = {e}"
            )
        return self
