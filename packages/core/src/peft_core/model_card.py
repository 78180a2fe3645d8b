"""The model card of an adapter directory."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

from .adapter_file import AdapterFile
from .dtypes import dtype_of
from .errors import listed
from .sites import count_types


def hub_name(header: AdapterFile) -> str:
    """The base's name on a hub as it was recorded; nothing if it is a path."""
    name = header.base.name
    return name if re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) and not Path(name).exists() else ""


def model_card(header: AdapterFile) -> str:
    """README.md of an adapter directory, with the front matter that model hubs read."""
    size = sum(math.prod(s.shape) * dtype_of(s.dtype).itemsize for s in header.tensors.values())
    front = ["---", "library_name: peft-core", "tags:", "- peft-core", f"- {header.method.name}"]
    if name := hub_name(header):
        front.insert(1, f"base_model: {name}")
    package = header.method.distribution or f"peft-method-{header.method.name}"
    return "\n".join(
        [
            *front,
            "---",
            "",
            f"# {header.method.name} adapter",
            "",
            f"Trained with peft-core and `{package}` {header.method.version} on a "
            f"`{header.base.architecture}`" + (f" (`{header.base.name}`)." if header.base.name else "."),
            "",
            f"- Trainable parameters: {header.num_trainable:,} "
            f"({100 * header.num_trainable / header.base.num_parameters:.3f} % of the base)",
            f"- Tensors: {len(header.tensors)}, {size:,} bytes",
            f"- Adapted layers: {listed(count_types(site.path for site in header.sites), 20)}",
            *([f"- Trained in full: {', '.join(header.trained)}"] if header.trained else []),
            *([f"- Optimizer steps: {header.steps}"] if header.steps else []),
            "",
            "```python",
            f"# pip install peft-core {package}",
            "import peft_core as pc",
            "",
            "adapter = pc.load(base_model, 'path/to/this/directory')",
            "```",
            "",
            "```json",
            json.dumps(header.spec, indent=2),
            "```",
            "",
        ]
    )
