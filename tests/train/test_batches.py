"""How models read batches: padding, packing, and on which tokens the loss is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import peft_core as pc
from peft_core import models, prompts
from peft_core.errors import ModelError
from peft_core.testing.families import FAMILIES
from peft_core.training.batches import CausalCollator, ClassificationCollator, LengthGroupedSampler, PackedCollator
from peft_core.training.checks import BatchConvention, batch_convention, check_packing, padding_side
from peft_core.training.config import RunError
from peft_core.training.examples import IGNORED, Tokens, pack, prepare_causal, prepare_labelled
from peft_core.training.losses import evaluate
from peft_core.training.rows import Row
from tests.train.runs import CHATS, LABELLED, PAIRS, TEXTS, run_file, started, words, write

pytestmark = pytest.mark.usefixtures("quiet")


def _decoder(kind: str, **changed: Any) -> Any:
    """A tiny random model that takes positions, padding, labels or lengths in its own way."""
    common = {"vocab_size": 60, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2, "max_position_embeddings": 34}
    more = {
        "roberta": {"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 1, "num_attention_heads": 2}
        | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        "rwkv": {"hidden_size": 24, "num_hidden_layers": 2, "context_length": 34},
        "bart": {
            "d_model": 24,
            "decoder_layers": 1,
            "decoder_attention_heads": 2,
            "decoder_ffn_dim": 36,
            "dropout": 0.0,
        },
        "xlnet": {"d_model": 24, "n_layer": 1, "n_head": 2, "d_inner": 36},
    }[kind]
    if kind in ("rwkv", "xlnet"):
        del common["max_position_embeddings"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **common, **{"is_decoder": True, **more, **changed})
        model = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, 0.0, 0.2)
    return model


def _reference(model: Any, examples: Sequence[Tokens]) -> float:
    """Loss of a token that should be learnt, each example read alone and as the model itself does."""
    total, count = 0.0, 0
    with torch.no_grad():
        for tokens in examples:
            logits = model(input_ids=torch.tensor([tokens.input_ids])).logits[0, :-1]
            labels = torch.tensor(tokens.labels[1:])
            total += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            count += int((labels != IGNORED).sum())
    return total / count


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("llama", BatchConvention(pads_left=True, own_loss=True)),
        ("gpt2", BatchConvention(pads_left=True, own_loss=True)),
        ("mamba", BatchConvention(pads_left=True, own_loss=True)),
        (
            "roberta",
            BatchConvention(pads_left=False, own_loss=True),
        ),  # its positions start after the padding's index
        (
            "rwkv",
            BatchConvention(pads_left=False, own_loss=True),
        ),  # what comes first enters its state, padding as well
        (
            "bart",
            BatchConvention(pads_left=False, own_loss=False),
        ),  # takes no positions; its loss is that of the same token
    ],
)
def test_a_batch_is_read_as_its_examples_alone(
    kind: str, expected: BatchConvention, tmp_path: Path, llama_directory: Path
) -> None:
    model: Any = FAMILIES[kind].build() if expected.pads_left else _decoder(kind)
    tokenizer = AutoTokenizer.from_pretrained(llama_directory)
    rows = [Row(row, "here") for row in TEXTS]
    examples = prepare_causal(rows, "text", tokenizer, 32).tokens
    assert batch_convention(model, examples, tokenizer.pad_token_id) == expected
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    write(tmp_path / "data.jsonl", TEXTS)
    data = {"train": "data.jsonl", "evaluation": "data.jsonl"}
    report = started(
        run_file(tmp_path, tmp_path / "base", data, training={"steps": 1, "batch_size": 8, "accumulate": 3})
    )
    alone = _reference(model, examples)
    assert report.losses == [pytest.approx(alone, rel=1e-4)]
    assert report.evaluations[0]["loss"] == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "tokenizers", "expected"),
    [
        ("bert", "left", "right"),  # counts positions from the first token, padding or not
        ("bert", "right", "right"),
        ("xlnet", "right", "left"),  # reads a text at the last position
        ("llama", "left", "left"),  # either side will do: the tokenizer's
        ("llama", "right", "right"),
    ],
)
def test_a_classifier_reads_texts_of_a_batch_as_alone(
    kind: str, tokenizers: str, expected: str, tmp_path: Path, llama_directory: Path
) -> None:
    sizes: dict[str, Any] = {"vocab_size": 60, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 34, "pad_token_id": 0}
    more = {"xlnet": {"d_model": 24, "n_layer": 1, "n_head": 2, "d_inner": 36, "vocab_size": 60, "pad_token_id": 0}}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **more.get(kind, sizes))
    model = AutoModelForSequenceClassification.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, 0.0, 0.2)
    tokenizer = AutoTokenizer.from_pretrained(llama_directory, padding_side=tokenizers)
    rows = [{"text": words(*range(n, n + 1 + n % 5)), "label": ["no", "yes"][n % 2]} for n in range(24)]
    examples = prepare_labelled([Row(row, "here") for row in rows], ["no", "yes"], tokenizer, 32).tokens
    assert padding_side(model, examples, tokenizer) == expected
    with torch.no_grad():
        batch = ClassificationCollator(tokenizer, expected)(examples)
        alone = [model(input_ids=torch.tensor([some.input_ids]), labels=torch.tensor(some.labels)) for some in examples]
        together = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert torch.allclose(together, torch.cat([each.logits for each in alone]), atol=1e-5)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    write(tmp_path / "data.jsonl", rows)
    data = {"train": "data.jsonl", "evaluation": "data.jsonl"}
    report = started(run_file(tmp_path, tmp_path / "base", data, training={"steps": 1}))
    assert report.evaluations[0]["loss"] == pytest.approx(sum(each.loss.item() for each in alone) / 24, rel=1e-5)


def test_texts_of_one_length_are_padded_as_the_tokenizer_says(llama_directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama_directory, padding_side="left")
    assert padding_side(FAMILIES["bert"].build(), [Tokens([3, 4], [0]), Tokens([5, 6], [1])], tokenizer) == "left"


def test_a_loss_of_a_batch_that_ignores_the_rest_of_its_step_is_not_used() -> None:
    """Accumulated, it would be too large by the number of forward passes."""
    examples = [Tokens(list(range(5, 15)), list(range(5, 15)))]
    model = FAMILIES["llama"].build()
    own = model.loss_function
    assert batch_convention(model, examples, 0).own_loss
    model.loss_function = lambda *given, num_items_in_batch=None, **more: own(*given, **more)
    assert not batch_convention(model, examples, 0).own_loss
    model.loss_function, model.accepts_loss_kwargs = own, False
    assert not batch_convention(model, examples, 0).own_loss


def test_labels_can_be_viewed_as_one_row() -> None:
    """As the losses of many models do; where no logits are needed, there are none."""
    examples = [Tokens([3, 4, 5, 6], [IGNORED, IGNORED, IGNORED, 6]), Tokens([7, 8, 9], [IGNORED, IGNORED, 9])]
    batch = CausalCollator(FAMILIES["llama"].build(), 0)(examples)
    assert batch["logits_to_keep"] == 2
    assert batch["labels"].view(-1).tolist() == [IGNORED, 6, IGNORED, 9]


def test_a_model_that_sees_what_it_should_predict_is_refused(refused: Any) -> None:
    examples = [Tokens(list(range(5, 15)), [IGNORED, *range(6, 15)])]
    with refused(RunError, "RobertaForCausalLM", "those that follow", "is_decoder"):
        batch_convention(_decoder("roberta", is_decoder=False), examples, 0)
    with refused(RunError, "XLNetLMHeadModel", "those that follow"):
        batch_convention(_decoder("xlnet"), examples, 0)


def test_the_shortest_examples_tell_as_much() -> None:
    """Two tokens: one to read, one to predict."""
    examples = [Tokens([7, 9], [IGNORED, 9])]
    assert batch_convention(FAMILIES["llama"].build(), examples, 0) == BatchConvention()
    assert batch_convention(_decoder("bart"), examples, 0) == BatchConvention(pads_left=False, own_loss=False)


def test_the_longest_text_of_a_model(llama_directory: Path, tmp_path: Path, refused: Any) -> None:
    assert models.most_tokens(_decoder("xlnet")) is None  # it says -1
    assert models.most_tokens(FAMILIES["gpt2"].build()) == 32
    model = _decoder("roberta")
    assert models.most_tokens(model) == 32
    model(input_ids=torch.full((1, 32), 7))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, 33), 7))
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(llama_directory).save_pretrained(tmp_path / "base")
    write(tmp_path / "data.jsonl", [{"text": words(*range(60))}] * 4)
    started(run_file(tmp_path, tmp_path / "base", training={"steps": 1}))
    with refused(RunError, "data.max_length: 33", "32 tokens"):
        started(run_file(tmp_path, tmp_path / "base", {"train": "data.jsonl", "max_length": 33}, output_dir="other"))


def test_a_classifier_of_any_length(llama_directory: Path, tmp_path: Path) -> None:
    _decoder("xlnet").save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(llama_directory).save_pretrained(tmp_path / "base")
    write(tmp_path / "data.jsonl", LABELLED)
    assert started(run_file(tmp_path, tmp_path / "base", training={"steps": 1})).steps == 1


def test_a_classifier_reads_a_text_alike_in_every_batch(llama_directory: Path, tmp_path: Path) -> None:
    """Though its configuration names another padding token than its tokenizer pads with."""
    model: Any = FAMILIES["llama"].build()
    model.config.pad_token_id = 5
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(llama_directory).save_pretrained(tmp_path / "base")
    rows = [{"text": words(*range(n, n + 1 + n % 5)), "label": "ab"[n % 2]} for n in range(20)]

    def before(size: int) -> float:
        write(tmp_path / str(size) / "data.jsonl", rows)
        data = {"train": "data.jsonl", "hold_out": 0.5}
        path = run_file(tmp_path / str(size), tmp_path / "base", data, training={"steps": 1, "batch_size": size})
        return started(path).evaluations[0]["loss"]

    assert before(8) == pytest.approx(before(1), rel=1e-5)


def test_a_text_that_an_encoder_decoder_would_not_read_once(
    tmp_path: Path, llama_directory: Path, refused: Any
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama_directory)
    row = Row({"text": "w1 </s> w2 </s>", "label": "a"}, "data.jsonl, line 7")
    with refused(pc.DataError, "data.jsonl, line 7", "gives 2 of them"):
        prepare_labelled([row], ["a", "b"], tokenizer, 20, end=tokenizer.eos_token_id)
    model: Any = FAMILIES["t5"].build()
    model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    write(tmp_path / "data.jsonl", LABELLED)
    with refused(pc.DataError, "data.jsonl, line", "gives 0 of them"):  # this tokenizer adds none
        started(run_file(tmp_path, tmp_path / "base"))


@pytest.mark.parametrize("rows", [PAIRS, LABELLED], ids=["pairs", "labels"])
def test_a_tokenizer_without_special_tokens(
    rows: list[dict[str, Any]], llama_directory: Path, tmp_path: Path, refused: Any
) -> None:
    from transformers import PreTrainedTokenizerFast

    shutil.copytree(llama_directory, tmp_path / "base")
    bare = PreTrainedTokenizerFast(tokenizer_object=AutoTokenizer.from_pretrained(llama_directory).backend_tokenizer)
    bare.save_pretrained(tmp_path / "base")
    write(tmp_path / "data.jsonl", rows)
    with refused(ModelError, "neither a padding token nor an end of sequence", "pad_token"):
        started(run_file(tmp_path, tmp_path / "base"))
    with refused(pc.DataError, "a prompt is empty"):
        prompts.prompt_ids("", bare)


# Packing


def test_packed_examples_do_not_see_each_other(llama_directory: Path) -> None:
    model: Any = FAMILIES["llama"].build()
    tokenizer = AutoTokenizer.from_pretrained(llama_directory)
    rows = [Row(row, "here") for row in [*PAIRS[:4], *TEXTS[:4]]]
    examples = [
        tokens
        for row, kind in zip(rows, ["prompt"] * 4 + ["text"] * 4, strict=True)
        for tokens in prepare_causal([row], kind, tokenizer, 20).tokens
    ]
    packed = pack(examples, 20)
    assert len(packed) < len(examples) and all(sum(len(t.input_ids) for t in row) <= 20 for row in packed)
    assert sorted(map(repr, (t for row in packed for t in row))) == sorted(map(repr, examples))
    batch = PackedCollator(0)(packed)
    model.config.use_cache = False
    alone = evaluate(model, examples, 0)
    assert model(**batch).loss.item() == pytest.approx(alone, rel=1e-5)


def test_a_packed_run(llama_directory: Path, tmp_path: Path, program: Callable[..., Any]) -> None:
    write(tmp_path / "data.jsonl", PAIRS)
    data = {"train": "data.jsonl", "packing": True, "max_length": 16}
    ran = program("train", run_file(tmp_path, llama_directory, data), "--json")
    assert ran.status == 0, ran.err
    report = json.loads(ran.out)
    assert report["packed_rows"] == 8 and report["training_examples"] == 22


class Leaky(nn.Module):
    """Takes positions, and pays no attention to them."""

    dtype = torch.float32

    def forward(self, input_ids: Any, position_ids: Any) -> Any:
        return type("Out", (), {"logits": nn.functional.one_hot(input_ids, 60).float().cumsum(1)})


def test_an_architecture_that_mixes_packed_examples_is_refused(refused: Any) -> None:
    tokens = [Tokens([3, 4, 5], [IGNORED, 4, 5]), Tokens([6, 7], [IGNORED, 7])]
    with refused(RunError, "Leaky", "see each other", "data.packing"):
        check_packing(Leaky(), tokens)
    with refused(RunError, "MambaForCausalLM", "no position_ids", "data.packing"):
        check_packing(FAMILIES["mamba"].build(), tokens)
    check_packing(FAMILIES["gpt2"].build(), tokens)


def test_no_call_makes_a_cache() -> None:
    """Some hybrids, all of whose layers are recurrent, and xLSTM cannot be called beside one."""
    model, calls = FAMILIES["llama"].build(), []
    model.register_forward_pre_hook(lambda _, args, given: calls.append(given), with_kwargs=True)
    tokens = [Tokens(list(range(5, 15)), list(range(5, 15)))]
    batch_convention(model, tokens, 0)
    check_packing(model, tokens)
    assert calls and all(given["use_cache"] is False for given in calls)


class Picky(nn.Module):
    """Wants a picture."""

    dtype = torch.float32

    def forward(self, input_ids: Any, labels: Any = None, position_ids: Any = None, pixels: Any = None) -> Any:
        return pixels.mean()


def test_a_model_that_cannot_be_called_with_tokens_alone(refused: Any) -> None:
    tokens = [Tokens([3, 4, 5], [IGNORED, 4, 5])]
    with refused(RunError, "Picky does not take input_ids, labels alone", "AttributeError", "a loop of your own"):
        batch_convention(Picky(), tokens, 0)
    with refused(RunError, "Picky does not take input_ids, position_ids alone"):
        check_packing(Picky(), tokens)


# Tokens


def test_loss_is_on_what_the_assistant_writes(chat_directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_directory)
    (tokens,) = prepare_causal([Row(CHATS[5], "here")], "messages", tokenizer, 512).tokens
    learned = tokenizer.decode([token for token in tokens.labels if token != IGNORED])
    assert learned == "w5 w6 </s> w8 </s>"
    assert [t for t, label in zip(tokens.input_ids, tokens.labels, strict=True) if label not in (IGNORED, t)] == []


def test_a_conversation_that_the_assistant_begins(chat_directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_directory)
    messages = [{"role": "assistant", "content": "w1 w2"}, *CHATS[5]["messages"][:2]]
    (tokens,) = prepare_causal([Row({"messages": messages}, "here")], "messages", tokenizer, 512).tokens
    assert tokenizer.decode([token for token in tokens.labels if token != IGNORED]) == "w1 w2 </s> w5 w6 </s>"
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    (tokens,) = prepare_causal([Row({"messages": messages[:1]}, "here")], "messages", tokenizer, 512).tokens
    assert tokens.labels[0] == IGNORED and tokens.labels[1:] == tokens.input_ids[1:]  # nothing predicts the first


def test_lengths_of_conversations(chat_directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_directory)
    rows = [
        Row(row, f"row {n}")
        for n, row in enumerate(
            [
                *CHATS[:3],
                {"messages": [{"role": "user", "content": words(*range(40))}, {"role": "assistant", "content": "w1"}]},
            ]
        )
    ]
    prepared = prepare_causal(rows, "messages", tokenizer, 14)
    assert (len(prepared.tokens), prepared.truncated, prepared.dropped) == (3, 3, 1)
    assert all(len(tokens.input_ids) == 14 for tokens in prepared.tokens)
    with pytest.raises(pc.DataError, match="beyond the first 2 tokens; raise"):
        prepare_causal(rows[3:], "messages", tokenizer, 2)


def test_examples_of_like_length_come_together() -> None:
    lengths = [(7 * n) % 31 for n in range(103)]
    sampler = LengthGroupedSampler(lengths, 4, seed=1)
    first = list(sampler)
    assert sorted(first) == list(range(103)) and list(sampler) == first
    sampler.set_epoch(1)
    assert sorted(sampler) == list(range(103)) and list(sampler) != first
    spread = [max(part) - min(part) for at in range(0, 100, 4) if (part := [lengths[n] for n in first[at : at + 4]])]
    assert sum(spread) / len(spread) < 4
