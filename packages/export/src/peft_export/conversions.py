"""What only transformers knows: how it renames, stacks, splits or turns a checkpoint's tensors as it loads them, which
parameter of a classifier grows with its classes, and what parts tied parameters.

Only here are transformers' model classes imported: for classifiers, for ties that are parted, and for a checkpoint that
names and shapes do not explain. The model is built on the meta device, without weights.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_core import CheckpointError, MergeError
from peft_core.loading import MISCONFIGURED

from . import output
from .checkpoint_files import DTYPE_OF_CODE, Checkpoint
from .names import Conversion, Names, Wanted


def ask_transformers(checkpoint: Checkpoint, architecture: str, wanted: list[Wanted]) -> Names | None:
    """The names as transformers' loader sees them; None where it knows no such architecture.

    Raises:
        CheckpointError: the configuration cannot be read. MergeError: this version of transformers converts otherwise.
    """
    model = _meta_model(checkpoint.directory, architecture)
    if model is None:
        return None
    renamings, converters = _transforms(model)
    keys: dict[str, str] = {}
    groups: dict[str, list[tuple[str, str]]] = {}
    for key, name, pattern in _renamed(checkpoint, model, renamings, converters):
        if pattern is None:
            keys[name] = key
        else:
            groups.setdefault(name, []).append((key, pattern))
    makers = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    conversions = tuple(
        _conversion(checkpoint, model, name, sources, makers[sources[0][1]], renamings)
        for name, sources in groups.items()
    )
    made = {parameter for group in conversions for parameter in group.parameters}
    left = [p for p in wanted if not any(name in keys or name in made for name in p.parameters)]
    ties = _ties(model, {*keys, *made}, left)
    ignored = model._keys_to_ignore_on_load_missing or ()
    names = (name for p in left for name in p.parameters)
    computed = tuple(name for name in names if any(re.search(pattern, name) for pattern in ignored))
    return Names(keys, ties, conversions, computed=computed)


def loaded_parameters(checkpoint: Checkpoint, architecture: str) -> set[str] | None:
    """Keys that become parameters as transformers loads this architecture; None where it cannot build it."""
    model = (
        _meta_model(checkpoint.directory, architecture) if (checkpoint.directory / "config.json").is_file() else None
    )
    if model is None:
        return None
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    found = _renamed(checkpoint, model, *_transforms(model))
    return {key for key, name, pattern in found if name in parameters or pattern is not None}


def _transforms(model: Any) -> tuple[list[Any], list[Any]]:
    """The renamings and the conversions that transformers applies as it loads a model.

    Raises:
        MergeError: this version of transformers does so in another way.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming
    except ImportError as error:
        raise MergeError(f"the key renames of this version of transformers cannot be followed: {error}") from None
    transforms = get_model_conversion_mapping(model)
    return (
        [step for step in transforms if isinstance(step, WeightRenaming)],
        [step for step in transforms if isinstance(step, WeightConverter)],
    )


