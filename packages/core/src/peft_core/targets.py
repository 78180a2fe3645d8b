"""Choosing sites: which layers of a model a spec adapts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pydantic import BaseModel
from torch import nn

from . import bases
from .bypassing import bypassed
from .errors import TargetError, listed, suggestion
from .sites import Site, count_types, layer_index, module_type
from .spec import AdapterSpec, Patterns
from .subclassing import plain_class

_EXPERTS = re.compile("expert|moe", re.IGNORECASE)


@dataclass(frozen=True)
class Choice:
    """The sites of a spec on a model, and what was passed over and why."""

    sites: tuple[Site, ...]
    notes: tuple[str, ...]


def matches(pattern: str, path: str) -> bool:
    """Whether a name or suffix (`q_proj`, `self_attn.q_proj`) or a regex over the whole path matches."""
    return named(pattern, path) or _regex(pattern, "pattern").fullmatch(path) is not None


def named(name: str, path: str) -> bool:
    """Whether `path` is `name` or ends in it, component-wise."""
    return path == name or path.endswith("." + name)


def choose(model: nn.Module, spec: AdapterSpec) -> Choice:
    """The sites that a spec asks for, in the model's order.

    Raises:
        TargetError: nothing matches, a pattern of several matches nothing, or a match cannot be adapted.
    """
    if lazy := [path for path, module in model.named_modules() if bases.uninitialized(module)]:
        raise TargetError(
            f"'{lazy[0]}' has no weights yet: run the model once, so that its lazy layers get their shapes"
        )
    known = {
        path: base
        for path, module in model.named_modules()
        if path and (base := bases.describe(module)) and not bases.gives_more(module)
    }
    skipped = {path: reader for path in known if (reader := _reader(model, path))}
    notes: list[str] = []
    if spec.targets == "all-linear":
        heads = _heads_and_ties(model, known)
        chosen = [path for path in known if path not in heads and path not in skipped]
        if passed := [path for path in known if path in skipped]:
            notes.append(
                f"left out, since their framework does not call them, or not always: {listed(count_types(passed), 20)}"
            )
    else:
        chosen = _match(spec.targets, known, model, "targets")
        if bad := [path for path in chosen if path in skipped]:
            raise TargetError(
                f"targets: '{bad[0]}' is not called, or not always ({skipped[bad[0]]}, or what holds it, uses its weight "
                "directly), so an adapter there would be passed by; leave it out with exclude=[...]"
            )
    if spec.exclude:
        excluded = set(_match(spec.exclude, known, model, "exclude"))
        chosen = [path for path in chosen if path not in excluded]
    if spec.layers is not None:
        chosen = _in_layers(chosen, spec.layers)
    in_full = bases.inside(model, find_modules(model, spec.train_modules))
    trained = [path for path in chosen if id(model.get_submodule(path)) in in_full]
    if trained and spec.targets != "all-linear":
        raise TargetError(f"'{trained[0]}' is both a target and in train_modules; choose one")
    chosen = [path for path in chosen if path not in trained]
    if not chosen:
        raise TargetError(
            f"targets: nothing is left to adapt after exclude, layers and train_modules; {_what_there_is(known)}"
        )
    if own := _own_forwards(model, chosen, known):
        notes.append(f"have a forward of their own, and are merged only if it gives x Wᵀ + b: {own}")
    if experts := _expert_tensors(model):
        notes.append(f"not adapted (3-D parameters, not Linear modules): {experts}")
    return Choice(tuple(_sites(chosen, known, spec)), tuple(notes))


def find_modules(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Paths of the modules that `train_modules` names.

    Raises:
        TargetError: a name matches no module, or the module has no parameters, is a mere container, or one of several names
            of an embedding.
    """
    found: list[str] = []
    every = [path for path, _ in model.named_modules() if path]
    for name in names:
        paths = [path for path in every if named(name, path)]
        if not paths:
            _refuse_second_path(name, model, "train_modules")
            types = {module_type(path) for path in every if not module_type(path).isdigit()}
            raise TargetError(
                f"train_modules: no module is named '{name}'{suggestion(name, types)}; there are {listed(sorted(types), 20)}"
            )
        for path in paths:
            _refuse_untrainable(model, path)
        found += [path for path in paths if path not in found]
    if nested := [path for path in found if any(path.startswith(other + ".") for other in found)]:
        raise TargetError(
            f"train_modules: '{nested[0]}' lies within another module of train_modules; name one of the two"
        )
    _refuse_parts_of_embeddings(model, found)
    return found


def _heads_and_ties(model: nn.Module, known: Mapping[str, bases.Base]) -> set[str]:
    """Layers that 'all-linear' leaves out: the output head, what stands outside the trunk, and tied embeddings."""
    out: set[str] = set()
    head = None
    if hasattr(model, "get_output_embeddings"):
        head = model.get_output_embeddings()  # type: ignore[operator]
    prefix = getattr(model, "base_model_prefix", "")
    trunk = prefix if prefix and prefix in model._modules else ""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for path in known:
        module = model.get_submodule(path)
        outside = bool(trunk) and not path.startswith(trunk + ".")
        if module is head or outside or id(module.weight) in embeddings:
            out.add(path)
    return out


