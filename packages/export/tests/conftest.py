"""What the tests share: tiny checkpoints and adapters of every installed method, and running the program."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from safetensors.torch import load_file

import peft_core as pc
from peft_core.testing.checks import Trial, randomise, run, trials
from peft_core.testing.families import FAMILIES, Family


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    found = trials([])
    wanted = {"trial": found, "additive": [t for t in found if not t.can.exclusive]}
    wanted["exclusive"] = [t for t in found if t.can.exclusive]
    wanted["exact"] = [t for t in found if t.can.lowrank]
    wanted["inexact"] = [t for t in found if not t.can.lowrank]
    # One of each method is enough where the method's arithmetic is not the point.
    firsts = list({trial.method: trial for trial in reversed(found)}.values())
    wanted["method"] = firsts
    wanted["quantizable"] = [t for t in firsts if not t.can.owns_base_weight]
    # And for what knows no method, one method.
    wanted["any_method"] = [next((t for t in found if not t.can.exclusive), found[0])]
    for name, values in wanted.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values, ids=str)


@dataclass
class Made:
    """A base checkpoint, an adapter of it, and the adapted model."""

    family: Family
    base: Path
    adapter: Path
    model: nn.Module
    handle: pc.Adapter

    def output(self, model: nn.Module | None = None) -> Tensor:
        """The (adapted) model's output for the family's inputs."""
        return run(self.family, self.model if model is None else model)

    def merged_in_memory(self, directory: Path) -> dict[str, Tensor]:
        """What merging in memory and saving gives."""
        self.handle.merge_and_detach()
        self.model.save_pretrained(directory)
        return tensors(directory)


def tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint directory."""
    out: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        out.update(load_file(path))
    return out


def hashes(directory: Path) -> dict[str, str]:
    """Every file's hash."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Made]]:
    """Makes a base, an adapter and its model. That no test changed the inputs is checked in the end."""
    watched: list[tuple[Path, dict[str, str]]] = []

    def made(
        trial: Trial,
        family: str = "llama",
        dtype: torch.dtype = torch.float32,
        name: str = "adapter",
        model: nn.Module | None = None,
        base: Path | None = None,
        seed: int = 0,
        shards: str = "5GB",
        spec: dict[str, Any] | None = None,
        **fields: Any,
    ) -> Made:
        kind = FAMILIES[family]
        model = kind.build(dtype=dtype) if model is None else model
        if base is None:
            base = tmp_path / ("base" if name == "adapter" else f"base-{name}")
            model.save_pretrained(base, max_shard_size=shards)
            watched.append((base, hashes(base)))
        handle = randomise(pc.attach(model, trial.spec(kind, **fields, **(spec or {})), name=name), seed)
        handle.save(tmp_path / name)
        watched.append((tmp_path / name, hashes(tmp_path / name)))
        return Made(kind, base, tmp_path / name, model, handle)

    yield made
    for directory, before in watched:
        assert hashes(directory) == before, f"the input {directory} was changed"


@pytest.fixture
def lone() -> Trial:
    """A trial of a method that can adapt a single layer, and does not own its weight."""
    model = FAMILIES["llama"].build_meta()
    for trial in trials([]):
        with contextlib.suppress(pc.PlanError):
            pc.plan(model, trial.spec(FAMILIES["llama"], targets=["lm_head"]))
            if not trial.can.exclusive:
                return trial
    pytest.skip("no installed method adapts a single layer")


@pytest.fixture
def fails(program: Callable[..., Any]) -> Callable[..., str]:
    """Runs the program, which must say one line and exit with status 2. Returns the line."""

    def run(*arguments: object) -> str:
        code, out, err = program(*arguments)
        lines = [line for line in err.splitlines() if line.strip()]
        assert code == 2, (code, out, err)
        assert not out
        assert len(lines) == 1 and lines[0].startswith("peft-core: "), err
        return lines[0]

    return run
