"""The reports as tables, for people."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from peft_core.errors import size

from .reports import LoraReport, MergeReport, OnnxReport, VerifyReport
from .verdict import limits, remarks


def merge_table(report: MergeReport) -> Table:
    """What `merge` did."""
    files = "1 file" if len(report.files) == 1 else f"{len(report.files)} files"
    rows = {
        "output": report.out,
        "adapters": ", ".join(
            f"{path} × {weight:g}" if weight != 1.0 else path for path, weight in report.adapters.items()
        ),
        "tensors": f"{report.tensors}: {report.merged} merged, {report.trained} trained in full, {report.copied} as they were",
        "size": f"{size(report.bytes)} in {files}, {report.dtype}",
        "time": f"{report.seconds:.1f} s, {size(report.bytes / max(report.seconds, 1e-9))} per second",
    }
    if report.left_out:
        rows["left out"] = f"{', '.join(report.left_out)} (weights from before)"
    return _table("Merged", rows, report.notes)


def lora_table(report: LoraReport) -> Table:
    """What `export lora` did, with the layers whose factors are not exact, the worst first."""
    rows = {
        "output": report.out,
        "layers": f"{len(report.sites)}, rank {report.rank}",
        "size": f"{size(report.bytes)}, {report.dtype}",
        "error": f"up to {report.worst.error:.2e} of ‖ΔW‖ ({report.worst.path}), by {' and '.join(report.losses)}"
        if report.worst.error
        else "none: the factors are exact",
        "time": f"{report.seconds:.1f} s",
    }
    if report.problems:
        rows["cannot be served"] = "; ".join(report.problems)
    table = _table("Lowered to LoRA", rows, report.notes)
    for site in sorted(report.sites, key=lambda site: -site.error):
        if site.error:
            table.add_row(site.path, f"rank {site.rank}, error {site.error:.2e}")
    return table


def onnx_table(report: OnnxReport) -> Table:
    """What `export onnx` did."""
    rows = {
        "output": report.out,
        "files": f"{', '.join(report.files)}: {size(report.bytes)}",
        "weights": f"{report.weights:,}, {report.precision}" + (f": {report.blocks}" if report.blocks else ""),
        "time": f"{report.seconds:.1f} s, {size(report.peak_memory)} of memory at most",
    }
    return _table("Exported to ONNX", rows, report.notes)


def verify_table(report: VerifyReport) -> Table:
    """A row for each prompt."""
    verdict = "passed" if report.ok else "FAILED"
    title = f"{report.export} against {report.against}, {report.dtype}: {verdict} ({limits(report)})"
    caption = escape(" ".join(remarks(report))) or None
    table = Table(title=escape(title), title_justify="left", caption=caption, caption_justify="left")
    ways = ("computed",) if report.kind == "onnx" else ()
    for heading in ("prompt", *ways, "positions", "mean KL", "max KL", "max logit difference", "same first choice"):
        table.add_column(heading, justify="left" if heading in ("prompt", *ways) else "right")
    for found in report.prompts:
        table.add_row(
            escape(" ".join(found.prompt.split())[:40]),
            *([found.way] if ways else []),
            str(found.positions),
            f"{found.mean_kl:.1e}",
            f"{found.max_kl:.1e}",
            f"{found.difference:.1e}",
            f"{100 * found.agreement:.0f} %",
        )
    return table


def _table(title: str, rows: dict[str, str], notes: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    for label, value in rows.items():
        table.add_row(label, escape(value))
    for note in notes:
        table.add_row("note", escape(note))
    return table
