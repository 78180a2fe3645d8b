"""What a plugin for a serving runtime needs, whichever the runtime: its settings, adapters by name, the base's directory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from peft_core import CheckpointError, SpecError
from peft_core.packaged import cache_dir

from .cache import Cache
from .shards import parse_size

ADAPTERS, CACHE, LIMIT = "PEFT_CORE_ADAPTERS", "PEFT_CORE_ADAPTER_CACHE", "PEFT_CORE_ADAPTER_CACHE_BYTES"


@dataclass(frozen=True)
class Settings:
    """What the environment says.

    Attributes:
        adapters: the directory with the adapters to serve. cache, limit: see `Cache`.
    """

    adapters: Path
    cache: Path
    limit: int

    def open_cache(self, fit: str) -> Cache:
        """The cache for a runtime."""
        return Cache(self.cache, self.limit, fit)


def settings() -> Settings | None:
    """`PEFT_CORE_ADAPTERS`, `PEFT_CORE_ADAPTER_CACHE` and `PEFT_CORE_ADAPTER_CACHE_BYTES`; None without the first.

    Raises:
        SpecError: the first is not a directory, or the last is not a size.
    """
    adapters = os.environ.get(ADAPTERS)
    if not adapters:
        return None
    if not Path(adapters).is_dir():
        raise SpecError(f"{ADAPTERS}: '{adapters}' is not a directory; give the one that holds the adapters to serve")
    try:
        limit = parse_size(os.environ.get(LIMIT) or "20GB")
    except SpecError as error:
        raise SpecError(f"{LIMIT}: {error}") from None
    return Settings(Path(adapters).absolute(), Path(os.environ.get(CACHE) or cache_dir() / "lowered"), limit)


def find_adapter(adapters: Path, name: str) -> Path | None:
    """The directory of the adapter `name`, which may lie in folders (`team/name`); None if there is nothing.

    Raises:
        CheckpointError: the name, or a link that it follows, leads out of the directory, or the name is hidden.
    """
    parts = name.split("/")
    if not name.isprintable() or any(not part or part.startswith(".") for part in parts):
        raise CheckpointError(f"{name!r} is not an adapter's name; names lie within '{adapters}', such as team/name")
    path = adapters.joinpath(*parts)
    if not os.path.isdir(path):  # Path's own raises where the name is too long
        return None
    if adapters.resolve() not in path.resolve().parents:
        raise CheckpointError(f"{name!r} leads out of '{adapters}'")
    return path


def base_directory(model: str) -> Path:
    """Where the base's configuration lies: a checkpoint directory, or a downloaded snapshot of a hub's model.

    Raises:
        CheckpointError: it is not on this machine.
    """
    if (Path(model) / "config.json").is_file():
        return Path(model)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, "config.json")
    except HFValidationError:
        found = None
    if not isinstance(found, str):
        raise CheckpointError(
            f"the base '{model}' is not a checkpoint directory and not in the hub's cache: it has no config.json"
        )
    return Path(found).parent
