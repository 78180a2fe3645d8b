"""What serving runtimes ask of a LoRA adapter, as data: ranks, modules, heads, and the flags to start them with.

Sources: vLLM's list of supported models and its PEFT helper, SGLang's LoRA configuration and module table, llama.cpp's
convert_lora_to_gguf.py. A runtime is described by what it is known to refuse; what is not listed is taken to work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from peft_core import MergeError
from peft_core.errors import listed, suggestion


@dataclass(frozen=True)
class Request:
    """What a runtime is asked to serve.

    Attributes:
        types: last path components of the adapted layers. heads: modules that the adapter trained in full.
    """

    base: str
    out: str
    architecture: str
    types: Sequence[str]
    heads: Sequence[str]
    transposed: bool


@dataclass(frozen=True)
class Runtime:
    """A serving runtime.

    Attributes:
        ranks: those that it accepts, or None for any. modules: layer types that it knows, or None for any.
        refused: architectures to which it applies no LoRA. passes: whether it loads a module trained in full.
        command: how it is started, given the rank.
    """

    name: str
    ranks: tuple[int, ...] | None
    modules: frozenset[str] | None
    refused: frozenset[str]
    passes: Callable[[str], bool]
    command: Callable[[Request, int], str]

    def rank(self, rank: int) -> int:
        """The next rank that it accepts.

        Raises:
            MergeError: there is none.
        """
        if self.ranks is None:
            return rank
        fitting = [allowed for allowed in self.ranks if allowed >= rank]
        if not fitting:
            raise MergeError(
                f"{self.name} serves ranks up to {self.ranks[-1]}, the adapter has {rank}; reduce it with --svd-rank, or merge"
            )
        return fitting[0]

    def problems(self, request: Request) -> list[str]:
        """Why it cannot serve the adapter; empty if nothing is known to stand in the way."""
        found = []
        if request.architecture in self.refused or request.transposed:
            found.append(f"{self.name} applies no LoRA to {request.architecture}: merge the adapter instead")
        if heads := [head for head in request.heads if not self.passes(head)]:
            found.append(
                f"{self.name} does not load modules that were trained in full ({listed(heads)}): merge the adapter instead"
            )
        if self.modules is not None and (unknown := [kind for kind in request.types if kind not in self.modules]):
            found.append(
                f"{self.name} does not know the modules {listed(unknown)}: leave them out of the adapter, or merge"
            )
        return found


def runtime(name: str) -> Runtime:
    """A runtime by name.

    Raises:
        MergeError: it is not known here.
    """
    if name not in RUNTIMES:
        raise MergeError(f"no runtime '{name}'{suggestion(name, RUNTIMES)}; there are {listed(RUNTIMES)}")
    return RUNTIMES[name]


def _vllm(request: Request, rank: int) -> str:
    adapter = quote(f"adapter={request.out}")
    return f"vllm serve {quote(request.base)} --enable-lora --max-lora-rank {rank} --lora-modules {adapter}"


def _sglang(request: Request, rank: int) -> str:
    types, adapter = " ".join(map(quote, request.types)), quote(f"adapter={request.out}")
    return (
        f"python -m sglang.launch_server --model-path {quote(request.base)} --enable-lora --max-lora-rank {rank} "
        f"--lora-target-modules {types} --lora-paths {adapter}"
    )


def _llama_cpp(request: Request, rank: int) -> str:
    base = "--base" if Path(request.base).is_dir() else "--base-model-id"  # a directory, or a name on the hub
    return (
        f"python convert_lora_to_gguf.py {base} {quote(request.base)} --outfile adapter.gguf {quote(request.out)} && "
        "llama-server -m base.gguf --lora adapter.gguf"
    )


def _is_norm(head: str) -> bool:
    return "_layernorm" in head or ".norm" in f".{head}"


# Encoders and encoder-decoders, and the decoders whose line in vLLM's table has no mark under LoRA.
_NO_LORA_IN_VLLM = frozenset(
    {
        "GPT2LMHeadModel",
        "GPTJForCausalLM",
        "GPTNeoXForCausalLM",
        "BloomForCausalLM",
        "FalconForCausalLM",
        "MambaForCausalLM",
        "Mamba2ForCausalLM",
        "FalconMambaForCausalLM",
        "MptForCausalLM",
        "DbrxForCausalLM",
        "OlmoeForCausalLM",
        "FlexOlmoForCausalLM",
        "StableLmForCausalLM",
        "Gemma3nForCausalLM",
        "Zamba2ForCausalLM",
        "Jais2ForCausalLM",
        "MellumForCausalLM",
        "DeepseekV4ForCausalLM",
        "BertForSequenceClassification",
        "RobertaForSequenceClassification",
        "T5ForConditionalGeneration",
    }
)
_SGLANG_MODULES = frozenset(
    {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "qkv_proj",
        "gate_proj",
        "up_proj",
        "gate_up_proj",
        "down_proj",
        "out_proj",
        "in_proj",
        "embed_tokens",
        "lm_head",
        "q_a_proj",
        "q_b_proj",
        "kv_a_proj_with_mqa",
        "kv_b_proj",
    }
)
RUNTIMES: Mapping[str, Runtime] = {
    "vllm": Runtime("vLLM", (1, 8, 16, 32, 64, 128, 256, 320, 512), None, _NO_LORA_IN_VLLM, lambda head: False, _vllm),
    "sglang": Runtime("SGLang", None, _SGLANG_MODULES, frozenset(), lambda head: False, _sglang),
    # Its converter passes norms through that it knows by name, and stops at everything else that is not a factor.
    "llama.cpp": Runtime("llama.cpp", None, None, frozenset(), _is_norm, _llama_cpp),
}
