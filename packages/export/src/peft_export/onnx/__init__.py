"""ONNX: an adapter and its base as a model for ONNX Runtime. Its packages are imported by what needs them."""

from .exporting import PRECISIONS, export_onnx

__all__ = ["PRECISIONS", "export_onnx"]
