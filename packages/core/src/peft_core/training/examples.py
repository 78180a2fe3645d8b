"""Rows in tokens: what a model reads and where its loss is taken, cut to a length, packed into rows.

What is cut or left out for its length is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DataError, listed
from ..prompts import prompt_ids, rendered_chat, whole_text
from .rows import Row, label_of, messages_of, text_of

IGNORED = -100
"""The label of a token that no loss is taken on (what torch's and transformers' losses skip)."""
_MARK = "\ufdd0"
"""A sign that no text contains (Unicode reserves it for a program's own use)."""


@dataclass(frozen=True)
class Tokens:
    """One tokenized example.

    Attributes:
        labels: `input_ids` where the loss is taken, else IGNORED; for a classifier, the number of the class alone.
        truncated: whether something was cut to fit the length.
    """

    input_ids: list[int]
    labels: list[int]
    truncated: bool = False


@dataclass(frozen=True)
class Prepared:
    """The examples of a data set, tokenized.

    Attributes:
        truncated: how many of them were cut.
        dropped: how many more were left out, because nothing to learn from was left within the length.
    """

    tokens: tuple[Tokens, ...] = ()
    truncated: int = 0
    dropped: int = 0


def prepare_causal(rows: Sequence[Row], kind: str, tokenizer: Any, max_length: int) -> Prepared:
    """Texts, prompts with completions, or conversations, for a causal language model; loss on what it should write.

    Raises:
        DataError: a row does not have the format; the tokenizer has no chat template, or one that cannot be used.
    """
    if kind == "messages" and not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "messages need a chat template, and this model's tokenizer has none; use prompt and completion instead"
        )
    if kind == "messages" and not tokenizer.is_fast:
        raise DataError("messages need a fast tokenizer, to know which tokens the assistant wrote")
    make = {"text": _text_tokens, "prompt": _prompt_tokens, "messages": _chat_tokens}[kind]
    made = [make(row, tokenizer, max_length) for row in rows]
    kept = tuple(tokens for tokens in made if any(label != IGNORED for label in tokens.labels[1:]))
    if not kept:
        cut = any(tokens.truncated for tokens in made)
        remedy = (
            f"all that is to be learned lies beyond the first {max_length} tokens; raise data.max_length or shorten the prompts"
            if cut
            else "the tokenizer makes no tokens of what is to be learned; check the completions, and that it is the model's own"
        )
        raise DataError(f"{rows[0].place}: no example has a token to learn: {remedy}")
    return Prepared(kept, truncated=sum(tokens.truncated for tokens in kept), dropped=len(made) - len(kept))


def prepare_stream(rows: Sequence[Row], tokenizer: Any, max_length: int) -> Prepared:
    """Texts one after the other, each with its end of sequence, cut into examples of `max_length` tokens.

    For pre-training: nothing is lost but the remainder that does not fill an example.

    Raises:
        DataError: a row has no text; together they do not fill one example.
    """
    ids = [token for row in rows for token in _ended(row, tokenizer)]
    if len(ids) < max_length:
        raise DataError(
            f"{rows[0].place}: all texts together have {len(ids)} tokens, less than one example of {max_length}; "
            "lower data.max_length"
        )
    cut = (ids[at : at + max_length] for at in range(0, len(ids) - max_length + 1, max_length))
    return Prepared(tuple(Tokens(part, [IGNORED, *part[1:]]) for part in cut))  # nothing predicts the first


def prepare_labelled(
    rows: Sequence[Row], classes: Sequence[str], tokenizer: Any, max_length: int, end: int | None = None
) -> Prepared:
    """Texts with the numbers of their labels, for a sequence classifier.

    Args:
        end: the token that a text is read at, where the model looks for it: once in each text.

    Raises:
        DataError: a row is not a text with one of these labels, or is not read once.
    """
    index = {name: number for number, name in enumerate(classes)}
    made = []
    for row in rows:
        name = label_of(row)
        if name not in index:
            raise DataError(
                f"{row.place}: the label '{name}' does not occur in the training data, which has {listed(classes, 20)}; add "
                "rows with it, or, where held-out rows are drawn from it, change training.seed or set data.evaluation"
            )
        text = text_of(row)
        whole = len(tokenizer(text, truncation=False, verbose=False)["input_ids"])
        ids = list(tokenizer(text, truncation=True, max_length=max_length)["input_ids"])
        if end is not None and ids.count(end) != 1:
            raise DataError(
                f"{row.place}: the model reads a text at its end token {end}, which must be there once, and the tokenizer "
                f"gives {ids.count(end)} of them; take it out of the text, or use a tokenizer that ends texts with it"
            )
        made.append(Tokens(ids, [index[name]], truncated=whole > len(ids)))
    return Prepared(tuple(made), truncated=sum(tokens.truncated for tokens in made))


