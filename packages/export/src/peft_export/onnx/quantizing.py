"""The weights of a graph: turned as runtimes want them, or in blocks of 8 or 4 bits by ONNX Runtime's quantizer.

A weight that several operators read is stored once, whatever they do with it: a tied embedding and output head share one
matrix, in full precision (read as it is, and through a Transpose) and quantized (read by GatherBlockQuantized and MatMulNBits,
which lay it out alike).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from peft_core import MergeError

from .tracing import weight_transposes

BLOCK_SIZES = (16, 32, 64, 128)
_DOMAIN = "com.microsoft"
# Embeddings, and with them tied heads, lose the most at 4 bits.
_TABLE_BITS = 8


@dataclass(frozen=True)
class Share:
    """How many of a graph's weights, in elements, are quantized: by bits, and how many it has in all."""

    quantized: Mapping[int, int]
    total: int


@dataclass(frozen=True)
class _Blocks:
    """A weight in blocks along its first dimension.

    Attributes:
        parts: its numbers, their scales and their zeros, as values of the graph. shape: the weight's, [in, out].
        accuracy: 4 multiplies in integers, with activations rounded to 8 bits; 0 in the activations' own type.
    """

    parts: tuple[Any, Any, Any]
    shape: tuple[int, int]
    bits: int
    size: int
    accuracy: int


@dataclass(frozen=True)
class _Use:
    """An operator that multiplies by a weight, or looks rows up in it. `rows`: the weight is [out, in] there."""

    node: Any
    weight: Any
    rows: bool


def turn_weights(model: Any) -> None:
    """Store weights [in, out], as runtimes multiply by them, where nothing else reads them; a tied one keeps its Transpose."""
    from onnxscript import ir

    for node in weight_transposes(model):
        weight, turned = node.inputs[0], node.outputs[0]
        if any(user.op_type != "Transpose" for user in weight.consumers()):
            continue
        turned.name = f"{weight.name}.T"
        stored = _initializer(model, turned.name, _turned(weight.const_value))
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], [], [turned], [stored])
        if not weight.consumers():
            del model.graph.initializers[weight.name]


def quantize(model: Any, bits: int, block_size: int) -> Share:
    """Quantize every weight that only matrix products and look-ups read, in blocks along the dimension that is summed over.

    Raises:
        MergeError: there is none.
    """
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer

    total = sum(value.const_value.size for value in model.graph.initializers.values() if _floating(value))
    quantized: Counter[int] = Counter()
    for weight, uses in _quantizable(model):
        own = max(bits, _TABLE_BITS) if any(use.node.op_type == "Gather" for use in uses) else bits
        quantized[own] += weight.const_value.size
        config = DefaultWeightOnlyQuantConfig(block_size=block_size, is_symmetric=False, bits=own)
        quantizer = DefaultWeightOnlyQuantizer(config)
        matrix = weight.const_value.numpy()
        columns = np.ascontiguousarray(matrix.T if uses[0].rows else matrix, dtype=np.float32)  # [in, out]
        arrays = zip(("blocks", "scales", "zeros"), quantizer.qbits_block_quant(columns), strict=True)
        blocks, scales, zeros = (_initializer(model, f"{weight.name}.{part}", array) for part, array in arrays)
        # At 8 bits the rounding of activations would be the larger error; at 4 it is not, and integers are faster.
        accuracy = 4 if bits < 8 else 0
        stored = _Blocks((blocks, scales, zeros), columns.shape, own, block_size, accuracy)
        for use in uses:
            write = _looked_up if use.node.op_type == "Gather" else _multiplied
            write(model, use.node, stored)
        del model.graph.initializers[weight.name]
    if not quantized:
        raise MergeError(
            "no weight of the model can be quantized: it multiplies by none as ONNX Runtime's quantizer knows it"
        )
    model.opset_imports[_DOMAIN] = 1
    return Share(quantized, total)


def _quantizable(model: Any) -> Iterator[tuple[Any, list[_Use]]]:
    """Weights with all their uses, where each use can be quantized and all read the same dimension as the summed one."""
    for weight in list(model.graph.initializers.values()):
        if not _floating(weight) or len(weight.const_value.shape) != 2:
            continue
        uses = [_use(weight, user) for node in weight.consumers() for user in _readers(node)]
        known = [use for use in uses if use is not None]
        products = any(use.node.op_type != "Gather" for use in known)
        if len(known) == len(uses) and len({use.rows for use in known}) == 1 and (products or _large(weight)):
            yield weight, known


def _readers(node: Any) -> list[Any]:
    """The operators that read a weight at last, where this node reads it: seen through a Transpose."""
    turned = node.op_type == "Transpose"
    return list(node.outputs[0].consumers()) if turned else [node]


