"""An adapter and its base as an ONNX model: merged, traced, quantized if need be, written with what runtimes ask for."""

from __future__ import annotations

import gc
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any

from torch import nn

from peft_core import CheckpointError, ModelError, SpecError
from peft_core.errors import listed, suggestion

from .. import card, output, running
from ..adapter_files import Adapters, open_adapters
from ..checkpoint_files import all_finite
from ..merge_plan import collect_changes
from ..reports import OnnxReport
from ..streaming import merge
from . import genai
from .graphs import MODEL, Graph, graphs
from .installed import require_packages
from .quantizing import BLOCK_SIZES, Share, quantize, turn_weights
from .tracing import PARAMETERS, trace
from .writing import write_graphs

PRECISIONS: Mapping[str, int] = {"fp32": 32, "fp16": 16, "int8": 8, "int4": 4}
"""Bits of a weight. int8 and int4 are of the weights alone; what is computed with them stays float32."""


def export_onnx(
    base: str | Path,
    adapters: Adapters,
    out: str | Path,
    *,
    precision: str = "fp32",
    block_size: int = 32,
    untie: bool = False,
    overwrite: bool = False,
    status: Callable[[str], None] = lambda text: None,
) -> OnnxReport:
    """Write the merged model as ONNX: `model.onnx`, or `encoder.onnx` and `decoder.onnx`, and `model.onnx.data`.

    Args:
        base, adapters, out, untie, overwrite: as for `merge`.
        precision: `fp32`, `fp16`, `int8` or `int4`. block_size: how many quantized weights share a scale.
        status: is told what is being done.

    Raises:
        ModelError: a package is missing, or the model cannot be written as ONNX. SpecError: no such precision.
        CheckpointError, MergeError: see `merge`.
    """
    require_packages()
    if precision not in PRECISIONS:
        near = suggestion(precision, PRECISIONS)
        raise SpecError(f"no precision '{precision}'{near}; there are {listed(PRECISIONS)}")
    if block_size not in BLOCK_SIZES:
        raise SpecError(f"block_size is {block_size}; it is one of {listed(map(str, BLOCK_SIZES))}")
    from peft_core.reporting import peak_memory

    started = time.perf_counter()
    source = Path(base)
    parts = open_adapters(adapters)
    headers = [part.header for part in parts]
    generation = output.read_config(source, "generation_config.json")
    weights = {str(part.directory): part.weight for part in parts}
    with output.export_directory(out, [source, *weights], overwrite) as temporary:
        status("merging")
        merged = temporary / ".merged"
        try:
            merge(source, weights, merged, dtype="float32", untie=untie)
        except CheckpointError as error:
            # What cannot be written here cannot be written to `out`, which its own error names.
            if isinstance(error.__cause__, OSError):
                raise error.__cause__ from None
            raise
        architecture = headers[0].base.architecture
        model = running.load_merged(merged, architecture, "float16" if precision == "fp16" else "float32")
        if precision == "fp16":
            _check_finite(model)
        _choose_kernels(model)
        found = graphs(model)
        models = {}
        for graph in found:
            status(f"tracing {graph.name}")
            models[graph.name] = trace(graph)
        shares = []
        for name, traced in models.items():
            bits = PRECISIONS[precision]
            if bits <= 8:
                status(f"quantizing {name}")
                shares.append(quantize(traced, bits, block_size))
            turn_weights(traced)
        status("writing")
        files = write_graphs(models, temporary)
        output.copy_rest(merged, temporary, {output.MARKER, card.NAME})
        used = {
            graph.module.get_parameter(name).data_ptr()
            for graph in found
            for name in models[graph.name].meta[PARAMETERS]
        }
        notes = [*_notes(model), *_left_out(model, found, used, collect_changes(parts).keys())]
        notes += _write_genai(temporary, found, model, generation)
        shutil.rmtree(merged)
        by_bits = _by_bits(shares)
        report = OnnxReport(
            out=str(out),
            base=str(base),
            adapters=weights,
            architecture=architecture,
            precision=precision,
            block_size=block_size if shares else None,
            inputs={graph.name: tuple(graph.inputs) for graph in found},
            outputs={graph.name: graph.outputs for graph in found},
            weights=sum(parameter.numel() for parameter in model.parameters() if parameter.data_ptr() in used),
            quantized=sum(by_bits.values()),
            by_bits=by_bits,
            files=tuple(files),
            bytes=sum((temporary / file).stat().st_size for file in files),
            seconds=round(time.perf_counter() - started, 3),
            peak_memory=peak_memory(),
            notes=tuple(notes),
        )
        output.write_json(temporary / output.MARKER, output.marker("onnx", headers, {}, report.to_json()))
        (temporary / card.NAME).write_text(card.onnx(source, headers, report), encoding="utf-8")
    del model, models, found, traced
    gc.collect()  # a traced model is full of cycles, and holds all weights
    return report


def _check_finite(model: nn.Module) -> None:
    """Raises ModelError where a weight is infinite in float16."""
    for name, parameter in model.named_parameters():
        if not all_finite(parameter):
            raise ModelError(f"'{name}' has values that are too large for fp16; export it as fp32, int8 or int4")


def _choose_kernels(model: Any) -> None:
    """Experts as products of gathered weights, which have an ONNX form, instead of grouped products, which have none."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")


def _by_bits(shares: list[Share]) -> dict[int, float]:
    """Bits → the share of all graphs' weights that have so many, the fewest first."""
    total = sum(share.total for share in shares)
    found = sum((Counter(share.quantized) for share in shares), Counter())
    return {bits: found[bits] / total for bits in sorted(found)}


def _notes(model: nn.Module) -> list[str]:
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if embedding is not None and head is not None and embedding.weight is head.weight:
        return ["the embedding and the output head are one matrix, stored once"]
    return []


def _left_out(model: nn.Module, found: list[Graph], used: Set[int], changed: Set[str]) -> list[str]:
    """A remark on what the graphs do without: the tower for images of a model of images and text, above all.

    Args:
        used: addresses of the parameters in the graphs. changed: names of those that an adapter changes.
    """
    left = [name for name, parameter in model.named_parameters() if parameter.data_ptr() not in used]
    if not left:
        return []
    parts = dict.fromkeys(".".join(name.split(".")[:2]) for name in left)
    inputs = [name for graph in found for name in graph.inputs if not name.startswith("past_key_values.")]
    note = f"not in the graph, which takes {listed(inputs)} alone: {listed(parts, 4)}"
    if adapted := [name.removesuffix(".weight") for name in left if name in changed]:
        lost = f"{len(adapted)} of the {len(changed)} layers that the adapter changes"
        note += f"; {lost} are lost with that ({listed(adapted, 3)})"
    return [note]


def _write_genai(directory: Path, found: list[Graph], model: nn.Module, generation: Mapping[str, Any]) -> list[str]:
    """`genai_config.json` for a model that generates by itself; otherwise a remark."""
    graph = found[0]
    if graph.name != MODEL or "logits" not in graph.outputs or len(graph.outputs) == 1:
        return []
    config, why_not = genai.genai_config(graph, model.config, generation)
    if why_not:
        return [why_not]
    output.write_json(directory / genai.CONFIG, config)
    return []