def _sites(paths: Iterable[str], known: Mapping[str, bases.Base], spec: AdapterSpec) -> Iterable[Site]:
    info = spec.info
    cache: dict[tuple[str, ...], BaseModel] = {}
    used: set[str] = set()
    for path in paths:
        applied = tuple(pattern for pattern in spec.overrides if matches(pattern, path))
        used.update(applied)
        if applied not in cache:
            options = dict(spec.options)
            for pattern in applied:
                options.update(spec.overrides[pattern])
            cache[applied] = info.options.model_validate(options)
        base = known[path]
        yield Site(path, base.in_features, base.out_features, base.transposed, base.dtype, cache[applied])
    if unused := [pattern for pattern in spec.overrides if pattern not in used]:
        raise TargetError(f"overrides: '{unused[0]}' matches none of the chosen layers")


def _match(patterns: Patterns, known: Mapping[str, bases.Base], model: nn.Module, what: str) -> list[str]:
    if isinstance(patterns, str):
        regex = _regex(patterns, what)
        found = [path for path in known if regex.fullmatch(path)]
        if not found:
            types = set(map(module_type, known))
            hint = f"; for a module name write ['{patterns}']" if patterns in types else suggestion(patterns, types)
            raise TargetError(
                f"{what}: the regex '{patterns}' matches no whole module path{hint}; {_what_there_is(known)}"
            )
        return found
    for name in patterns:
        if not any(named(name, path) for path in known):
            raise TargetError(_unmatched(name, known, model, what))
    return [path for path in known if any(named(name, path) for name in patterns)]


def _unmatched(name: str, known: Mapping[str, bases.Base], model: nn.Module, what: str) -> str:
    others = [module for path, module in model.named_modules() if path and named(name, path)]
    if others:
        kind = type(others[0]).__name__
        return (
            f"{what}: '{name}' is a {kind}, which cannot carry an adapter (train_modules trains a module in full); "
            f"{_what_there_is(known)}"
        )
    _refuse_second_path(name, model, what)
    types = set(map(module_type, known))
    return f"{what}: '{name}' matches no layer{suggestion(name, types)}; {_what_there_is(known)}"


def _refuse_second_path(name: str, model: nn.Module, what: str) -> None:
    """Refuse a name that leads to a module only where the model holds it a second time.

    Raises:
        TargetError: names the path to give.
    """
    first = {module: path for path, module in model.named_modules()}
    for path, module in model.named_modules(remove_duplicate=False):
        if named(name, path) and first[module] != path:
            raise TargetError(f"{what}: '{path}' is the same module as '{first[module]}'; give that path")


def _what_there_is(known: Mapping[str, bases.Base]) -> str:
    if not known:
        return "this model has no layer that can be adapted"
    return "the layer types are " + listed(count_types(known), 30)


def _in_layers(paths: list[str], layers: tuple[int, ...]) -> list[str]:
    present = {layer_index(path) for path in paths} - {None}
    if missing := [layer for layer in layers if layer not in present]:
        there = f"0 to {max(i for i in present if i is not None)}" if present else "not numbered"
        raise TargetError(f"layers: {missing[0]} is not the index of a matched layer; those are {there}")
    return [path for path in paths if layer_index(path) in layers]


def _refuse_untrainable(model: nn.Module, path: str) -> None:
    """Refuse a module of which a trained copy would have no effect."""
    module = model.get_submodule(path)
    if not any(True for _ in module.parameters()):
        raise TargetError(f"train_modules: '{path}' has no parameters to train")
    if reader := _reader(model, path):
        raise TargetError(
            f"train_modules: {reader} reads the weights of '{path}' without calling it, so a trained copy may have no "
            f"effect; name '{path.rpartition('.')[0]}' instead, or leave it out"
        )
    kind = type(module)
    if kind.forward is nn.Module.forward:
        raise TargetError(
            f"train_modules: '{path}' is a {kind.__name__}, which is never called itself; name the modules in it"
        )


def _refuse_parts_of_embeddings(model: nn.Module, found: list[str]) -> None:
    """An embedding that a model holds under several names is called under some of them only (never under BART's `shared`)."""
    inside = bases.inside(model, found)
    embeddings = {path: module for path, module in model.named_modules() if isinstance(module, nn.Embedding)}
    for path, module in embeddings.items():
        same = {other: there for other, there in embeddings.items() if there.weight is module.weight}
        others = [f"'{other}'" for other, there in same.items() if id(there) not in inside]
        if id(module) in inside and others:
            raise TargetError(
                f"train_modules: '{path}' is one embedding with {listed(others)}, and the model calls some of these only; name "
                "all of them"
            )


def _reader(model: nn.Module, path: str) -> str:
    """The class of the parent that reads this module's weights without calling it, if it does."""
    parent_path, _, child = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    return type(parent).__name__ if bypassed(parent, child) else ""


def _own_forwards(model: nn.Module, paths: Iterable[str], known: Mapping[str, bases.Base]) -> str:
    """Dense layers of which core cannot compute the product itself, by class."""
    modules = [model.get_submodule(path) for path in paths if not known[path].fused]
    kinds = Counter(plain_class(type(module)).__name__ for module in modules if not bases.is_quantized(module))
    return listed([f"{kind} ({count})" for kind, count in kinds.items()])


def _expert_tensors(model: nn.Module) -> str:
    """Mixture-of-experts weights that are 3-D parameters, by name."""
    found: Counter[str] = Counter()
    for path, module in model.named_modules():
        if _EXPERTS.search(path) or _EXPERTS.search(type(module).__name__):
            three = [name for name, p in bases.own_parameters(module) if p.dim() == 3 and min(p.shape) > 1]
            found.update(f"{module_type(path)}.{name}" for name in three)
    return listed([f"{name} ({count})" for name, count in found.items()])


def _regex(pattern: str, what: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise TargetError(f"{what}: '{pattern}' is not a valid regex: {error}") from None