def _use(weight: Any, node: Any) -> _Use | None:
    """How an operator uses a weight; None if no quantized operator can take its place."""
    place = 0 if node.op_type == "Gather" else 1
    if node.op_type not in ("MatMul", "Gemm", "Gather") or len(node.inputs) <= place:
        return None
    read = node.inputs[place]
    turned = read is not weight
    if turned and not _transposed(read, weight):
        return None
    if node.op_type == "Gather":
        return None if turned or node.attributes.get_int("axis", 0) != 0 else _Use(node, weight, True)
    if node.op_type == "Gemm":
        attributes = node.attributes
        plain = attributes.get_float("alpha", 1.0) == attributes.get_float("beta", 1.0) == 1.0
        if not plain or attributes.get_int("transA", 0):
            return None
        return _Use(node, weight, turned != bool(attributes.get_int("transB", 0)))
    return _Use(node, weight, turned)


def _transposed(value: Any, weight: Any) -> bool:
    node = value.producer() if value is not None else None
    return node is not None and node.op_type == "Transpose" and node.inputs[0] is weight


def _multiplied(model: Any, node: Any, stored: _Blocks) -> None:
    """MatMulNBits for a MatMul or a Gemm; a Gemm's bias is added."""
    from onnxscript import ir

    attributes = {"K": stored.shape[0], "N": stored.shape[1], "bits": stored.bits, "block_size": stored.size}
    if stored.accuracy:
        attributes["accuracy_level"] = stored.accuracy
    product = ir.node(
        "MatMulNBits", [node.inputs[0], *stored.parts], attributes=attributes, domain=_DOMAIN, name=node.name
    )
    new = [product]
    bias = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
    if bias is not None:
        product.outputs[0].name = f"{node.outputs[0].name}.product"
        new.append(ir.node("Add", [product.outputs[0], bias]))
    _exchange(model, node, new)


def _looked_up(model: Any, node: Any, stored: _Blocks) -> None:
    """GatherBlockQuantized for a Gather; rows that were filled up to whole blocks are cut."""
    from onnxscript import ir

    width, rows = stored.shape
    blocks, scales, zeros = stored.parts
    size = _constant(model, [rows, blocks.const_value.size // rows])
    table = ir.node("Reshape", [blocks, size], name=f"{node.name}.table")
    attributes = {"bits": stored.bits, "block_size": stored.size, "gather_axis": 0, "quantize_axis": 1}
    inputs = [table.outputs[0], node.inputs[1], scales, zeros]
    found = ir.node("GatherBlockQuantized", inputs, attributes=attributes, domain=_DOMAIN, name=node.name)
    new = [table, found]
    if width % stored.size:
        bounds = [_constant(model, [bound]) for bound in (0, width, -1)]
        new.append(ir.node("Slice", [found.outputs[0], *bounds], name=f"{node.name}.cut"))
    _exchange(model, node, new)


def _exchange(model: Any, node: Any, new: list[Any]) -> None:
    """New operators, the last of which gives what the old one gave, in its place; its Transpose goes, if it had one."""
    from onnxscript import ir

    turned = [value.producer() for value in node.inputs if value is not None and value.producer() is not None]
    old, result = node.outputs[0], new[-1].outputs[0]
    result.name, result.shape, result.type = old.name, old.shape, old.type
    ir.convenience.replace_nodes_and_values(model.graph, node, [node], new, [old], [result])
    for other in turned:
        if other.op_type == "Transpose" and not other.outputs[0].consumers() and other.inputs[0].is_initializer():
            model.graph.remove(other, safe=True)


def _turned(tensor: Any) -> Any:
    """The transposed tensor, made when it is written."""
    from onnxscript import ir

    def turn() -> Any:
        return ir.tensor(np.ascontiguousarray(tensor.numpy().T))

    return ir.LazyTensor(turn, dtype=tensor.dtype, shape=ir.Shape(reversed(tensor.shape)))


def _floating(value: Any) -> bool:
    return bool(value.const_value.dtype.is_floating_point())


def _large(value: Any) -> bool:
    """Whether a table is a vocabulary rather than positions or kinds of tokens, which are small and stay exact."""
    return value.const_value.size >= 1 << 20


def _initializer(model: Any, name: str, tensor: Any) -> Any:
    from onnxscript import ir

    stored = ir.tensor(tensor, name=name) if isinstance(tensor, np.ndarray) else tensor
    value = ir.Value(name=name, shape=stored.shape, type=ir.TensorType(stored.dtype), const_value=stored)
    model.graph.register_initializer(value)
    return value


def _constant(model: Any, numbers: list[int]) -> Any:
    name = f"numbers.{'.'.join(map(str, numbers))}"
    known = model.graph.initializers.get(name)
    return known if known is not None else _initializer(model, name, np.array(numbers, dtype=np.int64))
