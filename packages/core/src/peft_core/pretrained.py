"""`model.save_pretrained` of a model with adapters, which left alone would save the base and drop them without a word."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

from torch import nn

from . import checkpoint
from .errors import AdapterError
from .registry import registry_of


class AdapterSaver:
    """Stands in for the method, on the instance."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, save_directory: str | Path, **options: Any) -> None:
        """Save the adapters: the only one in `save_directory`, several in a directory each below it.

        Raises:
            AdapterError: an adapter is merged (so it is not clear what is to be saved), `push_to_hub` is asked for, or
                the caller is a plain Trainer that would at its end fail to load its best checkpoint, and go on.
        """
        if (trainer := _plain_trainer()) is not None:
            raise AdapterError(
                f"{type(trainer).__name__} cannot load an adapter back for load_best_model_at_end; use peft_core.AdapterTrainer "
                "(or AdapterTrainerMixin before the trainer's class)"
            )
        registry = registry_of(self.model)
        for name in registry.banks:
            if registry.is_merged(name):
                raise AdapterError(
                    f"save_pretrained: adapter '{name}' is merged but still attached; call merge_and_detach() to save "
                    "the merged model, or adapter.save(directory) for the adapter"
                )
        if options.get("push_to_hub"):
            raise AdapterError(
                "save_pretrained: push_to_hub is not supported for adapters; save to a directory and upload it"
            )
        for name, bank in registry.banks.items():
            checkpoint.save(bank, save_directory if len(registry.banks) == 1 else Path(save_directory) / name)


def _plain_trainer() -> Any:
    """A Trainer that is saving now and, at its end, would fail to load its best checkpoint, and go on with the last weights.

    transformers tells a model nothing of who saves it; the Trainer is found among the callers.
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        caller: Any = frame.f_locals.get("self")
        asked = getattr(getattr(caller, "args", None), "load_best_model_at_end", False)
        if asked and hasattr(caller, "_load_best_model"):
            return None if hasattr(caller, "restores_adapters") else caller
        frame = frame.f_back
    return None
