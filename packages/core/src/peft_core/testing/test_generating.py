"""Generation with an adapter, with its cache, for decoders and encoder-decoders."""

import pytest
import torch
from torch import Tensor

import peft_core as pc

from .checks import Trial, adapted, relative
from .families import Family

GENERATING = pytest.mark.families("llama", "gpt2", "gemma3", "mamba", "t5", "whisper")
# In float64, so that rounding does not choose between two tokens.
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def generate(family: Family, model: torch.nn.Module, **options: object) -> tuple[list[list[int]], Tensor]:
    """Tokens, and the logits that they were chosen by [batch, tokens, vocabulary]."""
    given = {k: v for k, v in family.inputs(dtype=torch.float64).items() if not k.startswith("decoder")}
    answer = model.generate(  # type: ignore[operator]
        **given, **GREEDY, return_dict_in_generate=True, output_logits=True, **options
    )
    return answer.sequences.tolist(), torch.stack(answer.logits, 1)


@GENERATING
def test_generation_is_the_merged_models(trial: Trial, family: Family) -> None:
    model, adapter = adapted(family, trial, torch.float64, std=0.3)
    _, base = generate(family, family.build(dtype=torch.float64))
    tokens, logits = generate(family, model)
    assert relative(logits, base) > 1e-3, "the adapter changes nothing that is generated"
    for other in (generate(family, model, use_cache=False), generate(family, adapter.merge_and_detach())):
        assert other[0] == tokens and relative(other[1], logits) <= 1e-4  # Mamba scans in float32


@pytest.mark.families("llama")
def test_an_adapter_for_each_row_is_refused_with_the_remedy(trial: Trial, family: Family) -> None:
    model, adapter = adapted(family, trial)
    with pytest.raises(pc.AdapterError, match=r"same adapters; activate one with pc\.activate"):
        model.generate(**family.inputs(), adapter_names=["default", "__base__"])  # type: ignore[operator]
    with pytest.raises(pc.AdapterError, match="one choice applies to the whole batch"):
        pc.activate(model, [["default"], ["default"]])  # type: ignore[list-item]
    adapter.detach()
    with pytest.raises(ValueError):  # transformers' own word again
        model.generate(**family.inputs(), adapter_names=["default"])  # type: ignore[operator]
