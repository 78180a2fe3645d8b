"""README.md of an export: what model hubs read (front matter), what it is, how to load it, how well it was verified."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from peft_core.adapter_file import AdapterFile
from peft_core.errors import size
from peft_core.model_card import hub_name

from .adapter_files import AdapterFiles
from .output import read_config
from .reports import LoraReport, MergeReport, OnnxReport

NAME = "README.md"
_BEGIN, _END = "<!-- verification -->", "<!-- /verification -->"
# What a base's card says that holds for what is made from it.
_HEADS = {
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "LMHeadModel": ("AutoModelForCausalLM", "text-generation"),
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
}
"""How the name of a class ends → the transformers class that loads it, and what hubs call its task."""
_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")


def merged(base: Path, adapters: Sequence[AdapterFiles], report: MergeReport) -> str:
    """The card of a merged checkpoint."""
    headers = [adapter.header for adapter in adapters]
    weights = [f" (weight {adapter.weight:g})" if adapter.weight != 1.0 else "" for adapter in adapters]
    what = [f"`{header.method.name}`{weight}" for header, weight in zip(headers, weights, strict=True)]
    auto = _auto_class(headers[0].base.architecture)
    lines = [
        f"The weights of {_base_text(base, headers[0])} with {' and '.join(what)} merged in by `peft-export`: a plain model, "
        "which needs nothing of peft-core to run.",
        "",
        f"- Tensors: {report.tensors} ({report.merged} merged, {report.trained} trained in full)",
        f"- Size: {size(report.bytes)}, {report.dtype}",
        *(f"- {note}" for note in report.notes),
        "",
        "```python",
        f"from transformers import {auto}, AutoTokenizer",
        "",
        f"model = {auto}.from_pretrained('path/to/this/directory', dtype='auto')",
        "```",
        *_shell("vllm serve path/to/this/directory", auto),
    ]
    return _card(base, headers, "transformers", "merge", f"{what[0]} merged", lines)


def lora(base: Path, header: AdapterFile, report: LoraReport, fields: Mapping[str, Any]) -> str:
    """The card of a lowered adapter. `fields`: of the base's configuration; see `merge_plan.head_config`."""
    classes = f", num_labels={len(fields['id2label'])}" if "id2label" in fields else ""
    padding = [f"base.config.pad_token_id = {fields['pad_token_id']}"] if "pad_token_id" in fields else []
    worst = max((site.error for site in report.sites), default=0.0)
    exact = (
        f"with a relative error of up to {worst:.2e} per layer ({' and '.join(report.losses)})" if worst else "exactly"
    )
    auto = _auto_class(header.base.architecture)
    lines = [
        f"A standard LoRA adapter for {_base_text(base, header)}, lowered {exact} from a `{header.method.name}` adapter by "
        "`peft-export`.",
        "",
        f"- Rank {report.rank}, {len(report.sites)} layers, {size(report.bytes)}",
        *([f"- Trained in full: {', '.join(header.trained)}"] if header.trained else []),
        *(f"- {note}" for note in report.notes),
        "",
        "```python",
        f"from transformers import {auto}",
        "from peft import PeftModel",
        "",
        f"base = {auto}.from_pretrained('{base_name(base, header) or 'BASE'}'{classes})",
        *padding,
        "model = PeftModel.from_pretrained(base, 'path/to/this/directory')",
        "```",
        *_shell(report.command, auto),
    ]
    return _card(base, [header], "peft", "lora", f"{header.method.name} as LoRA", lines)


