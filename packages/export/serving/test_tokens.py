"""vLLM writes the tokens that transformers writes: the base, every lowered adapter, every merged checkpoint."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.lora.request import LoRARequest

import peft_export
from packages.export.serving.reference import NEW_TOKENS, Reference, Tokens
from peft_core.testing.checks import Trial, trials


@contextmanager
def engine(model: Path, **options: Any) -> Iterator[LLM]:
    llm = LLM(str(model), dtype="float32", max_model_len=512, enforce_eager=True, **options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def write(llm: LLM, prompts: Tokens, lora: Any = None) -> Tokens:
    """The tokens that vLLM writes after each prompt, always taking the likeliest."""
    answers = llm.generate(
        [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts],
        SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS),
        lora_request=lora,
        use_tqdm=False,
    )
    return [list(answer.outputs[0].token_ids) for answer in answers]


@pytest.fixture(scope="module")
def llm(reference: Reference) -> Iterator[LLM]:
    with engine(reference.base, enable_lora=True, max_lora_rank=64, max_loras=3) as started:
        yield started


def test_the_base(llm: LLM, reference: Reference) -> None:
    assert write(llm, reference.prompts) == reference.tokens


def test_a_lowered_adapter(exact: Trial, llm: LLM, reference: Reference, tmp_path: Path) -> None:
    made = reference.adapter(exact)
    assert all(mine != bases for mine, bases in zip(made.tokens, reference.tokens, strict=True))
    report = peft_export.export_lora(reference.base, made.directory, tmp_path / "out", fit="vllm")
    assert not report.problems and report.worst.error == 0.0
    number = 1 + [str(trial) for trial in trials([])].index(str(exact))
    lora = LoRARequest(str(exact), number, str(tmp_path / "out"))
    assert write(llm, reference.prompts, lora) == made.tokens
    # The others' answers are not touched.
    assert write(llm, reference.prompts) == reference.tokens


def test_one_batch_of_different_methods(llm: LLM, reference: Reference, tmp_path: Path) -> None:
    chosen = list({trial.method: trial for trial in reversed(trials([])) if trial.can.lowrank}.values())[:3]
    # Not the base as well: on the CPU, vLLM 0.32 applies an adapter to the base's rows of a mixed batch (its pull request 48421).
    prompts: Tokens = []
    loras: list[LoRARequest] = []
    expected: Tokens = []
    for number, trial in enumerate(chosen):
        made = reference.adapter(trial)
        peft_export.export_lora(reference.base, made.directory, tmp_path / trial.method, fit="vllm")
        lora = LoRARequest(trial.method, 1001 + number, str(tmp_path / trial.method))
        prompts += reference.prompts
        loras += [lora] * len(reference.prompts)
        expected += made.tokens
    assert write(llm, prompts, loras) == expected


def test_a_merged_checkpoint(kind: Trial, reference: Reference, tmp_path: Path) -> None:
    made = reference.adapter(kind)
    assert all(mine != bases for mine, bases in zip(made.tokens, reference.tokens, strict=True))
    peft_export.merge(reference.base, made.directory, tmp_path / "merged", dtype="float32")
    with engine(tmp_path / "merged") as started:
        assert write(started, reference.prompts) == made.tokens
