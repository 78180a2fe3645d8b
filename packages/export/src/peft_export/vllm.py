"""vLLM serves adapters in peft-core's own format by name: the plugin that it loads at its start.

Sources: vLLM's design notes on LoRA resolver plugins, `vllm.lora.resolver`, `vllm.lora.worker_manager`.
"""

from __future__ import annotations

import asyncio
import functools
from pathlib import Path
from typing import Any

from vllm import envs
from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry
from vllm.lora.worker_manager import WorkerLoRAManager

from peft_core import PeftCoreError

from . import serving
from .cache import Cache

# vLLM configures the loggers below its own.
logger = init_logger("vllm.peft_core")


def register() -> None:
    """Entry point `vllm.general_plugins`, called in each of vLLM's processes. Without `PEFT_CORE_ADAPTERS` it does nothing.

    Raises:
        SpecError: a setting is wrong.
    """
    found = serving.settings()
    if found is None:
        return
    if not envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING:
        logger.warning(
            "%s is set, but vLLM looks for adapters only with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1", serving.ADAPTERS
        )
    cache = found.open_cache("vllm")
    _hold_while_loading(cache)
    LoRAResolverRegistry.register_resolver("peft-core", AdapterResolver(found.adapters, cache))


class AdapterResolver(LoRAResolver):  # type: ignore[misc]
    """Adapters of a directory, lowered when they are first asked for."""

    def __init__(self, adapters: Path, cache: Cache) -> None:
        self.adapters = adapters
        self.cache = cache

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The adapter as vLLM loads it, or None if there is none of this name (vLLM answers 404).

        Raises:
            VLLMValidationError: it cannot be served (vLLM answers 400; the log says why).
        """
        try:
            adapter = serving.find_adapter(self.adapters, lora_name)
            if adapter is None:
                logger.info("no adapter %r in '%s'", lora_name, self.adapters)
                return None
            base = serving.base_directory(base_model_name)
            lowered = await asyncio.to_thread(self.cache.lower, base, adapter)
        except (PeftCoreError, OSError) as error:
            logger.warning("adapter %r is refused: %s", lora_name, error)
            # The reason names files of the server, which are not its clients' business.
            raise VLLMValidationError(
                f"the adapter {lora_name!r} cannot be served; the server's log says why"
            ) from None
        return LoRARequest(lora_name, 1, str(lowered))  # vLLM gives it a number of its own


def _hold_while_loading(cache: Cache) -> None:
    """Keep a lowered adapter on disk while vLLM reads it, and bring it back first if it was removed.

    vLLM reads an adapter again whenever its memory had to let go of it, asks no resolver then, and ends if it is gone.
    """
    load = WorkerLoRAManager._load_adapter

    @functools.wraps(load)
    def held(self: WorkerLoRAManager, lora_request: LoRARequest) -> Any:
        path = Path(lora_request.lora_path)
        if path.parent != cache.directory:
            return load(self, lora_request)
        with cache.held(path):
            return load(self, lora_request)

    WorkerLoRAManager._load_adapter = held
