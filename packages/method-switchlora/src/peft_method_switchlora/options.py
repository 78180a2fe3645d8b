"""SwitchLoRA's options, and the numbers that follow from them."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

GAIN = 1 / math.sqrt(3)  # of a leaky ReLU with slope √5, which PyTorch's default initialisation assumes


class Options(BaseModel):
    """Options of SwitchLoRA (arXiv 2406.06564)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    r: int = Field(
        default=128, gt=0, description="Rank: number of columns of B and rows of A that are trained at a time."
    )
    alpha: float = Field(default=1.0, gt=0, le=1e6, description="ΔW = (alpha/r)·B·A; the initialisation assumes 1.")
    interval: float = Field(
        default=40,
        gt=0,
        description="Steps from one switch of a vector to its next at the start of the run; ≥ 2·freeze_steps.",
    )
    ratio: float = Field(
        default=0.1,
        gt=0,
        description="After this fraction of the run, the switching rate is 0.3 times the initial one.",
    )
    total_steps: int | None = Field(
        default=None, gt=0, description="Length of the run in optimizer steps; null: set by the trainer."
    )
    freeze_steps: int = Field(
        default=5, ge=0, description="Steps for which the counterpart of a switched vector does not move."
    )
    order: Literal["consecutive", "random"] = Field(
        default="consecutive", description="Which candidate comes next: the following one, or a random free one."
    )
    offload_candidates: bool = Field(
        default=True, description="Keep the candidates in main memory instead of on the accelerator."
    )
    weight_master: Literal["none", "float32"] | None = Field(
        default=None,
        description="float32: keep a float32 copy of W for the exchanges; null: float32 for 16-bit bases, else none.",
    )

    @model_validator(mode="after")
    def _thawed_in_time(self) -> Options:
        if self.interval < 2 * self.freeze_steps:
            raise ValueError(
                f"interval must be at least 2·freeze_steps = {2 * self.freeze_steps}, "
                "or a vector's turn comes while its counterpart is frozen"
            )
        return self

    @property
    def scale(self) -> float:
        """What B·A is multiplied by."""
        return self.alpha / self.r

    def expected_switches(self, step: int, total_steps: int) -> float:
        """Mean number of columns of B, and of rows of A, that a site switches at a step (from 0)."""
        interval = self.interval / max(0.3 ** ((step + 1) / (self.ratio * total_steps)), 1e-8)
        return self.r / interval

    def keeps_master(self, dtype: torch.dtype) -> bool:
        """Whether a base weight of this dtype gets a float32 master."""
        wanted = dtype.itemsize < 4 if self.weight_master is None else self.weight_master == "float32"
        return wanted and dtype.itemsize < 4


def initial_stds(out_features: int, in_features: int, r: int) -> tuple[float, float]:
    """Standard deviations at which A's rows and B's columns start, candidates included (arXiv 2406.06564).

    With alpha = 1, (alpha/r)·B·A then has the standard deviation of a freshly initialised W.
    """
    m, n = out_features, in_features
    std_A = (math.sqrt(m) * r / (n * math.sqrt(n))) ** 0.25 * math.sqrt(GAIN)
    std_B = (r / math.sqrt(m * n)) ** 0.25 * math.sqrt(GAIN)
    return std_A, std_B
