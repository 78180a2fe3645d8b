"""Which tensor of a checkpoint is which parameter of the model, from names and shapes alone.

Usually a parameter's name is its key in the files, give or take the prefix by which a model with a head differs from its
base. Where that does not explain every parameter, `conversions` asks transformers, which renames and reshapes some
architectures' tensors as it loads them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from peft_core.adapter_file import AdapterFile
from peft_core.sharing import stand_ins

from .checkpoint_files import Checkpoint, Entry


@dataclass(frozen=True)
class Conversion:
    """Tensors of the files that become parameters in another form: experts stacked, a fused projection split.

    Attributes:
        sources: keys in the files. parameters: what they become. operations: what transformers does, for messages.
        forward: tensors by source → by parameter. backward: the other way.
    """

    sources: tuple[str, ...]
    parameters: tuple[str, ...]
    operations: str
    forward: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    backward: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class Names:
    """A checkpoint as seen from the model.

    Attributes:
        keys: parameter → its key in the files.
        ties: parameter that the files leave out → the parameter whose tensor it shares.
        conversions: parameters that the files hold in another form, by group.
        prefix: (of parameters, of keys): where a parameter's name begins with the one, its key begins with the other.
        computed: parameters that the files leave out because the model computes them itself.
        packed: layers that the files hold quantized → one of their tensors.
    """

    keys: Mapping[str, str]
    ties: Mapping[str, str] = field(default_factory=dict)
    conversions: tuple[Conversion, ...] = ()
    prefix: tuple[str, str] = ("", "")
    computed: tuple[str, ...] = ()
    packed: Mapping[str, Entry] = field(default_factory=dict)

    def new_key(self, parameter: str) -> str:
        """The key for a parameter that the files do not have yet."""
        ours, theirs = self.prefix
        return theirs + parameter.removeprefix(ours) if ours and parameter.startswith(ours) else parameter

    def knows(self, parameter: str) -> bool:
        """Whether the files hold this parameter, in whatever form; others are a head that training added."""
        return parameter in self.keys or parameter in self.ties or self.conversion(parameter) is not None

    def conversion(self, parameter: str) -> Conversion | None:
        """The conversion that makes this parameter, if one does."""
        return next((group for group in self.conversions if parameter in group.parameters), None)


@dataclass(frozen=True)
class Wanted:
    """A layer or parameter of the adapter's base model.

    Attributes:
        name: as `adapter.json` has it. shape: logical (out × in for a layer). transposed: how the files store it, if known.
        parameters: what the parameter may be called: `adapter.json` names layers without `.weight`, so a two-dimensional entry
            can be a layer's weight or a parameter of that very name.
        trained: the adapter brings it along, so that the files may have it in another size (of a vocabulary, of classes).
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool | None
    parameters: tuple[str, ...]
    trained: bool = False

    def fits(self, entry: Entry) -> bool:
        """Whether a tensor has the right shape."""
        if self.trained:
            return len(entry.shape) == len(self.shape)
        if len(self.shape) != 2 or self.transposed is False:
            return entry.shape == self.shape
        turned = self.shape[::-1]
        return entry.shape == turned if self.transposed else entry.shape in (self.shape, turned)


def wanted_parameters(header: AdapterFile) -> list[Wanted]:
    """Everything that the adapter's base model consists of."""
    sites = {site.path: site.transposed for site in header.sites}
    trained = stand_ins(header.trained).keys()
    out = []
    for name, shape in header.base.shapes.items():
        transposed: bool | None
        parameters: tuple[str, ...]
        if name in sites:
            transposed, parameters = sites[name], (f"{name}.weight",)
        elif len(shape) == 2 and not name.endswith((".weight", ".bias")):
            transposed, parameters = None, (f"{name}.weight", name)
        else:
            transposed, parameters = False, (name,)
        out.append(Wanted(name, tuple(shape), transposed, parameters, not trained.isdisjoint(parameters)))
    return out


def by_prefix(checkpoint: Checkpoint, header: AdapterFile, wanted: list[Wanted]) -> Names | None:
    """The names, if every parameter is in the files, tied to one that is, or trained in full; None otherwise."""
    best, prefix = max(
        ((matched(checkpoint, wanted, prefix), prefix) for prefix in _prefixes(checkpoint, wanted)),
        key=lambda found: len(found[0]),
    )
    found = {parameter.name for parameter in best.values()}
    left = [parameter for parameter in wanted if parameter.name not in found]
    shared = sum(math.prod(p.shape) for p in wanted) - header.base.num_parameters
    ties = _ties(best, left) if shared > 0 and left else {}
    tied = [parameter for parameter in left if parameter.parameters[0] in ties]
    if ties and sum(math.prod(p.shape) for p in tied) != shared:
        return None
    trained = stand_ins(header.trained).keys()
    absent = [parameter for parameter in left if parameter not in tied]
    if any(trained.isdisjoint(parameter.parameters) for parameter in absent):
        return None
    keys = {name: _key(checkpoint, name, prefix) for name in best}
    if absent and not checkpoint.entries.keys() <= set(keys.values()):
        return None  # what looks like a new head may be what the files hold under another name
    return Names(keys, ties, prefix=prefix)


def matched(checkpoint: Checkpoint, wanted: list[Wanted], prefix: tuple[str, str]) -> dict[str, Wanted]:
    """Parameter name → what it is, for those that the files hold, under this prefix, in the right shape."""
    out = {}
    for parameter in wanted:
        for name in parameter.parameters:
            entry = checkpoint.entries.get(_key(checkpoint, name, prefix))
            if entry is not None and parameter.fits(entry):
                out[name] = parameter
                break
    return out


def _key(checkpoint: Checkpoint, name: str, prefix: tuple[str, str]) -> str:
    ours, theirs = prefix
    changed = theirs + name.removeprefix(ours) if name.startswith(ours) else name
    return changed if changed in checkpoint.entries else name


def _prefixes(checkpoint: Checkpoint, wanted: list[Wanted]) -> Iterator[tuple[str, str]]:
    """No difference; then the trunk's name in front of the parameters, or of the keys, only."""
    yield "", ""
    for names, ours in (
        (Counter(p.name.partition(".")[0] for p in wanted), True),
        (Counter(key.partition(".")[0] for key in checkpoint.entries), False),
    ):
        trunk, _ = names.most_common(1)[0]
        yield (f"{trunk}.", "") if ours else ("", f"{trunk}.")


def _ties(found: Mapping[str, Wanted], left: list[Wanted]) -> dict[str, str]:
    """Parameter that the files leave out → the only one there that has its shape."""
    out = {}
    for parameter in left:
        twins = [name for name, other in found.items() if other.shape == parameter.shape]
        if len(parameter.shape) == 2 and len(twins) == 1:
            out[parameter.parameters[0]] = twins[0]
    return out
