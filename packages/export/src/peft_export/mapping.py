"""Matching an adapter with the checkpoint that it is to be merged into, and telling another base model from its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft_core import CheckpointError, MergeError
from peft_core.adapter_file import AdapterFile

from .checkpoint_files import PLAIN_FLOATS, Checkpoint, Entry
from .names import Names, Wanted, by_prefix, matched, wanted_parameters


def find_names(checkpoint: Checkpoint, header: AdapterFile, config: dict[str, Any], adapter: str) -> Names:
    """The checkpoint as seen from the adapter's model. Of layers that it holds quantized, no shape is compared.

    Args:
        config: the checkpoint's configuration. adapter: its directory, for messages.

    Raises:
        CheckpointError: the adapter belongs to another base model; the message names the first difference.
    """
    wanted = wanted_parameters(header)
    names = by_prefix(checkpoint, header, wanted)
    if names is None:
        from .conversions import ask_transformers

        names = ask_transformers(checkpoint, header.base.architecture, wanted)
    if names is None:
        names = Names({name: name for name in matched(checkpoint, wanted, ("", ""))})
    names = replace(names, packed=_packed(checkpoint, names, wanted))
    base = f"{header.base.architecture} '{header.base.name}'" if header.base.name else header.base.architecture
    difference = _difference(checkpoint, header, names, wanted) or _unknown(checkpoint, header, names, config)
    if difference:
        raise CheckpointError(
            f"'{adapter}' was trained on another base model ({base}) than '{checkpoint.directory}': {difference}"
        )
    return names


def note_on_type(header: AdapterFile, config: Mapping[str, Any], base: Path, adapter: Path) -> list[str]:
    """A remark where a base of another type has tensors of the same names and shapes."""
    inner = config.get("text_config")
    types = [found["model_type"] for found in (config, inner) if isinstance(found, Mapping) and "model_type" in found]
    if not types or not header.base.model_type or header.base.model_type in types:
        return []
    return [
        f"'{adapter}' was trained on a model of type {header.base.model_type}; '{base}' is of type {types[0]} and has "
        "tensors of the same names and shapes, but may compute something else with them: verify the result"
    ]


def quantized(entry: Entry, remedy: str) -> MergeError:
    """The error for a layer whose weight is needed and is quantized."""
    return MergeError(
        f"'{entry.key}' in '{entry.file.parent}' is quantized ({entry.dtype}); {remedy} the original-precision checkpoint, or "
        "a dequantized one"
    )


def _packed(checkpoint: Checkpoint, names: Names, wanted: list[Wanted]) -> dict[str, Entry]:
    """Layers beside whose names the files hold something else than plain floats, in whatever format → one such tensor."""
    found = {_module(key): entry for key, entry in checkpoint.entries.items() if entry.dtype not in PLAIN_FLOATS}
    layers = {p.name: f"{p.name}.weight" for p in wanted if len(p.shape) == 2}
    modules = {name: _module(names.keys.get(weight) or names.new_key(weight)) for name, weight in layers.items()}
    return {name: found[module] for name, module in modules.items() if module in found}


def _difference(checkpoint: Checkpoint, header: AdapterFile, names: Names, wanted: list[Wanted]) -> str:
    """The first parameter that the files should have and have not, or have in another shape."""
    sites = {site.path for site in header.sites}
    for parameter in wanted:
        if parameter.name in names.packed:
            continue
        for name in parameter.parameters:
            held = names.ties.get(name, name)
            entry = checkpoint.entries.get(names.keys.get(held) or names.new_key(held))
            if entry is not None and not parameter.fits(entry) and names.conversion(name) is None:
                return f"'{parameter.name}' is {list(entry.shape)} here and {list(parameter.shape)} there" + _remedy(
                    parameter, entry
                )
        if parameter.trained:
            continue
        if not any(names.knows(name) or name in names.computed for name in parameter.parameters):
            if parameter.name in sites:
                return f"there is no tensor here for the adapted layer '{parameter.name}'"
            return (
                f"there is no tensor here for '{parameter.name}', nor in the adapter; give the checkpoint that it was trained "
                "on (a new head that is named in train_modules is saved with the adapter)"
            )
    return ""


def _remedy(parameter: Wanted, entry: Entry) -> str:
    """What to do about a tensor that has another number of rows, as if its model had been resized after loading."""
    if len(parameter.shape) != 2 or entry.shape[1:] != parameter.shape[1:]:
        return ""
    return (
        "; if the model was resized before training, save the resized base (model.save_pretrained) and give that, or name "
        "the module in train_modules, so that it is saved with the adapter"
    )


def _unknown(checkpoint: Checkpoint, header: AdapterFile, names: Names, config: Mapping[str, Any]) -> str:
    """A tensor of the base within a part that the adapter's model has, too, but without this tensor.

    Other parts may differ: a head, a pooler, the other half of an encoder-decoder. Layers beyond the configuration's own
    number are not part of the model.
    """
    inside = {**config, **config["text_config"]} if isinstance(config.get("text_config"), dict) else config
    counts = [
        inside[name] for name in ("num_hidden_layers", "n_layer", "num_layers") if isinstance(inside.get(name), int)
    ]
    known = set(names.keys.values()) | {key for group in names.conversions for key in group.sources}
    patterns = {re.sub(r"\d+", "#", key) for key in known}
    modules, layers = {_module(key) for key in known}, {_layer(key) for key in known}
    doubtful = []
    for key, entry in checkpoint.entries.items():
        number = re.search(r"\.(\d+)\.", f".{key}")
        if key in known or (number and counts and int(number[1]) >= max(counts)):
            continue
        if number and re.sub(r"\d+", "#", key) in patterns:
            return f"'{key}' is here and not there"
        if entry.dtype in PLAIN_FLOATS and (_module(key) in modules or (number and _layer(key) in layers)):
            doubtful.append(key)
    if not doubtful:
        return ""
    # Old files hold buffers in such places (rotary frequencies, causal masks), which are not loaded any more.
    from .conversions import loaded_parameters

    loaded = loaded_parameters(checkpoint, (config.get("architectures") or [header.base.architecture])[0])
    found = [key for key in doubtful if (_module(key) in modules if loaded is None else key in loaded)]
    return f"'{found[0]}' is here and not there" if found else ""


def _module(key: str) -> str:
    return key.rpartition(".")[0]


def _layer(key: str) -> str:
    """The beginning of a key, up to its first number."""
    found = re.match(r"(.*?\.)?\d+\.", key)
    return found[0] if found else ""
