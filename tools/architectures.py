"""An adapter's life on a tiny random model of every language-model class of transformers.

    python tools/architectures.py [--method miss] [--options '{"r": 4}'] [--only REGEX]
    python tools/architectures.py --method mos --options '{"r": 2, "equivalent_rank": 2, "shards": 1}'  # fits every layer

On each class: attach to all linear layers, give the adapter random values, one backward pass and optimizer step, save, load,
merge in memory and as files (peft-export), detach. Outputs are compared at each step. Prints what is not as it must be, which
classes could not be made tiny by the sizes below, and how many passed. Exits with 1 where something is not as it must be.

The models see tokens only. What an adapter's parameters do not reach then (a vision tower, an unused pooler) is not shown.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

import peft_core as pc
import peft_export

MAPPINGS = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "SEQUENCE_CLASSIFICATION", "IMAGE_TEXT_TO_TEXT")

SIZES = {
    64: "hidden_size d_model n_embd dim emb_dim embed_dim embedding_size classifier_dim",
    128: "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff n_inner ffn_hidden_size max_position_embeddings "
    "n_positions n_ctx",
    2: "encoder_layers decoder_layers num_decoder_layers depth num_key_value_heads num_kv_heads num_experts_per_tok eos_token_id",
    4: "num_hidden_layers num_layers n_layer n_layers num_attention_heads n_head n_heads num_heads encoder_attention_heads "
    "decoder_attention_heads num_experts num_local_experts n_routed_experts",
    8: "qk_rope_head_dim qk_nope_head_dim rotary_dim",
    16: "head_dim d_kv attention_head_size v_head_dim q_lora_rank kv_lora_rank sliding_window",
    32: "moe_intermediate_size shared_expert_intermediate_size",
    256: "vocab_size",
    1: "n_group topk_group global_attn_every_n_layers bos_token_id decoder_start_token_id",
    0: "pad_token_id",
}
DROPOUTS = (
    "dropout attention_dropout hidden_dropout_prob attention_probs_dropout_prob resid_pdrop embd_pdrop attn_pdrop "
    "activation_dropout dropout_rate hidden_dropout embedding_dropout"
)
SMALL = {name: size for size, names in SIZES.items() for name in names.split()} | dict.fromkeys(DROPOUTS.split(), 0.0)
# Sizes that some classes derive from others, or whose own default alone fits: left out one group after the other.
DERIVED = (
    (),
    ("num_key_value_heads", "num_kv_heads"),
    ("head_dim",),
    ("pad_token_id", "bos_token_id", "eos_token_id"),
    ("head_dim", "num_key_value_heads"),
    ("head_dim", "qk_rope_head_dim", "qk_nope_head_dim"),
    ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"),
)
LARGEST = 60_000_000  # parameters
CLOSE = 2e-3


class NotTried(Exception):
    """On this class the adapter's life cannot be shown."""


def classes() -> Iterator[str]:
    """The names of all classes, in order."""
    found = set()
    for mapping in MAPPINGS:
        for names in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").values():
            found |= {names} if isinstance(names, str) else set(names)
    return iter(sorted(name for name in found if hasattr(transformers, name)))


def tiny(kind: Any) -> nn.Module:
    """A random model of this class.

    Raises:
        NotTried: the sizes above make none that runs and computes the same twice.
    """
    error: Any = None
    for left_out in DERIVED:
        try:
            config = kind.config_class(**small(kind.config_class(), left_out))
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in kind(config).parameters())
            if size > LARGEST:
                error = f"{size / 1e6:.0f} million parameters"
                continue
            torch.manual_seed(0)
            model = kind(config).eval()
            for parameter in model.parameters():
                if parameter.dim() > 1 and not parameter.any():
                    nn.init.normal_(parameter, std=0.02)  # a router of zeros chooses its experts by rounding
            if not torch.equal(logits(model), logits(model)):
                raise ValueError("its forward is random")
            return model  # type: ignore[no-any-return]
        except Exception as found:  # of many kinds, from the configuration, the model or its forward
            error = found
    raise NotTried(str(error).strip().splitlines()[0][:120] if str(error).strip() else repr(error))


