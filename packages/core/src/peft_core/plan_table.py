"""A plan as a table."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from rich.table import Table

from .errors import size
from .sharing import TensorSpec

if TYPE_CHECKING:
    from .plan import Plan


def table_of(plan: Plan) -> Table:
    """Sites, tensors, borrowers and sizes by module type, and what undoing costs."""
    spec = plan.spec
    table = Table(title=f"Plan: {spec.method} on {plan.base.architecture}", title_justify="left")
    for heading in (
        "module type",
        "sites",
        "tensor",
        "shape",
        "tensors × borrowers",
        "trainable",
        "bytes",
        "% of base",
    ):
        table.add_column(heading, justify="left" if heading in ("module type", "tensor") else "right")
    site_types = {site.path: site.type for site in plan.sites}
    rows: dict[tuple[str, str, tuple[int, ...]], list[tuple[TensorSpec, int]]] = {}
    for group in plan.groups:
        types = sorted({site_types.get(member, f"{member} (in full)") for member in group.members})
        for name, tensor in group.tensors.items():
            rows.setdefault((", ".join(types), name, tensor.shape), []).append((tensor, len(group.members)))
    counts = Counter(site_types.values())
    previous = ""
    for (kind, name, shape), tensors in rows.items():
        numel = sum(tensor.numel for tensor, _ in tensors)
        nbytes = sum(tensor.nbytes(spec.torch_dtype) for tensor, _ in tensors)
        borrowers = sorted({count for _, count in tensors})
        span = str(borrowers[0]) if len(borrowers) == 1 else f"{borrowers[0]}–{borrowers[-1]}"
        table.add_row(
            kind if kind != previous else "",
            str(counts.get(kind, "")) if kind != previous else "",
            name,
            "×".join(map(str, shape)) or "scalar",
            f"{len(tensors)} × {span}",
            f"{numel:,}",
            size(nbytes),
            f"{100 * numel / plan.base.num_parameters:.3f}",
        )
        previous = kind
    table.add_section()
    table.add_row(
        "total",
        str(len(plan.sites)),
        "",
        "",
        str(sum(len(group.tensors) for group in plan.groups)),
        f"{plan.num_trainable:,}",
        size(plan.trainable_bytes),
        f"{100 * plan.num_trainable / plan.base.num_parameters:.3f}",
    )
    remarks = [
        f"merging keeps {size(plan.merge_bytes)} of original weights, disabling keeps {size(plan.disable_bytes)}"
    ]
    if plan.fixed_bytes:
        remarks.append(f"saved with them but never trained: {size(plan.fixed_bytes)}")
    if plan.state_bytes:
        remarks.append(f"training keeps {size(plan.state_bytes)} of state beside its parameters, on the CPU")
    table.caption = "\n".join([*remarks, *plan.notes])
    table.caption_justify = "left"
    return table
