"""Matching an adapter with the checkpoint that it is to be merged into, and telling another base model from its own."""

from __future__ import annotations

import re
from typing import Any

from peft_core import CheckpointError
from peft_core.adapter_file import AdapterFile

from .checkpoint_files import Checkpoint
from .names import Names, Wanted, by_prefix, matched, wanted_parameters


def find_names(checkpoint: Checkpoint, header: AdapterFile, config: dict[str, Any], adapter: str) -> Names:
    """The checkpoint as seen from the adapter's model.

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
    base = f"{header.base.architecture} '{header.base.name}'" if header.base.name else header.base.architecture
    difference = _difference(checkpoint, header, names, wanted) or _more_layers(checkpoint, names, config)
    if difference:
        raise CheckpointError(
            f"'{adapter}' was trained on another base model ({base}) than '{checkpoint.directory}': {difference}"
        )
    return names


def _difference(checkpoint: Checkpoint, header: AdapterFile, names: Names, wanted: list[Wanted]) -> str:
    """The first parameter that the files should have and have not, or have in another shape."""
    sites = {site.path for site in header.sites}
    for parameter in wanted:
        for name in parameter.parameters:
            key = names.keys.get(name) or names.new_key(name)
            entry = checkpoint.entries.get(key)
            if entry is not None and not parameter.fits(entry) and names.conversion(name) is None:
                return f"'{parameter.name}' is {list(entry.shape)} here and {list(parameter.shape)} there"
        present = {*names.keys, *names.ties}
        if (
            parameter.name in sites
            and present.isdisjoint(parameter.parameters)
            and not names.conversion(parameter.parameters[0])
        ):
            return f"there is no tensor here for the adapted layer '{parameter.name}'"
    return ""


def _more_layers(checkpoint: Checkpoint, names: Names, config: dict[str, Any]) -> str:
    """A tensor that only a deeper model has. Layers beyond the configuration's own number are not part of the model."""
    inside = {**config, **config["text_config"]} if isinstance(config.get("text_config"), dict) else config
    counts = [
        inside[name] for name in ("num_hidden_layers", "n_layer", "num_layers") if isinstance(inside.get(name), int)
    ]
    known = set(names.keys.values()) | {key for group in names.conversions for key in group.sources}
    patterns = {re.sub(r"\d+", "#", key) for key in known}
    for key in checkpoint.entries:
        number = re.search(r"\.(\d+)\.", f".{key}")
        if key in known or number is None or (counts and int(number[1]) >= max(counts)):
            continue
        if re.sub(r"\d+", "#", key) in patterns:
            return f"'{key}' is here and not there"
    return ""