def small(config: Any, left_out: tuple[str, ...]) -> dict[str, Any]:
    """The fields of a configuration, and of those within it, that have a size above."""
    known = set(inspect.signature(type(config).__init__).parameters) | set(config.to_dict())
    fields: dict[str, Any] = {name: SMALL[name] for name in SMALL.keys() & known if name not in left_out}
    for name, kind in type(config).sub_configs.items():
        inner = getattr(config, name, None)
        if inner is None and isinstance(kind, type):
            inner = kind()
        if inner is not None and not isinstance(inner, dict):
            fields[name] = type(inner)(**small(inner, left_out))
    rope = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in rope:
        fields["rope_parameters"] = {**rope, "mrope_section": [2, 3, 3]}  # of those that have one: half of head_dim
    return fields


def logits(model: Any) -> Tensor:
    """What the model gives for a fixed batch of tokens."""
    tokens = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(0))
    tokens[:, -1] = 2
    taken = inspect.signature(model.forward).parameters
    fields: dict[str, Any] = {"input_ids": tokens}
    if model.config.is_encoder_decoder and "ForSequenceClassification" not in type(model).__name__:
        fields["decoder_input_ids"] = tokens
    if "use_cache" in taken:
        fields["use_cache"] = False
    output = model(**fields)
    return output.logits if hasattr(output, "logits") else output[0]  # type: ignore[no-any-return]


def reached(model: nn.Module, paths: list[str]) -> bool:
    """Whether the output depends on any of these modules."""
    parameters = [parameter for path in paths for parameter in model.get_submodule(path).parameters()]
    gradients = torch.autograd.grad(logits(model).sum(), parameters, allow_unused=True)
    return any(gradient is not None for gradient in gradients)


def differences(model: nn.Module, spec: pc.AdapterSpec, folder: Path) -> Iterator[str]:
    """What is not as it must be, in the order of an adapter's life.

    Raises:
        NotTried: the output depends on none of the layers.
    """
    if not reached(model, [site.path for site in pc.plan(model, spec).sites]):
        raise NotTried("its output depends on none of the layers")
    kind, before = type(model), logits(model).detach()

    def differs(found: Tensor, expected: Tensor) -> bool:
        return not (found - expected).abs().max() <= CLOSE * expected.abs().max()

    model.save_pretrained(folder / "base")  # type: ignore[operator]
    adapter = pc.attach(model, spec, seed=0)
    adapter.total_steps = 1  # some methods ask for it
    if differs(logits(model), before):
        yield "attaching changes the output"
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1e-9)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.05)
    logits(model).square().sum().backward()
    optimizer.step()
    if all(parameter.grad is None for parameter in adapter.parameters()):
        yield "no gradient reaches the adapter"
    adapted = logits(model).detach()
    adapter.save(folder / "adapter")
    adapter.merge_and_detach()
    if differs(logits(model), adapted):
        yield "merging in memory changes the output"
    peft_export.merge(folder / "base", folder / "adapter", folder / "merged")
    if differs(logits(kind.from_pretrained(folder / "merged").eval()), adapted):  # type: ignore[attr-defined]
        yield "merged files give another output"
    again = kind.from_pretrained(folder / "base").eval()  # type: ignore[attr-defined]
    loaded = pc.load(again, folder / "adapter")
    if differs(logits(again), adapted):
        yield "a loaded adapter gives another output"
    loaded.detach()
    if differs(logits(again), before):
        yield "detaching does not restore the output"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="miss")
    parser.add_argument("--options", type=json.loads, default={"r": 4}, help='JSON (default: {"r": 4})')
    parser.add_argument("--only", type=re.compile, default="", help="classes that this regex finds")
    arguments = parser.parse_args()
    spec = pc.AdapterSpec(method=arguments.method, options=arguments.options)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    counts: Counter[str] = Counter()
    for name in classes():
        if not re.search(arguments.only, name):
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = list(differences(tiny(getattr(transformers, name)), spec, Path(folder)))
                result = "not as it must be" if found else "passed"
            except NotTried as error:
                result, found = "not tried", [str(error)]
            except pc.PeftCoreError as error:
                result, found = "refused", [str(error)]
            except Exception as error:  # of any kind: it is what is looked for
                result, found = "not as it must be", [repr(error)[:300]]
        counts[result] += 1
        if found:
            print(f"{name}: {result}: {'; '.join(found)}", flush=True)
    print(", ".join(f"{count} {what}" for what, count in counts.most_common()))
    raise SystemExit(counts["not as it must be"] > 0)


if __name__ == "__main__":
    main()
