"""Adapter directories of Hugging Face PEFT's MissConfig, turned into ours and back, from files alone.

Theirs is `adapter_config.json` and `adapter_model.safetensors`. The latter holds, for every layer,
`base_model.model.{path}.miss_block`, which is our D of the variants `efficient`, `mini` and `bat` in the
interleaved layout, and `base_model.model.{path}.{parameter}` for modules that were trained in full. Their format
has no scale; ours is multiplied into D, in which ΔW is linear.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import peft_core as pc
from peft_core import checkpoint, files
from peft_core.adapter_file import AdapterFile, read_header, spec_of
from peft_core.base_model import meta_model
from peft_core.sites import module_type
from peft_core.spec import DTYPE_OF_NAME
from peft_core.targets import named

from .options import Options

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, BLOCK = "base_model.model.", ".miss_block"
# What they may write beside a trained embedding: the same again, and the base's.
_BESIDE = re.compile(r"\.(?:modules_to_save|original_module)(\.[^.]+)$")


class Theirs(NamedTuple):
    """What one of their directories holds.

    Attributes:
        config: `adapter_config.json`. blocks: layer path → D.
        whole: parameter path → value, of modules trained in full. modules: paths of those modules.
    """

    config: dict[str, Any]
    blocks: dict[str, Tensor]
    whole: dict[str, Tensor]
    modules: tuple[str, ...]


def from_hf_peft(source_dir: str | Path, out_dir: str | Path, base: nn.Module | str | Path | None = None) -> None:
    """Turn an adapter of Hugging Face PEFT's MissConfig into a directory that `peft_core.load` reads.

    Args:
        base: the base model, on any device (meta included), or its checkpoint directory, of which only the
            configuration is read. By default the directory that the adapter names.

    Raises:
        CheckpointError: the directory does not hold such an adapter, or it does not fit the base, or it holds something that
            ours cannot express; the message names the first key.
        ModelError: the base cannot be read.
    """
    theirs = read_theirs(source_dir)
    model = _recorded_base(source_dir, theirs) if base is None else base
    made = _plan(source_dir, theirs, model if isinstance(model, nn.Module) else meta_model(model))
    checkpoint.write(out_dir, made, made.base, _values(source_dir, theirs, made))


def to_hf_peft(source_dir: str | Path, out_dir: str | Path) -> None:
    """Turn an adapter of ours into a directory that `peft.PeftModel.from_pretrained` reads.

    A scale (`alpha`) is multiplied into D, since theirs has none; everything else is kept as it is.

    Raises:
        CheckpointError: the directory does not hold a MiSS adapter, or holds one that their library cannot express:
            variant `expand`, a contiguous layout, options that differ between layers, a transposed layer.
    """
    header = read_header(source_dir)
    if header.method.name != "miss":
        raise pc.CheckpointError(f"'{source_dir}' is an adapter of method '{header.method.name}', not of 'miss'")
    stored = checkpoint.read(source_dir, header)
    options = _their_options(source_dir, header)
    borrowed = header.borrowed()
    paths = [path for path, names in borrowed.items() if names]
    spec = spec_of(header)
    config = {
        "peft_type": "MISS",
        "task_type": "CAUSAL_LM" if header.base.architecture.endswith("ForCausalLM") else None,
        "base_model_name_or_path": header.base.name or None,
        "inference_mode": True,
        "r": options.r,
        "mini_r": options.mini_r or 1,
        "init_weights": True if options.variant == "efficient" else options.variant,
        "miss_dropout": spec.dropout,
        "bias": "none",
        "target_modules": _their_targets(paths, header.base.shapes, header.trained),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": list(header.trained) or None,
    }
    tensors = {}
    for path in paths:
        D = stored[borrowed[path]["D"]]
        tensors[f"{PREFIX}{path}{BLOCK}"] = D if options.scale == 1.0 else D * options.scale
    for path, parameters in header.trained.items():
        tensors.update({f"{PREFIX}{path}.{local}": stored[key].clone() for local, key in parameters.items()})
    with files.whole_directory(out_dir, (CONFIG, TENSORS)) as directory:
        files.write_tensors(directory / TENSORS, tensors, {"format": "pt"})
        (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_theirs(directory: str | Path) -> Theirs:
    """One of their directories, with all keys accounted for.

    Raises:
        CheckpointError: as `from_hf_peft`.
    """
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise pc.CheckpointError(f"'{directory}' is not an adapter of Hugging Face PEFT: {CONFIG} is missing")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise pc.CheckpointError(f"'{path}' is damaged: {error!r}") from None
    if kind != "MISS":
        raise pc.CheckpointError(f"'{directory}' is a {kind} adapter; only those of type MISS can be converted")
    if config.get("bias", "none") != "none":
        raise pc.CheckpointError(
            f"'{directory}' has trained biases (bias='{config['bias']}'), which 'miss' cannot hold"
        )
    weights = Path(directory) / TENSORS
    if not weights.exists() and weights.with_name("adapter_model.bin").exists():
        raise pc.CheckpointError(
            f"'{directory}' holds adapter_model.bin, a pickle, which can run code when it is read; "
            "save it again with safe_serialization=True"
        )
    blocks, whole, modules = {}, {}, []
    tensors = files.read_tensors(weights)
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if name.endswith(BLOCK):
            blocks[name.removesuffix(BLOCK)] = tensor
            continue
        if _BESIDE.search(key) and _BESIDE.sub(r"\1", key) in tensors:
            continue
        module = _saved_module(name, config.get("modules_to_save") or [])
        if module is None:
            raise pc.CheckpointError(
                f"'{weights}': '{key}' is neither a miss_block nor part of a module in modules_to_save; if it is the base's "
                "own, save the adapter again with save_embedding_layers=False"
            )
        whole[name] = tensor
        modules.append(module)
    if not blocks:
        raise pc.CheckpointError(f"'{weights}' contains no miss_block: no layer is adapted")
    return Theirs(config, blocks, whole, tuple(dict.fromkeys(modules)))


def _saved_module(parameter: str, names: list[str]) -> str | None:
    """The module in `modules_to_save` that this parameter belongs to; a name there is any end of a path."""
    parts = parameter.split(".")
    paths = (".".join(parts[:count]) for count in range(1, len(parts)))
    return next((path for path in paths if path.endswith(tuple(names))), None)


def _spec(source_dir: str | Path, theirs: Theirs, targets: tuple[str, ...]) -> pc.AdapterSpec:
    """Their configuration as a spec for these layers."""
    config = theirs.config
    variant = config.get("init_weights", True)
    if not isinstance(variant, bool) and variant not in ("mini", "bat"):
        raise pc.CheckpointError(
            f"'{source_dir}': init_weights={variant!r} is unknown; known values: true, false, 'mini', 'bat'"
        )
    options = {"variant": "efficient" if isinstance(variant, bool) else variant, "r": config.get("r", 64)}
    if variant == "mini":
        options["mini_r"] = config.get("mini_r", 1)
    return pc.AdapterSpec(
        method="miss",
        targets=targets,
        options=options,
        train_modules=theirs.modules,
        dropout=0.0 if variant == "bat" else config.get("miss_dropout", 0.0),  # their 'bat' never applies it
        dtype=_dtype(theirs),
        base_model=config.get("base_model_name_or_path") or None,
    )


def _dtype(theirs: Theirs) -> Any:
    """The narrowest of our dtypes that holds all of theirs."""
    common = torch.bool
    for tensor in (*theirs.blocks.values(), *theirs.whole.values()):
        common = torch.promote_types(common, tensor.dtype)
    return next((name for name, dtype in DTYPE_OF_NAME.items() if dtype == common), "float32")


def _plan(source_dir: str | Path, theirs: Theirs, model: nn.Module) -> pc.Plan:
    """A plan of exactly the layers that have a tensor: with names as targets if these select the same layers, else paths."""
    paths = tuple(theirs.blocks)
    if strangers := [path for path in paths if path not in dict(model.named_modules())]:
        raise pc.CheckpointError(f"'{source_dir}' does not fit this base: the base has no layer '{strangers[0]}'")
    exact = pc.plan(model, _spec(source_dir, theirs, paths))
    listed_targets = theirs.config.get("target_modules")
    if isinstance(listed_targets, list):
        names = tuple(sorted(name for name in listed_targets if any(named(name, path) for path in paths)))
        try:
            made = pc.plan(model, _spec(source_dir, theirs, names))
        except pc.PeftCoreError:
            return exact
        if made.sites == exact.sites:
            return made
    return exact


def _recorded_base(source_dir: str | Path, theirs: Theirs) -> nn.Module:
    """The model of the directory that the adapter names, on the meta device."""
    recorded = theirs.config.get("base_model_name_or_path") or ""
    if not (Path(recorded) / "config.json").is_file():
        raise pc.CheckpointError(
            f"'{source_dir}' names the base '{recorded}', which is not a checkpoint directory on this machine; "
            "pass base=, the model or a directory with its config.json"
        )
    return meta_model(recorded)


def _values(source_dir: str | Path, theirs: Theirs, made: pc.Plan) -> dict[str, Tensor]:
    """Key of each trainable tensor → their value, in the spec's dtype.

    Raises:
        CheckpointError: one is missing, left over, or of another shape.
    """
    found = {keys["D"]: theirs.blocks[path] for path, keys in made.borrowed().items()}
    left = dict(theirs.whole)
    for path, parameters in made.trained.items():
        for local, key in parameters.items():
            value = left.pop(f"{path}.{local}", None)
            if value is None:
                raise pc.CheckpointError(f"'{source_dir}': '{path}.{local}' is missing")
            if key in found and not torch.equal(found[key], value):
                raise pc.CheckpointError(
                    f"'{source_dir}': '{path}.{local}' and '{key}' are one tensor in the base, but have different values here"
                )
            found[key] = value
    if left:
        raise pc.CheckpointError(f"'{source_dir}' does not fit this base: the base has no '{next(iter(left))}'")
    for key, tensor in made.tensors():
        if tuple(found[key].shape) != tensor.shape:
            raise pc.CheckpointError(
                f"'{source_dir}' does not fit this base: '{key}' has shape {list(found[key].shape)}, "
                f"expected {list(tensor.shape)}"
            )
    return {key: value.to(made.spec.torch_dtype) for key, value in found.items()}


def _their_options(source_dir: str | Path, header: AdapterFile) -> Options:
    """The options, which must be the same for all layers and known to their library.

    Raises:
        CheckpointError: as `to_hf_peft`.
    """
    sites = header.site_list()
    options: Options = sites[0].options
    if different := [site.path for site in sites if site.options != options]:
        raise pc.CheckpointError(
            f"'{source_dir}': '{different[0]}' and '{sites[0].path}' have different options, and MissConfig has one set for all"
        )
    if options.variant == "expand" or not options.interleaved:
        what = "variant 'expand'" if options.variant == "expand" else "layout 'contiguous'"
        raise pc.CheckpointError(
            f"'{source_dir}' has {what}, which Hugging Face PEFT cannot express; export it as LoRA instead"
        )
    if transposed := [site.path for site in sites if site.transposed]:
        raise pc.CheckpointError(
            f"'{source_dir}': '{transposed[0]}' is a transposed layer (Conv1D), which MissConfig cannot adapt"
        )
    return options


def _their_targets(paths: list[str], shapes: Mapping[str, Any], trained: Mapping[str, Any]) -> list[str]:
    """Their `target_modules` for these layers: the module types if these select no other layer, else the paths."""
    types = sorted({module_type(path) for path in paths})
    reached = {path for path in shapes if any(named(name, path) for name in types)}
    return types if reached == set(paths) and not trained else paths
