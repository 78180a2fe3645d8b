"""What merging will do to a checkpoint, decided from headers alone, before anything is written.

Every tensor of the result is an `Output`: a copy, a merged site, a module trained in full, or part of a conversion.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_core import MergeError
from peft_core.adapter_file import AdapterFile
from peft_core.errors import listed, size

from .adapter_files import AdapterFiles
from .checkpoint_files import CODES, DTYPE_OF_CODE, PLAIN_FLOATS, Checkpoint, Entry, Reader
from .mapping import note_on_type, quantized
from .names import Conversion, Names
from .shards import Item


@dataclass(frozen=True)
class Change:
    """What adapters do to one parameter: they merge into a site, or one of them replaces it.

    Attributes:
        path: the site's. adapters: those that adapt it, in order. trained: (adapter, key) of the tensor that replaces it.
    """

    path: str = ""
    adapters: tuple[AdapterFiles, ...] = ()
    trained: tuple[AdapterFiles, str] | None = None


@dataclass(frozen=True)
class Output:
    """One tensor of the result.

    Attributes:
        item: its key, dtype and shape. source: the tensor of the base that it comes from, if any.
        change: what is done to it. conversion: the group that it belongs to, if the files hold it in another form.
    """

    item: Item
    source: Entry | None = None
    change: Change | None = None
    conversion: Conversion | None = None

    @property
    def is_copy(self) -> bool:
        """Whether it is the base's tensor as it is, but for its dtype."""
        return self.change is None and self.conversion is None

    @property
    def is_site(self) -> bool:
        """Whether it is a weight of the files into which an adapter is merged as it is."""
        return self.conversion is None and self.change is not None and bool(self.change.adapters)


@dataclass(frozen=True)
class MergePlan:
    """Everything that will be written.

    Attributes:
        outputs: in the order of the base's files, new tensors last. changes: by parameter.
        config: fields of `config.json` that must change. notes: for the user.
    """

    outputs: Sequence[Output]
    changes: Mapping[str, Change]
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def plan_merge(
    checkpoint: Checkpoint,
    adapters: Sequence[AdapterFiles],
    names: Names,
    config: Mapping[str, Any],
    dtype: str | None,
    untie: bool,
) -> MergePlan:
    """Decide on every tensor. `dtype` is a safetensors code, or None to keep each tensor's own.

    Raises:
        MergeError: two adapters exclude each other, a weight is quantized or tied, or a shape does not fit.
    """
    changes = collect_changes(adapters)
    _check_kinds(checkpoint, names, changes)
    untied, by_flag = _untied(checkpoint, adapters[0].header, names, changes, config, untie)
    by_key = {key: parameter for parameter, key in names.keys.items()}
    groups = {
        key: group
        for group in names.conversions
        for key in group.sources
        if not changes.keys().isdisjoint(group.parameters)
    }
    outputs = []
    for key, entry in checkpoint.entries.items():
        change = changes.get(by_key.get(key, ""))
        outputs.append(Output(_item(entry, dtype, change), entry, change, groups.get(key)))
    for parameter, source in untied.items():
        if parameter not in names.keys:
            change, key = changes.get(parameter), names.new_key(parameter)
            outputs.append(Output(_item(source, dtype, change, key), source, change))
    new = {parameter: change for parameter, change in changes.items() if not names.knows(parameter)}
    for parameter, change in new.items():
        assert change.trained is not None
        shape, code = change.trained[0].shape(change.trained[1]), dtype or checkpoint.dtype
        outputs.append(Output(_new_item(names.new_key(parameter), code, shape), None, change))
    edits, notes = _edits(checkpoint.directory, adapters[0].header, bool(new), config)
    resized, more = resizing(checkpoint, names, adapters, config)
    edits |= resized
    notes += [f"{what}: config.json says so now" for what in more]
    if by_flag:
        edits["tie_word_embeddings"] = False
        notes.append("tied embeddings were parted: config.json now says tie_word_embeddings = false")
    elif untied:
        notes.append(
            f"{listed(sorted(untied))} were parted: the files hold each of them now, and from that transformers 5 sees that "
            "they differ (config.json has no field for it)"
        )
    return MergePlan(outputs, changes, edits, (*notes, *_remarks(checkpoint, adapters, names, changes, config)))


