"""peft-export: turns adapters trained with peft-core into what serving runtimes load."""

from .lora import LoraReport, export_lora
from .onnx import OnnxReport, export_onnx
from .streaming import MergeReport, merge
from .verify import VerifyReport, verify

__version__ = "0.1.0"

__all__ = ["LoraReport", "MergeReport", "OnnxReport", "VerifyReport", "export_lora", "export_onnx", "merge", "verify"]
