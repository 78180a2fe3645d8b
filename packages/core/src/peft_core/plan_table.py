"""Sites and sharing groups as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from rich.markup import escape
from rich.table import Table

from .errors import size
from .sharing import SharingGroup, TensorSpec
from .sites import Site

HEADINGS = ("module type", "sites", "tensor", "shape", "tensors × borrowers", "trainable", "bytes", "% of base")


def table_of(
    title: str,
    sites: Sequence[Site],
    groups: Sequence[SharingGroup],
    dtype: torch.dtype,
    base_parameters: int,
    remarks: Sequence[str],
) -> Table:
    """Tensors, borrowers and sizes by module type.

    Args:
        dtype: of tensors that name none of their own. base_parameters: what the shares are taken of. remarks: stand below.
    """
    caption = escape("\n".join(remarks))
    table = Table(title=escape(title), title_justify="left", caption=caption, caption_justify="left")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in ("module type", "tensor") else "right")
    site_types = {site.path: site.type for site in sites}
    rows: dict[tuple[str, str, tuple[int, ...]], list[tuple[TensorSpec, int]]] = {}
    for group in groups:
        types = sorted({site_types.get(member, f"{member} (in full)") for member in group.members})
        for name, tensor in group.tensors.items():
            rows.setdefault((", ".join(types), name, tensor.shape), []).append((tensor, len(group.members)))
    counts = Counter(site_types.values())
    previous = ""
    for (kind, name, shape), found in rows.items():
        borrowers = sorted({count for _, count in found})
        span = str(borrowers[0]) if len(borrowers) == 1 else f"{borrowers[0]}–{borrowers[-1]}"
        table.add_row(
            escape(kind) if kind != previous else "",
            str(counts.get(kind, "")) if kind != previous else "",
            escape(name),
            "×".join(map(str, shape)) or "scalar",
            f"{len(found)} × {span}",
            *_sizes([tensor for tensor, _ in found], dtype, base_parameters),
        )
        previous = kind
    table.add_section()
    tensors = [tensor for found in rows.values() for tensor, _ in found]
    table.add_row("total", str(len(sites)), "", "", str(len(tensors)), *_sizes(tensors, dtype, base_parameters))
    return table


def _sizes(tensors: Sequence[TensorSpec], dtype: torch.dtype, base_parameters: int) -> tuple[str, str, str]:
    """Numbers, bytes and percent of the base."""
    numel = sum(tensor.numel for tensor in tensors)
    return f"{numel:,}", size(sum(t.nbytes(dtype) for t in tensors)), f"{100 * numel / base_parameters:.3f}"