def collect_changes(adapters: Sequence[AdapterFiles]) -> dict[str, Change]:
    """Parameter → what the adapters do to it.

    Raises:
        MergeError: they cannot stand together on a parameter.
    """
    first = adapters[0]
    changes: dict[str, Change] = {}
    for adapter in adapters:
        if adapter.header.base.shapes != first.header.base.shapes:
            raise MergeError(f"'{first.directory}' and '{adapter.directory}' were trained on different base models")
        for path in adapter.sites:
            parameter = f"{path}.weight"
            before = changes.get(parameter, Change(path))
            if before.trained is not None:
                raise MergeError(
                    f"'{path}' is trained in full by '{before.trained[0].directory}' and adapted by '{adapter.directory}'"
                )
            together = (*before.adapters, adapter)
            exclusive = [one.header.method.name for one in together if one.exclusive(path)]
            if exclusive and before.adapters:
                raise MergeError(
                    f"'{path}': method '{exclusive[0]}' is not an added Δ and cannot be merged together with another adapter"
                )
            changes[parameter] = Change(path, together)
    for adapter in adapters:
        for parameter, key in adapter.trained.items():
            before = changes.get(parameter, Change())
            if before.trained is not None:
                raise MergeError(
                    f"'{parameter}' is trained in full by both '{before.trained[0].directory}' and '{adapter.directory}'; "
                    "merge one of them"
                )
            if before.adapters:
                raise MergeError(
                    f"'{parameter}' is trained in full by '{adapter.directory}' and adapted by '{before.adapters[0].directory}'"
                )
            changes[parameter] = Change(trained=(adapter, key))
    return changes


def _check_kinds(checkpoint: Checkpoint, names: Names, changes: Mapping[str, Change]) -> None:
    for parameter, change in changes.items():
        key = names.keys.get(names.ties.get(parameter, parameter))
        entry = names.packed.get(change.path) or checkpoint.entries.get(key or "")
        if entry is not None and entry.dtype not in PLAIN_FLOATS:
            raise quantized(entry, "merge into")


def _untied(
    checkpoint: Checkpoint,
    header: AdapterFile,
    names: Names,
    changes: Mapping[str, Change],
    config: Mapping[str, Any],
    untie: bool,
) -> tuple[dict[str, Entry], bool]:
    """Parameters that need a tensor of their own → the one that they share; and whether the configuration must say so.

    Where it does, it parts all tied parameters: then each of them needs a tensor, whether an adapter changes it or not.

    Raises:
        MergeError: there are some, and parting them was not asked for or is not possible.
    """
    tied = _tied_sets(checkpoint, header, names, changes)
    parted = [(entry, members) for entry, members in tied if _parts(members, changes)]
    if not parted:
        return {}, False
    if not untie:
        entry, members = parted[0]
        changed = next(member for member in members if member in changes)
        other = next(member for member in members if member != changed)
        raise MergeError(
            f"'{changed}' is the same tensor as '{other}': merging would change both; exclude the tied layer, or part "
            f"them with untie=True (--untie; the checkpoint grows by {size(entry.nbytes)})"
        )
    from .conversions import parted_by_flag

    by_flag = not config or parted_by_flag(
        checkpoint.directory, header.base.architecture, config, [members for _, members in parted]
    )
    return {member: entry for entry, members in (tied if by_flag else parted) for member in members}, by_flag


def _parts(members: Sequence[str], changes: Mapping[str, Change]) -> bool:
    """Whether changes make parameters differ that share a tensor: unless one tensor takes the place of all of them."""
    if changes.keys().isdisjoint(members):
        return False
    new = {change.trained if change else None for change in map(changes.get, members)}
    return len(new) > 1 or None in new


def _tied_sets(
    checkpoint: Checkpoint, header: AdapterFile, names: Names, changes: Mapping[str, Change]
) -> list[tuple[Entry, list[str]]]:
    """The shared tensors, each with its parameters: seen from the tensors, not from a flag.

    One that the files hold twice is looked for only where a change touches it.
    """
    sets: dict[str, list[str]] = {}
    for parameter, twin in names.ties.items():
        if twin in names.keys:
            sets.setdefault(names.keys[twin], [twin]).append(parameter)
    # Parameters that the adapter's model shared and that the files do not leave out must be stored twice.
    shared = sum(math.prod(shape) for shape in header.base.shapes.values()) - header.base.num_parameters
    shared -= sum(checkpoint.entries[key].numel * (len(members) - 1) for key, members in sets.items())
    if shared > 0:
        with Reader() as reader:
            for parameter in changes:
                entry = checkpoint.entries.get(names.keys.get(parameter, ""))
                if entry is None or entry.key in sets or len(entry.shape) != 2 or entry.numel > shared:
                    continue
                others = {name: checkpoint.entries[key] for name, key in names.keys.items() if key != entry.key}
                if twins := [name for name, other in others.items() if reader.same(entry, other)]:
                    sets[entry.key] = [parameter, *twins]
    return [(checkpoint.entries[key], members) for key, members in sets.items()]