def pair_tokens(prompt: str, completion: str, tokenizer: Any, max_length: int) -> Tokens:
    """Tokens of prompt, completion and end of sequence; loss on the last two.

    A prompt that is too long loses its middle, so that what opens it (a signature) and what closes it (the question)
    both stay. A completion that fills `max_length` alone is cut at its end.
    """
    start = prompt_ids(prompt, tokenizer)
    end = list(tokenizer(completion, add_special_tokens=False)["input_ids"])
    if tokenizer.eos_token_id is not None:
        end.append(tokenizer.eos_token_id)
    kept = end[: max_length - 1]  # one prompt token at least: the first completion token needs a predecessor
    room = max_length - len(kept)
    truncated = len(kept) < len(end) or room < len(start)
    if len(start) > room:
        tail = room // 2
        start = start[: room - tail] + start[len(start) - tail :]
    return Tokens(start + kept, [IGNORED] * len(start) + kept, truncated)


def pack(examples: Sequence[Tokens], max_length: int) -> list[list[Tokens]]:
    """Examples in rows of at most `max_length` tokens, the longest first into the fullest row that takes it."""
    rows: list[list[Tokens]] = []
    by_room: dict[int, list[int]] = {}
    for tokens in sorted(examples, key=length_of, reverse=True):
        length = length_of(tokens)
        room = min((room for room, open_rows in by_room.items() if room >= length and open_rows), default=None)
        if room is None:
            rows.append([tokens])
            number, room = len(rows) - 1, max_length
        else:
            number = by_room[room].pop()
            rows[number].append(tokens)
        by_room.setdefault(room - length, []).append(number)
    return rows


def length_of(example: Tokens | Sequence[Tokens]) -> int:
    """Tokens of an example, or of a packed row of them."""
    return len(example.input_ids) if isinstance(example, Tokens) else sum(map(length_of, example))


def _text_tokens(row: Row, tokenizer: Any, max_length: int) -> Tokens:
    ids = _ended(row, tokenizer)
    kept = ids[:max_length]
    return Tokens(kept, [IGNORED, *kept[1:]], truncated=len(kept) < len(ids))  # nothing predicts the first


def _ended(row: Row, tokenizer: Any) -> list[int]:
    """The text's tokens with an end of sequence, if the tokenizer has one."""
    ids = list(tokenizer(text_of(row), verbose=False)["input_ids"])
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    return ids


def _prompt_tokens(row: Row, tokenizer: Any, max_length: int) -> Tokens:
    return pair_tokens(text_of(row, "prompt", may_be_empty=True), text_of(row, "completion"), tokenizer, max_length)


def _chat_tokens(row: Row, tokenizer: Any, max_length: int) -> Tokens:
    """A conversation through the chat template, with loss on what the assistant writes, its end included."""
    messages = messages_of(row)
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{row.place}: no message is the assistant's, so there is nothing to learn")
    whole = whole_text(_rendered(row, tokenizer, messages, False), row.place)
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        after = _rendered(row, tokenizer, messages[: number + 1], False)
        if number:
            before = _rendered(row, tokenizer, messages[:number], True)
        else:  # templates refuse to write no message; what they put before the content of the first
            before = _rendered(row, tokenizer, [{**message, "content": _MARK}], False).partition(_MARK)[0]
        if not (whole.startswith(before) and whole.startswith(after.rstrip())):
            raise DataError(
                f"{row.place}: the chat template writes message {number + 1} differently when others follow; "
                "split the conversation into one row per answer"
            )
        spans.append((len(before), len(after.rstrip())))
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = list(encoded["input_ids"])
    labels = [
        token if any(start < end and low <= start < high for low, high in spans) else IGNORED
        for token, (start, end) in zip(ids, encoded["offset_mapping"], strict=True)
    ]
    labels[:1] = [IGNORED]  # nothing predicts the first
    return Tokens(ids[:max_length], labels[:max_length], truncated=len(ids) > max_length)


def _rendered(row: Row, tokenizer: Any, messages: list[dict[str, Any]], prompt: bool) -> str:
    try:
        return rendered_chat(messages, tokenizer, prompt)
    except DataError as error:
        raise DataError(f"{row.place}: {error}") from None
