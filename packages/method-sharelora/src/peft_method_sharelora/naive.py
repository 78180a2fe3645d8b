"""ShareLoRA's mathematics, readable: LoRA with factors that layers may share (arXiv 2406.10785, section 3).

Who owns A and B is the layout's business; at a site they are simply there.
"""

from __future__ import annotations

from torch import Tensor

from peft_core import lowrank
from peft_core.method import Tensors


def delta(x: Tensor, tensors: Tensors, scale: float) -> Tensor:
    """Δ(x) = s·B·A·x, x [..., in] → [..., out], with A [r, in] and B [out, r]."""
    return lowrank.naive(x, tensors["A"], tensors["B"], scale)