def _edits(
    base: Path,
    header: AdapterFile,
    new_head: bool,
    config: Mapping[str, Any],
) -> tuple[dict[str, Any], list[str]]:
    """Fields of the configuration that no longer hold, and remarks on them."""
    if not config:
        return {}, [f"'{base}' has no config.json, so that nothing can load the result: copy the model's into it"]
    edits: dict[str, Any] = {}
    notes: list[str] = []
    if new_head and header.base.architecture not in (config.get("architectures") or ()):
        edits["architectures"] = [header.base.architecture]
        notes.append(f"the trained head makes this a {header.base.architecture}: config.json says so now")
    edits.update(head_config(base, header, config))
    return edits, notes


def resizing(
    checkpoint: Checkpoint, names: Names, adapters: Sequence[AdapterFiles], config: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """The field of the configuration for a vocabulary whose embeddings the adapters bring along in another size, in words too.

    Raises:
        MergeError: they bring different sizes.
    """
    inner = config.get("text_config")
    before = (inner if isinstance(inner, Mapping) else config).get("vocab_size", config.get("vocab_size"))
    sizes: dict[int, str] = {}
    for adapter in adapters:
        for parameter, key in adapter.trained.items():
            entry = checkpoint.entries.get(names.keys.get(names.ties.get(parameter, parameter), ""))
            if entry is not None and entry.shape[:1] == (before,) and adapter.shape(key) != entry.shape:
                sizes.setdefault(adapter.shape(key)[0], parameter)
    if len(sizes) > 1:
        raise MergeError(
            f"the adapters bring vocabularies of different sizes: {listed(map(str, sizes))}; merge one of them"
        )
    if not sizes:
        return {}, []
    tokens = next(iter(sizes))
    return {"vocab_size": tokens}, [f"the vocabulary has {tokens} tokens, not {before}"]


def head_config(base: Path, header: AdapterFile, config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the configuration of a classifier that was trained with other classes than the base states, or that finds a
    text's last token by another padding token: `id2label` and `label2id`, `pad_token_id`.
    """
    if not config or "Classification" not in header.base.architecture:
        return {}
    fields: dict[str, Any] = {}
    before = {str(number): name for number, name in (config.get("id2label") or {}).items()}
    names = header.base.classes or _unnamed_classes(base, header, len(before) or config.get("num_labels") or 2)
    labels = {str(number): name for number, name in enumerate(names)}
    if labels and labels != before:
        fields = {"id2label": labels, "label2id": {name: number for number, name in enumerate(names)}}
    inner = config.get("text_config")
    pad, known = header.base.pad_token_id, inner if isinstance(inner, Mapping) and "pad_token_id" in inner else config
    if pad is not None and pad != known.get("pad_token_id"):
        fields["pad_token_id"] = pad
    return fields


def _unnamed_classes(base: Path, header: AdapterFile, before: int) -> list[str]:
    """Names as transformers makes them up, where the adapter's head has another number of classes."""
    from .conversions import class_count

    count = class_count(base, header.base.architecture, header.base.shapes)
    return [] if count in (None, before) else [f"LABEL_{number}" for number in range(count)]


def _remarks(
    checkpoint: Checkpoint,
    adapters: Sequence[AdapterFiles],
    names: Names,
    changes: Mapping[str, Change],
    config: Mapping[str, Any],
) -> list[str]:
    notes = []
    stored = {entry.dtype for p, key in names.keys.items() if p in changes and (entry := checkpoint.entries[key])}
    for adapter in adapters:
        notes += note_on_type(adapter.header, config, checkpoint.directory, adapter.directory)
        trained_on = {CODES[site.dtype] for site in adapter.sites.values()}
        if packed := adapter.header.base.quantization:
            notes.append(
                f"'{adapter.directory}' was trained on {packed} layers; it is merged into the weights of "
                f"'{checkpoint.directory}' ({', '.join(sorted(stored))}), which differ from those by the quantization's error "
                "unless they are the dequantized ones"
            )
        elif stored and trained_on.isdisjoint(stored):
            notes.append(
                f"'{adapter.directory}' was trained on {', '.join(sorted(trained_on))} weights, those of "
                f"'{checkpoint.directory}' are {', '.join(sorted(stored))}"
            )
        if adapter.weight != 1.0 and adapter.trained:
            notes.append(
                f"modules that '{adapter.directory}' trained in full are taken as they are, whatever its weight"
            )
    return notes


def _item(entry: Entry, dtype: str | None, change: Change | None, key: str | None = None) -> Item:
    if change is not None and change.trained is not None:
        return _new_item(key or entry.key, dtype or entry.dtype, change.trained[0].shape(change.trained[1]))
    if dtype is None or entry.dtype not in PLAIN_FLOATS:
        return Item(key or entry.key, entry.dtype, entry.shape, entry.nbytes)
    return _new_item(key or entry.key, dtype, entry.shape)


def _new_item(key: str, dtype: str, shape: tuple[int, ...]) -> Item:
    return Item(key, dtype, shape, math.prod(shape) * DTYPE_OF_CODE[dtype].itemsize)
