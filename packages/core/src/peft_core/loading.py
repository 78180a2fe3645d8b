"""transformers as it loads: what it raises, what it does not say, and what it says that nobody asked for."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from .errors import ModelError, first_line, reason

MISCONFIGURED = (OSError, ValueError, KeyError, StrictDataclassError)
"""Raised for a configuration or a tokenizer that cannot be loaded."""
UNREADABLE = (*MISCONFIGURED, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError)
"""Raised for a checkpoint that cannot be loaded."""


def why(error: Exception, source: str | Path) -> str:
    """Why a checkpoint could not be loaded, in one line: a file that is damaged, or what it says."""
    for file in sorted(Path(source).glob("*.safetensors")):
        try:
            file.open("rb").close()
        except OSError as refusal:
            return f"'{file}' cannot be read: {reason(refusal)}"
        try:
            with safe_open(file, "pt"):
                pass
        except (OSError, SafetensorError) as damage:
            return f"'{file}' is truncated or damaged ({first_line(damage)}); restore it from where it came from"
    return first_line(error)


def drawn(loading: Mapping[str, Any]) -> list[str]:
    """Weights that were drawn at random, by `output_loading_info`: the files lack them, or have other sizes."""
    return sorted({*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])})


def check_alone(source: str | Path, model: Any) -> None:
    """Raises ModelError for a model on which transformers has put an adapter that lies beside it."""
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(
            f"an adapter of Hugging Face PEFT lies beside the model {source!s}, and transformers puts it on the model: merge it "
            "into the model there, or take its adapter_config.json away"
        )


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without progress bars and warnings."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
