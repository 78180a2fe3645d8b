"""Which modules are not called, or not always, because their framework uses their weights itself: it would pass an adapter by."""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from .subclassing import plain_class

# Those that a parent calls on one of its paths and not on another (a kernel's, a fast one in evaluation): class → children.
_SOMETIMES = {
    "TransformerEncoderLayer": ("linear1", "linear2", "norm1", "norm2", "self_attn"),
    "Gemma3nTextAltUp": ("correction_coefs",),
    "LSHSelfAttention": ("query_key", "value"),  # Reformer's, with a cache
    **dict.fromkeys(("MambaMixer", "FalconMambaMixer"), ("conv1d", "dt_proj", "out_proj", "x_proj")),
    **dict.fromkeys(("JambaMambaMixer", "ZambaMambaMixer"), ("conv1d", "dt_proj")),
    **dict.fromkeys(
        (
            "Mamba2Mixer",
            "BambaMixer",
            "Zamba2MambaMixer",
            "FalconH1Mixer",
            "GraniteMoeHybridMambaLayer",
            "NemotronHMamba2Mixer",
        ),
        ("conv1d", "out_proj"),
    ),
}
# Those whose weights RWKV divides in evaluation, and multiplies again in training.
_RESCALED = {"RwkvSelfAttention": ("output",), "RwkvFeedForward": ("value",)}
# What may be asked of a module without calling it.
_HARMLESS = frozenset({"weight", "bias", "in_features", "out_features"})
_DESCRIBES = frozenset({"dtype", "device", "shape", "ndim", "requires_grad", "size", "is_meta"})
_SETS_UP = frozenset({"__init__", "_init_weights", "init_weights", "reset_parameters", "tie_weights", "_tie_weights"})
_HANDS_OUT = frozenset({"get_input_embeddings", "get_output_embeddings"})
_LOOKS_AROUND = frozenset({"_modules", "children", "named_children", "modules", "named_modules", "get_submodule"})


def bypassed(parent: nn.Module, child: str) -> bool:
    """Whether this child's weight is read or changed without its being called, always or on some path."""
    if getattr(parent, "slow_but_exact", False) and getattr(parent, "pretraining_tp", 1) > 1:  # Bloom, slice by slice
        return child in ("dense", "dense_4h_to_h")
    kind = plain_class(type(parent))
    if getattr(getattr(parent, "config", None), "rescale_every", 0) > 0:
        return child in _RESCALED.get(kind.__name__, ())
    return any(child in _SOMETIMES.get(cls.__name__, ()) for cls in kind.__mro__) or child in _only_read(kind)


@functools.cache
def _only_read(kind: type) -> frozenset[str]:
    """Children of which the class's own code reads the weight, and of which it does nothing else that could call them."""
    read: set[str] = set()
    used: set[str] = set()
    for cls in kind.__mro__:
        if cls in (nn.Module, object):
            continue
        for method in _methods(cls):
            visitor = _Uses(method.name in _SETS_UP)
            visitor.visit(method)
            if visitor.anything:  # it reaches its children by names that are not in its code
                return frozenset()
            read |= visitor.read
            used |= visitor.used
    return frozenset(read - used)


class _Uses(ast.NodeVisitor):
    """What a method does with `self.child`."""

    def __init__(self, sets_up: bool) -> None:
        self.sets_up = sets_up
        self.read: set[str] = set()
        self.used: set[str] = set()
        self.anything = False

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name == "getattr" and len(node.args) > 1 and _is_self(node.args[0]):
            child = node.args[1]
            if isinstance(child, ast.Constant):
                self.used.add(str(child.value))
            else:
                self.anything = True
        elif name == "isinstance":
            return
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        inner = node.value
        if isinstance(inner, ast.Attribute) and _is_child(inner):  # self.child.something
            if node.attr not in _HARMLESS:
                self.used.add(inner.attr)
            elif node.attr == "weight" and isinstance(node.ctx, ast.Load) and not self.sets_up:
                self.read.add(inner.attr)
            return
        if isinstance(inner, ast.Attribute) and inner.attr == "weight" and node.attr in _DESCRIBES:
            return  # self.child.weight.dtype
        if _is_child(node):
            self.anything |= node.attr in _LOOKS_AROUND
            if isinstance(node.ctx, ast.Load):
                self.used.add(node.attr)
            return
        self.generic_visit(node)


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _is_child(node: ast.Attribute) -> bool:
    """Whether this reads `self.something`."""
    return _is_self(node.value)


def _methods(cls: type) -> Iterator[ast.FunctionDef]:
    """The methods of a class as they stand in its file; none where there is no file."""
    found = _classes(cls.__module__).get(cls.__qualname__)
    methods = (node for node in (found.body if found else ()) if isinstance(node, ast.FunctionDef))
    return (method for method in methods if method.name not in _HANDS_OUT)


@functools.cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    """The classes at the top of a module's file, by name."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None or not file.endswith(".py"):
        return {}
    try:
        tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return {}
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
