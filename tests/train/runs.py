"""Data for runs, and RUN.yaml files beside them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from peft_core.training.config import RunConfig
from peft_core.training.report import TrainReport
from peft_core.training.run import train

CHAT = (
    "<s>{% for message in messages %}[{{ message.role }}] {{ message.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def words(*numbers: int) -> str:
    """A text of these words of the tiny models."""
    return " ".join(f"w{number % 50}" for number in numbers)


PAIRS = [{"prompt": words(n, n + 1), "completion": " " + words(20 + n % 3, 30)} for n in range(24)]
TEXTS = [{"text": words(*range(n, n + 3 + n % 4))} for n in range(24)]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": words(n)},
            {"role": "assistant", "content": words(n, n + 1)},
            {"role": "user", "content": words(n + 2)},
            {"role": "assistant", "content": words(n + 3)},
        ]
    }
    for n in range(24)
]
LABELLED = [{"text": words(*range(n, n + 4), 40 + n % 2), "label": ["no", "yes"][n % 2]} for n in range(24)]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A file of these rows, in the format of its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join(f'"{value}"' for value in row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def run_file(folder: Path, base: Path, data: Any = "data.jsonl", method: str = "sound", **changed: Any) -> Path:
    """A RUN.yaml beside its data; keyword arguments `training_…`, `adapter` and others change it."""
    config: dict[str, Any] = {
        "model": str(base),
        "data": data,
        "adapter": {"method": method},
        "training": {"steps": 3, "batch_size": 4, "lr": 0.01},
        "output_dir": "out",
    }
    config["training"].update(changed.pop("training", {}))
    config.update(changed)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "RUN.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def started(path: Path, resume: bool = False) -> TrainReport:
    """What `peft-core train` does with this RUN.yaml."""
    return train(RunConfig.from_file(path), resume)
