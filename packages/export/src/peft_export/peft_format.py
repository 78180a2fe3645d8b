"""A LoRA adapter directory as Hugging Face PEFT reads it: its files, its keys, and its configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from peft_core.sites import module_type

from . import card
from .adapter_files import AdapterFiles

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Before the path of every layer in the file of tensors."""
# In a model with stacked experts PEFT takes these, as `target_modules`, for its experts, whatever the path before them.
_EXPERTS = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
# With a task, PEFT also keeps a copy of every module whose name ends so, which then must be in the file.
_HEADS = ("classifier", "score")


def peft_config(
    base: Path, source: AdapterFiles, config: Mapping[str, Any], rank: int, ranks: Mapping[str, int]
) -> dict[str, Any]:
    """`adapter_config.json` of a lowered adapter. The scale is in B, so alpha equals the rank everywhere.

    Args:
        config: the base's `config.json`. rank: the adapter's. ranks: path of a layer → its own rank.
    """
    header = source.header
    parameters = target_parameters(source)
    pattern = {re.escape(parameters.get(path, path)): own for path, own in ranks.items() if own != rank}
    return {
        "alpha_pattern": pattern,
        "auto_mapping": None,
        "base_model_name_or_path": card.base_name(base, header) or str(base),
        "bias": "none",
        "fan_in_fan_out": any(site.transposed for site in source.sites.values()),
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "modules_to_save": _saved_modules(source) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": pattern,
        "revision": None,
        "target_modules": _target_modules(source, source.sites.keys() - parameters),
        **({"target_parameters": sorted(parameters.values())} if parameters else {}),
        "task_type": _task(source, bool(config.get("is_encoder_decoder"))),
        "use_dora": False,
        "use_rslora": False,
    }


def target_parameters(source: AdapterFiles) -> dict[str, str]:
    """Layer → its weight's name, for the layers that PEFT would take for stacked experts if `target_modules` named them."""
    shapes = source.header.base.shapes.items()
    if not any(len(shape) == 3 and name.endswith((".gate_up_proj", ".down_proj")) for name, shape in shapes):
        return {}
    return {path: f"{path}.weight" for path in source.sites if module_type(path) in _EXPERTS}


def _target_modules(source: AdapterFiles, sites: Set[str]) -> list[str]:
    """Types of these sites, if every module that is called so is one of them; else their whole paths."""
    types = {source.sites[path].type for path in sites}
    alike = {path for path in _modules(source) if module_type(path) in types}
    return sorted(types) if alike == sites else sorted(sites)


def _saved_modules(source: AdapterFiles) -> list[str]:
    """The modules trained in full, each by a name that no other module's path ends in, which PEFT would save, too."""
    trained = source.header.trained
    others = _modules(source) - trained.keys()
    return [f"model.{path}" if any(other.endswith(path) for other in others) else path for path in trained]


def _modules(source: AdapterFiles) -> set[str]:
    """Every module with parameters, and what holds it."""
    names = [name.split(".") for name in source.header.base.shapes]
    return {".".join(parts[:count]) for parts in names for count in range(1, len(parts) + 1)}


def _task(source: AdapterFiles, two_sided: bool) -> str | None:
    """PEFT's name of the task, where it has one for this architecture."""
    architecture, trained = source.header.base.architecture, source.header.trained
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    if architecture.endswith("ForConditionalGeneration") and two_sided:
        return "SEQ_2_SEQ_LM"
    if not trained or not {path for path in _modules(source) if path.endswith(_HEADS)} <= trained.keys():
        return None
    tasks = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}
    return next((task for ending, task in tasks.items() if architecture.endswith(ending)), None)