def _renamed(
    checkpoint: Checkpoint, model: Any, renamings: list[Any], converters: list[Any]
) -> Iterator[tuple[str, str, str | None]]:
    """(key, name in the model, pattern of the conversion if there is one) of every tensor that the model takes."""
    from transformers.core_model_loading import dot_natural_key, rename_source_key

    state, prefix = model.state_dict(), model.base_model_prefix
    for key in sorted(checkpoint.entries, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        if name in state:
            yield key, name, pattern


def class_count(directory: Path, architecture: str, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """The number of classes of a model of these shapes; None where transformers knows no such architecture, or no head.

    Raises:
        CheckpointError: the configuration cannot be read.
    """
    counts = (3, 5)
    models = [_meta_model(directory, architecture, num_labels=count) for count in counts]
    if None in models:
        return None
    few, many = ({name: parameter.shape for name, parameter in model.named_parameters()} for model in models)
    for name, shape in few.items():
        grown = [axis for axis, sizes in enumerate(zip(shape, many.get(name, ()), strict=False)) if sizes == counts]
        ours = shapes.get(name) or shapes.get(name.removesuffix(".weight"))
        if grown and ours:
            return ours[grown[0]]
    return None


def parted_by_flag(
    directory: Path, architecture: str, config: Mapping[str, Any], tied: Sequence[Sequence[str]]
) -> bool:
    """Whether `tie_word_embeddings = false` in the configuration parts these sets of tied parameters.

    Some architectures tie them whatever it says (and read something else from it): of these, transformers' loader keeps
    apart what the files hold with different values.

    Raises:
        MergeError: the architecture makes them one tensor itself, so that no file can part them.
    """
    model = _meta_model(directory, architecture, output.edited(config, {"tie_word_embeddings": False}))
    if model is None:
        return True
    parameters = dict(model.named_parameters(remove_duplicate=False))
    declared = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    one = [name for members in tied for name in _still_one(members, parameters)]
    if fixed := [name for name in one if name not in declared]:
        raise MergeError(
            f"'{fixed[0]}' is one tensor with another layer's in every {architecture}, and cannot be parted from it: leave "
            "the layer out of the adapter, or train both as one"
        )
    return not one


def _still_one(members: Sequence[str], parameters: Mapping[str, Tensor]) -> list[str]:
    """Those of these parameters that share a tensor with another of them."""
    found = [name for name in members if name in parameters]
    owners = Counter(id(parameters[name]) for name in found)
    return [name for name in found if owners[id(parameters[name])] > 1]


def _meta_model(
    directory: Path, architecture: str, config_fields: Mapping[str, Any] | None = None, **fields: Any
) -> Any:
    """A model without weights; None where transformers cannot build it. `config_fields`: what its `config.json` would say."""
    import transformers

    cls = getattr(transformers, architecture, None)
    if cls is None or not hasattr(cls, "_from_config"):
        return None
    try:
        config = transformers.AutoConfig.from_pretrained(directory, **fields)
        if config_fields is not None:
            config = type(config).from_dict(dict(config_fields))
    except MISCONFIGURED as error:
        raise CheckpointError(f"'{directory}': config.json cannot be read: {' '.join(str(error).split())}") from None
    try:
        with torch.device("meta"):
            return cls._from_config(config)
    except Exception:  # the configuration of another architecture fails in whatever way
        return None


def _conversion(
    checkpoint: Checkpoint,
    model: Any,
    name: str,
    sources: list[tuple[str, str]],
    converter: Any,
    renamings: list[Any],
) -> Conversion:
    """A group of source tensors, tried on the meta device to learn the names that come out.

    The way back is transformers' own, as in `save_pretrained`: a renaming is undone only if it was in effect on the way here.
    """
    renamed, used = sources[0][0], []
    for renaming in renamings:
        before, (renamed, _) = renamed, renaming.rename_source_key(renamed)
        if renamed != before:
            used.append(renaming)
    plain, _ = converter.rename_source_key(renamed)
    # A model with a head differs from its base by a prefix, which no renaming states.
    ours, theirs = (name.removesuffix(plain), "") if name.endswith(plain) else ("", plain.removesuffix(name))

    def forward(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        step = copy.deepcopy(converter)
        for key, pattern in sources:
            step.add_tensor(name, key, pattern, tensors[key])
        made = step.convert(name, model=model, config=model.config)
        return {parameter: value[0] if isinstance(value, list) else value for parameter, value in made.items()}

    def backward(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        step = copy.deepcopy(converter).reverse_transform()
        first = ""
        for parameter, tensor in tensors.items():
            renamed, pattern = step.rename_source_key(parameter)
            first = first or renamed
            step.add_tensor(renamed, parameter, pattern, tensor)
        made = step.convert(first, model=model, config=model.config)
        back = [renaming.reverse_transform() for renaming in reversed(used)]
        out = {}
        for key, value in made.items():
            key = theirs + key.removeprefix(ours)
            for renaming in back:
                key, _ = renaming.rename_source_key(key)
            out[key] = value[0] if isinstance(value, list) else value
        return out

    keys = tuple(key for key, _ in sources)
    operations = ", ".join(type(operation).__name__ for operation in converter.operations)
    shapes = {
        key: torch.empty(
            checkpoint.entries[key].shape, dtype=DTYPE_OF_CODE[checkpoint.entries[key].dtype], device="meta"
        )
        for key in keys
    }
    made = forward(shapes)
    return Conversion(keys, tuple(made), operations, forward, backward)


def _ties(model: Any, present: set[str], left: list[Wanted]) -> dict[str, str]:
    """Parameter that the files leave out → the one there that is the same tensor in the model."""
    holders: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(name)
    twins = {name: same for same in holders.values() for name in same}
    out = {}
    for parameter in left:
        for name in parameter.parameters:
            there = [other for other in twins.get(name, ()) if other in present]
            if there:
                out[name] = there[0]
    return out
