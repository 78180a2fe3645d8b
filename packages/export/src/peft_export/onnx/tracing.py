"""From a module to an ONNX graph that still names its weights, through torch's exporter."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from peft_core import ModelError

from .graphs import Graph

# Every runtime of the last years knows it, and what torch's exporter writes needs no newer one.
OPSET = 18
PARAMETERS = "parameters"
# What a value's test is decided to say; see _NeverFinite.
_FINITE = {"isfinite": False, "isinf": True, "isnan": True}
# How torch names the line of a model that it could not decide.
_DECISION = re.compile(r'raised this error:\n\s*File "(?P<file>[^"\n]+)", line (?P<line>\d+)[^\n]*\n(?P<code>[^\n]*)')
_CAUSE = re.compile(r"data-dependent.*?Caused by: \((?P<file>[^:\n]+):(?P<line>\d+)", re.DOTALL)


def trace(graph: Graph) -> Any:
    """The graph as an `onnxscript.ir.Model`; its weights are the module's own tensors, under their names.

    Weights stay as torch has them, [out, in], behind a Transpose, so that it can be seen which are shared. The names of the
    parameters that are computed with are in the model's `meta[PARAMETERS]`: the graph's own do not tell, since equal tensors
    are one there.

    Raises:
        ModelError: an operator of the model has no ONNX form, or the model cannot be traced.
    """
    from onnxscript import optimizer

    shapes = {"inputs": {name: dict(graph.axes.get(name, {})) for name in graph.inputs}}
    try:
        with _quiet(), torch.no_grad(), _NeverFinite():
            program = torch.onnx.export(
                graph.module.eval(),
                (),
                kwargs={"inputs": graph.inputs},
                dynamic_shapes=shapes,
                input_names=list(graph.inputs),
                output_names=list(graph.outputs),
                opset_version=OPSET,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
            assert program is not None
            model: Any = program.model
            optimizer.optimize_ir(model, should_fold=_should_fold)
            model.meta[PARAMETERS] = _parameters(program.exported_program)
    except torch.onnx.errors.OnnxExporterError as error:
        raise ModelError(_explained(graph, error)) from error
    _tidy(model)
    return model


def _parameters(program: Any) -> frozenset[str]:
    """The parameters that a traced program uses."""
    names = program.graph_signature.inputs_to_parameters
    used = (node for node in program.graph.nodes if node.op == "placeholder" and node.users)
    return frozenset(names[node.name] for node in used if node.name in names)


def weight_transposes(model: Any) -> list[Any]:
    """The Transpose nodes that turn a weight [out, in] around."""
    return [node for node in model.graph if _turns_weight(node)]


def _should_fold(node: Any) -> bool | None:
    return False if _turns_weight(node) else None


def _turns_weight(node: Any) -> bool:
    if node.op_type != "Transpose":
        return False
    weight = node.inputs[0]
    return weight.is_initializer() and weight.const_value.shape.rank() == 2


def _tidy(model: Any) -> None:
    """Leave out what says where and how it was traced: paths of this machine, among others. Names as in the checkpoint."""
    from onnxscript import ir

    model.producer_name, model.producer_version = "peft-export", ""
    model.metadata_props.clear()
    for graph in model.graphs():
        graph.metadata_props.clear()
        for node in graph:
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
        for value in (*graph.inputs, *graph.initializers.values()):
            value.metadata_props.clear()
    for value in model.graph.outputs:  # torch says "past + sequence"
        value.shape = ir.Shape(["total" if "+" in str(size) else size for size in value.shape])
    for value in list(model.graph.initializers.values()):
        name = value.name.removeprefix("model.")
        if name != value.name and name not in model.graph.initializers:
            value.name = value.const_value.name = name


def _explained(graph: Graph, error: BaseException) -> str:
    """One line: the operators without an ONNX form, or the first reason that torch gives."""
    what = type(getattr(graph.module, "model", graph.module)).__name__
    reasons = []
    cause: BaseException | None = error
    while cause is not None:
        reasons.append(str(cause))
        cause = cause.__cause__
    text = "\n".join(reasons)
    operators = dict.fromkeys(re.findall(r"No ONNX function found for <OpOverload\(op='([\w.:]+)'", text))
    operators |= dict.fromkeys(re.findall(r"No decompositions registered for ([\w.:]+)", text))
    if operators:
        return f"{what} cannot be written as ONNX: there is no ONNX form of {', '.join(operators)}"
    if place := _DECISION.search(text) or _CAUSE.search(text):
        line = place.groupdict().get("code", "").strip()
        return (
            f"{what} cannot be traced for ONNX: it decides by values that are known only when it runs, in "
            f"{Path(place['file']).name}, line {place['line']}" + (f": {line[:200]}" if line else "")
        )
    lines = [line.strip() for line in reasons[-1].splitlines() if line.strip()] or [type(error).__name__]
    last = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
    return f"{what} cannot be traced for ONNX: {last[:300]}"


class _NeverFinite(TorchFunctionMode):
    """Whether all values are finite, which cannot be known while tracing, is answered with no.

    Models that ask clamp what has overflowed in float16 then. So the clamp is in the graph, where it leaves finite values as they
    are.
    """

    def __init__(self) -> None:
        super().__init__()
        # Tensors by id, with what they are decided to be; kept, so that no other gets the id of one.
        self._decided: dict[int, tuple[Tensor, bool]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        known = self._decided.get(id(args[0])) if args else None
        if name == "__bool__" and known is not None:
            return known[1]
        found = func(*args, **(kwargs or {}))
        if name in _FINITE:
            self._decided[id(found)] = found, _FINITE[name]
        elif name in ("all", "any") and known is not None:
            self._decided[id(found)] = found, known[1]
        return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's remarks on how it traces, and the graphs that it prints where it fails."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
