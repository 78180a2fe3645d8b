"""SmolLM2 in float32, adapters of it, and what transformers answers with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

import peft_core as pc
from peft_core.models import base_path, load_base
from peft_core.prompts import prompt_ids
from peft_core.testing.checks import Trial

PROMPTS = ("The capital of France is", "Once upon a time", "def fibonacci(n):")
NEW_TOKENS = 16
Tokens = list[list[int]]


@dataclass(frozen=True)
class Made:
    """An adapter's directory, and the tokens that transformers writes after each prompt with it attached."""

    directory: Path
    tokens: Tokens


class Reference:
    """transformers' model, and adapters of it as they are asked for."""

    def __init__(self, scratch: Path) -> None:
        self.base = Path(base_path("smollm2-135m"))
        self.model, tokenizer = load_base(self.base, torch.float32)
        self.prompts: Tokens = [prompt_ids(prompt, tokenizer) for prompt in PROMPTS]
        self.tokens = self._write()
        self._scratch = scratch
        self._made: dict[str, Made] = {}

    def adapter(self, trial: Trial) -> Made:
        """An adapter of this method on all linear layers, with random values."""
        name = str(trial)
        if name not in self._made:
            before = self._logits()
            adapter = pc.attach(self.model, pc.AdapterSpec(method=trial.method, options=dict(trial.options)), seed=0)
            self._change(adapter, before)
            directory = self._scratch / f"adapter{len(self._made)}"
            adapter.save(directory)
            self._made[name] = Made(directory, self._write())
            adapter.detach()
        return self._made[name]

    @torch.no_grad()
    def _change(self, adapter: pc.Adapter, before: torch.Tensor) -> None:
        """Add noise to the tensors: so much that answers change, so little that they stay language (KL ≤ 1 nat)."""
        start = [parameter.clone() for parameter in adapter.parameters()]
        generator = torch.Generator().manual_seed(0)
        noise = [torch.randn(parameter.shape, generator=generator) for parameter in start]
        for halvings in range(20):
            for parameter, value, change in zip(adapter.parameters(), start, noise, strict=True):
                parameter.copy_(value + 0.5 ** (halvings + 2) * change)
            divergence = (before.exp() * (before - self._logits())).sum(-1).mean()
            if divergence <= 1.0:
                return
        raise AssertionError(f"no small noise on {adapter.plan.spec.method} leaves the answers language")

    @torch.no_grad()
    def _logits(self) -> torch.Tensor:
        """Log-probabilities [positions, vocabulary] of the first prompt."""
        return self.model(torch.tensor([self.prompts[0]])).logits[0].log_softmax(-1)

    def _write(self) -> Tokens:
        written = []
        for prompt in self.prompts:
            ids = torch.tensor([prompt])
            whole = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
            )
            written.append(whole[0, len(prompt) :].tolist())
        return written
