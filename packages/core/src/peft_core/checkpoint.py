"""The checkpoint directory of an adapter: plain files, tensors only, written whole or not at all, read strictly.

adapter.json         format version, spec, method, base, sites, groups (`AdapterFile`)
adapter.safetensors  `{group}.{tensor}` once per tensor, trained or fixed, `binding/{site}.{name}`, `base_weight/{site}`
state.safetensors    what only resuming needs, where the method has such state
README.md            the model card
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from . import files
from .adapter_file import HEADER, AdapterFile, describe, owned_key, read_header
from .bank import Bank
from .base_model import BaseInfo, base_info
from .dtypes import name_of
from .errors import AdapterError, CheckpointError
from .matching import check_fit, check_layout
from .model_card import model_card
from .optim import check_stepped
from .plan import Plan
from .sharded import sharded_like, whole

TENSORS, STATE, CARD = "adapter.safetensors", "state.safetensors", "README.md"


def save(bank: Bank, directory: str | Path) -> None:
    """Write an attached adapter. Other files in the directory stay; an adapter that stood there is replaced in one step.

    Raises:
        CheckpointError: the directory cannot be written, a module trained in full was resized since, a tensor is on the meta
            device or holds NaN, or the adapter was loaded without its training state, which is there. What was there is unchanged
            then.
        OptimizerStepError: the method needs optimizer steps, gradients came, and no step was seen.
        AdapterError: it owns base weights, and was merged without keeping them.
    """
    check_stepped(bank)
    _refuse_resized(bank)
    _refuse_to_lose_state(bank, Path(directory))
    tensors = _values(bank)
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return  # sharded tensors have been gathered with the others; one process writes
    _refuse_not_finite(tensors, f"adapter '{bank.name}'", "; nothing was written")
    base = base_info(bank.root, bank.plan.spec.base_model)  # as it is now: its embeddings may have been resized
    try:
        bank.check_in_place()
    except AdapterError as error:
        warnings.warn(
            f"{error}; it is saved for the base as that was then, without what it would learn now", stacklevel=3
        )
        base = bank.plan.base
    progress = bank.progress
    write(directory, bank.plan, base, tensors, bank.state, bank.seed, progress.steps, progress.run_start)


def write(
    directory: str | Path,
    plan: Plan,
    base: BaseInfo,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    steps: int = 0,
    run_start: int = 0,
) -> None:
    """Write an adapter's values to a directory, whole or not at all; no model is needed.

    Args:
        tensors: everything that inference needs, by key. state: what only resuming needs. steps: optimizer steps so far, and
            run_start: when the latest run began.

    Raises:
        CheckpointError: the directory cannot be written; what was there is unchanged.
    """
    card = _own_card(Path(directory))
    with files.whole_directory(directory, (HEADER, TENSORS, STATE, *card)) as temporary:
        checksums = {TENSORS: files.write_tensors(temporary / TENSORS, tensors, {"format": "pt"})}
        if state:
            checksums[STATE] = files.write_tensors(temporary / STATE, state, {"format": "pt"})
        header = describe(plan, base, tensors, checksums, seed, steps, run_start)
        (temporary / HEADER).write_text(header.model_dump_json(indent=1), encoding="utf-8")
        if card:
            (temporary / CARD).write_text(model_card(header), encoding="utf-8")


def restore(bank: Bank, directory: str | Path) -> None:
    """Give an attached adapter the values of a saved one of the same layout, in place.

    Raises:
        CheckpointError: the directory is damaged, its adapter has another layout, or a tensor is on the meta device. Nothing has
            changed then.
    """
    header = read_header(directory)
    check_fit(directory, header, bank.root)
    check_layout(directory, header, bank.plan, bank.name, _values(bank))
    stored = read(directory, header)
    state = read_state(directory, header, bank.plan) if bank.state else {}
    with torch.no_grad():
        for key, parameter in bank.named_parameters():
            parameter.copy_(sharded_like(parameter, stored[key]))
        for key, buffer in bank.named_fixed():
            buffer.copy_(stored[key])
        for key, value in state.items():
            bank.state[key].copy_(value)
        for path in bank.owned:
            bank.write_owned_weight(bank.sites[path], stored[owned_key(path)])
    bank.seed, bank.progress.steps, bank.progress.run_start = header.seed, header.steps, header.run_start
    bank.progress.forget_gradients()


def _refuse_resized(bank: Bank) -> None:
    shapes = {key: tensor.shape for key, tensor in bank.plan.tensors()}
    for name, key in bank.stand_ins.items():
        if tuple(bank.root.get_parameter(name).shape) != shapes[key]:
            raise CheckpointError(
                f"'{name}' was resized or replaced after the adapter was attached, so its trained copy fits no model; "
                "resize first, then attach"
            )


def _refuse_to_lose_state(bank: Bank, directory: Path) -> None:
    if bank.plan.state_bytes and not bank.state and (directory / STATE).exists():
        raise CheckpointError(
            f"'{directory}' holds the training state that resuming needs, and adapter '{bank.name}' was loaded without its own; "
            "save it to another directory, or load it with trainable=True"
        )


def _values(bank: Bank) -> dict[str, Tensor]:
    """Everything that inference needs, by key.

    Raises:
        CheckpointError: a tensor is on the meta device.
    """
    tensors = {key: whole(parameter) for key, parameter in bank.named_parameters()}
    tensors |= bank.named_fixed()
    tensors |= {owned_key(path): bank.owned_weight(bank.sites[path]) for path in bank.owned}
    if empty := [key for key, tensor in tensors.items() if tensor.is_meta]:
        raise CheckpointError(
            f"'{empty[0]}' is on the meta device, where it can hold no values; attach to a model that has its weights"
        )
    return tensors


def read(directory: str | Path, header: AdapterFile) -> dict[str, Tensor]:
    """The tensors of an adapter directory by key, complete, finite and of the recorded shapes.

    Raises:
        CheckpointError: names the first key that is missing, unexpected, wrongly shaped, empty or not finite.
    """
    path = Path(directory) / TENSORS
    tensors = files.read_tensors(path, _checksum(directory, header, TENSORS))
    _compare(str(path), {key: stored.shape for key, stored in header.tensors.items()}, tensors)
    for key, tensor in tensors.items():
        if name_of(tensor.dtype) != header.tensors[key].dtype:
            raise CheckpointError(
                f"'{path}': '{key}' is {name_of(tensor.dtype)}, {HEADER} says {header.tensors[key].dtype}"
            )
        if tensor.numel() == 0:
            raise CheckpointError(f"'{path}': '{key}' is empty")
    _refuse_not_finite(tensors, f"'{path}'")
    return tensors


def _refuse_not_finite(tensors: Mapping[str, Tensor], where: str, then: str = "") -> None:
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{where}: '{key}' holds NaN or infinite values; the training run diverged{then}")


def read_state(directory: str | Path, header: AdapterFile, plan: Plan) -> dict[str, Tensor]:
    """The tensors that only resuming needs. See `read` for the errors."""
    expected = {f"{g.name}.{name}": spec.shape for g in plan.groups for name, spec in g.state.items()}
    if not expected:
        return {}
    path = Path(directory) / STATE
    if STATE not in header.checksums and not path.exists():
        raise CheckpointError(
            f"'{directory}' holds no training state: its adapter had been loaded for inference when it was saved, so training "
            "cannot go on from there; resume from the directory that training saved, or load it without trainable=True"
        )
    tensors = files.read_tensors(path, _checksum(directory, header, STATE))
    _compare(str(path), expected, tensors)
    return tensors


def _checksum(directory: str | Path, header: AdapterFile, name: str) -> str:
    if name not in header.checksums:
        raise CheckpointError(f"'{Path(directory) / HEADER}' is damaged: it records no checksum of {name}")
    return header.checksums[name]


def _compare(path: str, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor]) -> None:
    if missing := [key for key in expected if key not in found]:
        raise CheckpointError(f"'{path}': '{missing[0]}' is missing")
    if unexpected := [key for key in found if key not in expected]:
        raise CheckpointError(f"'{path}': '{unexpected[0]}' is not expected")
    for key, shape in expected.items():
        if tuple(found[key].shape) != tuple(shape):
            raise CheckpointError(f"'{path}': '{key}' has shape {list(found[key].shape)}, expected {list(shape)}")


def _own_card(directory: Path) -> tuple[str, ...]:
    """README.md is ours to write, unless somebody else's stands there."""
    return () if (directory / CARD).exists() and not (directory / HEADER).exists() else (CARD,)
