"""What each export did: for tables, model cards, `export.json` and programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Report:
    """What all reports can do."""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True)
class MergeReport(Report):
    """What `merge` did.

    Attributes:
        merged, trained, copied: numbers of tensors: with an adapter merged in, replaced in full, and as they were.
        left_out: files of the base that were not copied, since they hold weights from before. notes: for the user.
    """

    out: str
    base: str
    adapters: Mapping[str, float]
    dtype: str
    tensors: int
    merged: int
    trained: int
    copied: int
    bytes: int
    files: tuple[str, ...]
    seconds: float
    left_out: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class LoweredSite:
    """A layer's factors: their rank before padding, and ‖ΔW − BA‖ / ‖ΔW‖ with B and A as they are stored (0: exact)."""

    path: str
    rank: int
    error: float


@dataclass(frozen=True)
class LoraReport(Report):
    """What `export_lora` did.

    Attributes:
        rank: of the adapter as written, padding included. losses: what made errors, nothing where the factors are exact.
        runtime: for which it was fitted, if any.
        command: how to start that runtime. problems: why it cannot serve the adapter.
    """

    out: str
    base: str
    adapter: str
    method: str
    rank: int
    dtype: str
    losses: tuple[str, ...]
    sites: tuple[LoweredSite, ...]
    trained: tuple[str, ...]
    bytes: int
    seconds: float
    runtime: str
    command: str
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def worst(self) -> LoweredSite:
        """The layer with the largest error."""
        return max(self.sites, key=lambda site: site.error)


@dataclass(frozen=True)
class OnnxReport(Report):
    """What `export_onnx` did.

    Attributes:
        files: the graphs and their weights. weights: how many the graphs have.
        quantized: share of the weights that is quantized, counted in elements. by_bits: the same by bits of a weight.
        peak_memory: of the whole process so far, in bytes.
    """

    out: str
    base: str
    adapters: Mapping[str, float]
    architecture: str
    precision: str
    block_size: int | None
    inputs: Mapping[str, tuple[str, ...]]
    outputs: Mapping[str, tuple[str, ...]]
    weights: int
    quantized: float
    by_bits: Mapping[int, float]
    files: tuple[str, ...]
    bytes: int
    seconds: float
    peak_memory: int
    notes: tuple[str, ...]

    @property
    def blocks(self) -> str:
        """Which weights are quantized, in words; nothing where none is."""
        parts = [f"{100 * share:.1f} % in {bits} bits" for bits, share in self.by_bits.items()]
        return f"{', '.join(parts)}, in blocks of {self.block_size}" if parts else ""


@dataclass(frozen=True)
class Comparison:
    """One prompt: KL(adapted ‖ export) of the next-token distributions, in nats, over its positions.

    Attributes:
        way: how the export computed them, where it has several ways. difference: largest absolute difference of two logits.
        agreement: share of positions with the same first choice.
    """

    prompt: str
    positions: int
    mean_kl: float
    max_kl: float
    difference: float
    agreement: float
    way: str = ""


@dataclass(frozen=True)
class Difference:
    """How far a parameter is from what it should be, ‖found − expected‖ / ‖expected‖, and what is allowed."""

    parameter: str
    relative: float
    limit: float


@dataclass(frozen=True)
class VerifyReport(Report):
    """What `verify` found.

    Attributes:
        dtype: of the export's weights. computed_in: what both models were run in.
        max_difference: see `MAX_DIFFERENCE`; None where a limit was given. generated: how many tokens were written greedily
            after the first prompt. generated_equal: how many of them, from the first on, the adapted model writes, too.
        effect: what the adapters themselves do: the mean KL divergence of the bare base, for the prompt that they change most.
            Where it is within `max_kl`, logits do not show whether an export has them. None: nothing is known of it.
        weight: of a merged export, the parameter that is farthest from what base and adapters give. None: not compared (with
            golden logits, and where a model is run in less than its files hold). shown: the weights show whether an export
            has the adapters.
        ok: all limits are kept.
    """

    export: str
    kind: str
    against: str
    dtype: str
    computed_in: str
    max_kl: float
    ok: bool
    prompts: tuple[Comparison, ...]
    seconds: float
    max_difference: float | None = None
    generated: int = 0
    generated_equal: int = 0
    effect: float | None = None
    weight: Difference | None = None
    shown: bool = False

    @property
    def mean_kl(self) -> float:
        """That of the worst prompt."""
        return max(found.mean_kl for found in self.prompts)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**super().to_json(), "mean_kl": self.mean_kl}
