"""How a model has to be given batches, found by trying, so that it reads examples as it reads one alone."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..errors import first_line
from .batches import ClassificationCollator, PackedCollator, collate
from .config import RunError
from .examples import Tokens, length_of
from .losses import next_token_loss


class BatchConvention(NamedTuple):
    """How a causal language model takes a batch.

    Attributes:
        pads_left: padding on the left, with positions from 0 after it, changes nothing; else `collate` pads on the right.
        own_loss: its own loss is that of the next token, and is divided by as many as it is told that there are in a step.
    """

    pads_left: bool = True
    own_loss: bool = True


@torch.no_grad()
def batch_convention(model: Any, examples: Sequence[Tokens], pad: int) -> BatchConvention:
    """How the model must be given a batch to read each example as it reads one alone.

    Raises:
        RunError: a token sees those that follow, which it should predict.
    """
    if getattr(model, "is_quantized", False):
        return BatchConvention()  # its kernels may need the GPU, and it is not there yet
    ids = max(examples, key=length_of).input_ids[:32]
    first = len(ids) // 2
    rows = torch.tensor([ids, ids[:first] + ids[: len(ids) - first]])  # they begin alike
    own = _called(model, input_ids=rows, labels=rows)
    alone, followed = own.logits[:, :first].float()
    if (off := _off(followed, alone)) > _tolerance(model):
        raise RunError(
            f"{type(model).__name__} lets a token see those that follow (logits are off by {off:.1%}), so there is nothing "
            "to predict; use a causal model, or set is_decoder to true in the config.json of a model like BERT"
        )
    pair = [Tokens(some, some) for some in (ids[:first], ids)]

    def off_in_batch(left: bool) -> float:
        batch = collate(pair, pad, left)
        del batch["labels"]
        logits = _called(model, **batch).logits.float()
        start = logits.shape[1] - first if left else 0
        return max(_off(logits[0, start : start + first], alone), _off(logits[1, :first], alone))

    off = off_in_batch(left=True)
    following = next_token_loss(own, rows)
    same = cross_entropy(own.logits.flatten(0, 1).float(), rows.flatten())
    return BatchConvention(
        pads_left=off <= _tolerance(model) or off <= 2 * off_in_batch(left=False),  # both: by rounding
        own_loss=bool((own.loss - following).abs() <= (own.loss - same).abs())
        and _divides(model, rows, own.loss, following),
    )


def _divides(model: Any, rows: Tensor, loss: Tensor, following: Tensor) -> bool:
    """Whether the model divides the loss of its tokens by the number that it is given, so that every token of a step weighs the
    same however the step is divided into forward passes.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    if not getattr(model, "accepts_loss_kwargs", True) or all(each.kind is not each.VAR_KEYWORD for each in parameters):
        return False  # transformers' Trainer would not tell it
    items = torch.tensor(2 * rows[:, 1:].numel())
    halved = _called(model, items, input_ids=rows, labels=rows).loss
    return bool((halved - (loss - following / 2)).abs() <= (halved - loss).abs())


@torch.no_grad()
def padding_side(model: Any, examples: Sequence[Tokens], tokenizer: Any) -> str:
    """The side on which texts are padded for a classifier: the tokenizer's own, unless the model reads a text as it reads one
    alone on the other side only. (Tokenizers are set to the left for generating, and some models count padding as positions.)
    """
    own = str(tokenizer.padding_side)
    short = min(examples, key=length_of)
    longer = [tokens for tokens in examples if length_of(tokens) > length_of(short)]
    if not longer or getattr(model, "is_quantized", False):  # whose kernels may need the GPU, and it is not there yet
        return own
    long = max((some for some in longer if length_of(some) <= 64), key=length_of, default=min(longer, key=length_of))

    def logits(texts: Sequence[Tokens], side: str) -> Tensor:
        batch = ClassificationCollator(tokenizer, side)(texts)
        del batch["labels"]
        found: Tensor = _called(model, **batch).logits[0]
        return found.float()

    alone = logits([short], own)
    off, other = _off(logits([short, long], own), alone), "right" if own == "left" else "left"
    return other if off > _tolerance(model) and off > 2 * _off(logits([short, long], other), alone) else own


@torch.no_grad()
def check_packing(model: Any, examples: Sequence[Tokens]) -> None:
    """Make sure that no example sees the one before it in its row.

    Raises:
        RunError: the model's architecture lets it.
    """
    remedy = "set data.packing to false"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise RunError(f"{type(model).__name__} takes no position_ids to keep packed examples apart; {remedy}")
    first, second = (Tokens(tokens.input_ids[:32], tokens.labels[:32]) for tokens in (examples[0], examples[-1]))

    def logits(row: list[Tokens]) -> Tensor:
        batch = PackedCollator(0)([row])
        # Beside a cache, transformers looks for no packed rows.
        found: Tensor = _called(model, input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
        return found[0].float()

    off = _off(logits([first, second])[len(first.input_ids) :], logits([second]))
    if off > _tolerance(model):
        raise RunError(
            f"{type(model).__name__} lets packed examples see each other (logits are off by {off:.1%}); {remedy}"
        )


def _called(model: Any, items: Tensor | None = None, **given: Tensor) -> Any:
    """What the model makes of as much of a batch as it takes, without a cache, and of the number of `items` in its step.

    Raises:
        RunError: it cannot be called so.
    """
    offered = {**given, "use_cache": False}
    known = inspect.signature(model.forward).parameters
    taken = {name: value for name, value in offered.items() if name in known}
    if items is not None:
        taken["num_items_in_batch"] = items
    try:
        return model(**taken)
    except Exception as error:  # of a model's own code
        raise RunError(
            f"{type(model).__name__} does not take {', '.join(given)} alone ({type(error).__name__}: {first_line(error)}); train "
            "it in a loop of your own"
        ) from error


def _off(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def _tolerance(model: Any) -> float:
    """What rounding may change of logits, as a part of them."""
    return 1e-4 if model.dtype == torch.float32 else 3e-2
