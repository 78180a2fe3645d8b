"""peft-export: turns adapters trained with peft-core into what serving runtimes load."""

from .lora import export_lora
from .onnx import export_onnx
from .reports import LoraReport, MergeReport, OnnxReport, VerifyReport
from .streaming import merge
from .verify import verify

__version__ = "0.1.0"

__all__ = ["LoraReport", "MergeReport", "OnnxReport", "VerifyReport", "export_lora", "export_onnx", "merge", "verify"]
