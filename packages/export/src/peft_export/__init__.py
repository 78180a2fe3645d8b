"""peft-export: turns adapters trained with peft-core into what serving runtimes load."""

from .lora import LoraReport, export_lora
from .streaming import MergeReport, merge
from .verify import VerifyReport, verify

__version__ = "0.1.0"

__all__ = ["LoraReport", "MergeReport", "VerifyReport", "export_lora", "merge", "verify"]