def onnx(base: Path, headers: Sequence[AdapterFile], report: OnnxReport) -> str:
    """The card of an ONNX model."""
    what = " and ".join(f"`{header.method.name}`" for header in headers)
    files = ", ".join(f"`{file}`" for file in report.files)
    lines = [
        f"{_base_text(base, headers[0])} with {what} merged in, as ONNX, by `peft-export`.",
        "",
        f"- Precision: {report.precision}" + (f", {report.blocks}" if report.blocks else ""),
        f"- Files: {files}, {size(report.bytes)}",
        *(f"- `{name}.onnx` takes {', '.join(_brief(names))}" for name, names in report.inputs.items()),
        *(f"- {note}" for note in report.notes),
        "",
        "```python",
        "import onnxruntime",
        "",
        *(f"{name} = onnxruntime.InferenceSession('path/to/this/directory/{name}.onnx')" for name in report.inputs),
        "```",
    ]
    return _card(base, headers, "onnx", "onnx", f"{what} as ONNX".replace("`", ""), lines)


def _brief(names: Sequence[str]) -> list[str]:
    """Names, the layers' caches as one."""
    return list(dict.fromkeys(f"`{re.sub(r'[.][0-9]+[.]', '.N.', name)}`" for name in names))


def with_verification(text: str, lines: Iterable[str]) -> str:
    """The card with these lines as its section on verification."""
    section = "\n".join([_BEGIN, "## Verification", "", *lines, _END])
    before, found, rest = text.partition(_BEGIN)
    if not found:
        return f"{text.rstrip()}\n\n{section}\n"
    return before + section + rest.partition(_END)[2]


def _card(base: Path, headers: Sequence[AdapterFile], library: str, tag: str, title: str, lines: Sequence[str]) -> str:
    front: dict[str, Any] = {}
    if name := base_name(base, headers[0]):
        front["base_model"] = name
        front["base_model_relation"] = "adapter" if library == "peft" else "finetune"
    front["library_name"] = library
    front.update(_front_matter(base / NAME))
    architecture = headers[0].base.architecture
    if architecture not in read_config(base).get("architectures", [architecture]):
        front.pop("pipeline_tag", None)  # another head has another task
    if task := next((task for ending, (_, task) in _HEADS.items() if architecture.endswith(ending)), None):
        front.setdefault("pipeline_tag", task)
    front["tags"] = list(dict.fromkeys(["peft-core", tag, *(header.method.name for header in headers)]))
    specs = [line for header in headers for line in ("```json", json.dumps(header.spec, indent=2), "```", "")]
    text = [
        "---",
        yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        "",
        f"# {title}",
        "",
        *lines,
        "",
    ]
    unverified = (
        "Not verified yet: `peft-core verify THIS --base BASE --adapter ADAPTER` compares it with the adapted model."
    )
    return with_verification("\n".join([*text, "## Adapter", "", *specs]), [unverified])


def _front_matter(path: Path) -> dict[str, Any]:
    """What the base's own card says about licence, language and task."""
    try:
        found = re.match(r"---\n(.*?)\n---", path.read_text(encoding="utf-8"), re.DOTALL)
        # Everything as text: to YAML, the language code of Norwegian is the same as false.
        front = yaml.load(found[1], yaml.BaseLoader) if found else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    if not isinstance(front, Mapping):
        return {}
    return {key: front[key] for key in _KEPT if front.get(key) not in (None, "", "null", "~")}


def base_name(base: Path, header: AdapterFile) -> str:
    """The base's name on the hub, as far as it is known."""
    cached = re.search(r"models--([^/]+)--([^/]+)/snapshots/", f"{base.resolve()}/")
    if cached:
        return f"{cached[1]}/{cached[2]}"
    return hub_name(header)


def _base_text(base: Path, header: AdapterFile) -> str:
    name = base_name(base, header)
    return f"`{name}`" if name else f"a `{header.base.architecture}`"


def _auto_class(architecture: str) -> str:
    """The transformers class that loads this architecture: where several would, its own."""
    return next(
        (auto for ending, (auto, _) in _HEADS.items() if architecture.endswith(ending)), architecture or "AutoModel"
    )


def _shell(command: str, auto: str) -> list[str]:
    return ["", "```sh", command, "```"] if command and auto == "AutoModelForCausalLM" else []
