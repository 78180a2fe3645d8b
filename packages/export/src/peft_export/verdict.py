"""What a right export keeps to, and a comparison in words."""

from __future__ import annotations

from collections.abc import Mapping

from .reports import VerifyReport

MAX_KL: Mapping[str, float] = {
    "float64": 1e-6,
    "float32": 1e-6,
    "float16": 1e-4,
    "bfloat16": 1e-3,
    # ONNX's
    "fp32": 1e-6,
    "fp16": 1e-3,
    "int8": 1e-2,
    "int4": 0.5,
}
"""By precision of the export: the mean KL divergence, in nats per token, beyond which it fails.

Found by measuring: a right export of SmolLM2-135M is at 1e-11, 1e-6 and 7e-5 in float32, float16 and bfloat16; one whose
adapter was merged with weight 0.95 is at 4e-3.
"""
MAX_KL_ROUGH = 1e-2
"""At least that, where more is rounded than the weights: models computed in 16 bits, and factors by truncated SVD."""
MAX_DIFFERENCE: Mapping[str, float] = {"fp32": 1e-3}
"""By precision, where nothing is rounded: the difference of two logits beyond which it fails. Greedy tokens are equal, too."""
# A limit beyond this lets a model pass that often chooses otherwise.
_WIDE = 0.1


def card_lines(report: VerifyReport) -> list[str]:
    """The section on verification in an export's model card."""
    rows = []
    for found in report.prompts:
        prompt = " ".join(found.prompt.split())[:40].replace("|", "/")
        figures = f"{found.mean_kl:.1e} | {found.max_kl:.1e} | {found.difference:.1e} | {100 * found.agreement:.0f} %"
        rows.append(f"| {prompt}{f', {found.way}' if found.way else ''} | {found.positions} | {figures} |")
    verdict = "passed" if report.ok else "FAILED"
    how = f"{report.dtype} weights, compared with the adapted model in {report.computed_in}"
    return [
        f"{how}: {verdict} ({limits(report)}).",
        "",
        "| prompt | positions | mean KL | max KL | max logit difference | same first choice |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        *(line for remark in remarks(report) for line in (remark, "")),
        "The logits of the adapted model are in `verification/`: `peft-core verify THIS` compares with them elsewhere.",
    ]


def limits(report: VerifyReport) -> str:
    """What an export had to keep to."""
    parts = [f"mean KL ≤ {report.max_kl:g} nats"]
    if report.max_difference is not None:
        parts.append(f"logits within {report.max_difference:g}")
        parts += ["greedy tokens equal"] * bool(report.generated)
    return ", ".join(parts)


def remarks(report: VerifyReport) -> list[str]:
    """How long the greedy continuation of the first prompt is the adapted model's; warnings where the limit shows little."""
    found = []
    if (weight := report.weight) is not None:
        off = f"off by {weight.relative:.1e} of its size, where {weight.limit:.0e} is allowed"
        found.append(
            "Every weight is what base and adapter give, rounded once."
            if weight.relative <= weight.limit
            else f"'{weight.parameter}' is {off}: not what base and adapter give, or this is not the base that was merged into."
        )
    if report.effect is not None and report.effect <= report.max_kl and not report.shown:
        found.append(
            f"The adapter itself changes these prompts by no more than {report.effect:.1e} nats, so that an export without it "
            "would pass, too: give prompts of its task (--prompt), or a smaller --max-kl."
        )
    if report.generated:
        found.append(f"Greedy tokens after the first prompt: {report.generated_equal} of {report.generated} equal.")
    if MAX_KL.get(report.dtype, 0.0) > _WIDE:
        shares = [100 * comparison.agreement for comparison in report.prompts]
        found.append(
            f"{report.dtype} is coarse: the first choice is the adapted model's at {min(shares):.0f} to {max(shares):.0f} % of "
            "the positions. Check the quality on your task, or take more bits."
        )
    return found
