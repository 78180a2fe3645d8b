from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

from peft_core import models, reporting
from peft_core.quickstart.loop import batches, train
from peft_core.training.batches import collate
from peft_core.training.examples import Tokens
from peft_core.training.losses import completion_loss, evaluate

ROWS = [Tokens([3, 4, 5, 6], [-100, -100, 5, 6]), Tokens([7, 8], [-100, 8])]


def test_completion_loss_is_the_loss_of_each_example_alone(checkpoint: Path) -> None:
    model, _ = models.load_base(checkpoint)
    expected = 0.0
    for row in ROWS:
        logits = model(torch.tensor([row.input_ids])).logits[0, :-1]
        expected += cross_entropy(logits, torch.tensor(row.labels[1:]), reduction="sum").item()
    total, tokens = completion_loss(model, collate(ROWS, 0))
    assert tokens == 3
    assert total.item() == pytest.approx(expected, rel=1e-5)


def test_completion_loss_with_learned_positions_and_with_a_forward_that_gives_all_logits() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=16, n_layer=1, n_head=2, n_positions=8)).eval()
    together, _ = completion_loss(model, collate(ROWS, 0))
    alone = sum(completion_loss(model, collate([row], 0))[0].item() for row in ROWS)
    assert together.item() == pytest.approx(alone, rel=1e-5)

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, input_ids, attention_mask, position_ids):  # type: ignore[no-untyped-def]
            return self.inner(input_ids, attention_mask=attention_mask, position_ids=position_ids)

    assert completion_loss(Plain(), collate(ROWS, 0))[0].item() == pytest.approx(together.item())


def test_training_lowers_the_loss_and_repeats_itself(checkpoint: Path) -> None:
    def losses() -> list[float]:
        model, _ = models.load_base(checkpoint)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        log = train(model, optimizer, batches(ROWS, 2, 0, seed=0), steps=10)
        assert len(log.losses) == len(log.seconds) == 10 and log.seconds_per_step > 0
        assert not model.training
        assert evaluate(model, ROWS, 0) < log.losses[0]
        return log.losses

    first = losses()
    assert first[-1] < 0.5 * first[0]
    assert first == losses()


def test_the_learning_rate_rises_and_falls(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = models.load_base(checkpoint)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    rates = []
    optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
    train(model, optimizer, batches(ROWS, 2, 0, 0), steps=10, warmup=0.2, max_grad_norm=1e-6)
    assert rates[0] == 0.5 and rates[1] == max(rates) == 1.0
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[1:]))
    assert rates[-1] > 0


def test_a_loss_that_diverges_is_an_error(checkpoint: Path) -> None:
    model, _ = models.load_base(checkpoint)
    torch.nn.init.constant_(model.lm_head.weight, math.nan)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with pytest.raises(reporting.TrainingError, match="nan at step 1; lower the learning rate"):
        train(model, optimizer, batches(ROWS, 2, 0, 0), steps=3)


def test_peak_memory_and_loss_curve(tmp_path: Path) -> None:
    assert 10_000_000 < reporting.peak_memory() < 1 << 40
    reporting.plot_losses([3.0, 2.0, 1.5], tmp_path / "loss.png", "three steps", held_out=(3.1, 1.6))
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
