"""Prompts: text and chats as a tokenizer takes them, and what a model writes after them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .errors import DataError, ModelError, first_line
from .loading import quiet_transformers
from .models import most_tokens


@torch.no_grad()
def complete(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int = 32, rendered: bool = False) -> str:
    """What the model writes after `prompt`, always taking the likeliest token; without special tokens.

    It ends at the latest where the model's positions do. `rendered`: see `prompt_ids`.

    Raises:
        ModelError: the prompt leaves no position to write in.
    """
    ids = torch.tensor([prompt_ids(prompt, tokenizer, rendered)], device=model.device)
    length, limit = ids.shape[1], most_tokens(model)
    if limit is not None and length >= limit:
        raise ModelError(
            f"the prompt has {length} tokens, but prompt and completion together can have {limit}; shorten the prompt"
        )
    with quiet_transformers(), _plainly(model, tokenizer.pad_token_id):
        written = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens if limit is None else min(max_new_tokens, limit - length),
        )
    return str(tokenizer.decode(written[0, length:], skip_special_tokens=True))


@contextmanager
def _plainly(model: Any, pad_token_id: int | None) -> Iterator[None]:
    """Within the block the model generates greedily, without what its generation_config.json says of penalties, beams and the
    like, which transformers would add to every argument that is not given.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    ends = {name: getattr(own, name, None) for name in ("bos_token_id", "eos_token_id")}
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=pad_token_id, **ends)
    try:
        yield
    finally:
        model.generation_config = own


def rendered_chat(messages: list[dict[str, Any]], tokenizer: Any, prompt: bool) -> str:
    """Messages with role and content as the tokenizer's chat template writes them.

    Args:
        prompt: end with what begins the assistant's answer.

    Raises:
        DataError: the template refuses them.
    """
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    except Exception as error:  # templates raise what they like
        raise DataError(f"the chat template refuses: {first_line(error)}") from None


def prompt_ids(prompt: str, tokenizer: Any, rendered: bool = False) -> list[int]:
    """Tokens of a prompt, with what the tokenizer puts at the start of a text; never empty.

    Args:
        rendered: by a chat template, which has written the tokens at its start and end itself.

    Raises:
        DataError: the prompt is empty, and the tokenizer has no token to begin with.
    """
    ids = list(tokenizer(prompt, add_special_tokens=not rendered)["input_ids"])
    while not rendered and ids and ids[-1] == tokenizer.eos_token_id:  # it would end before its completion
        ids.pop()
    if ids:
        return ids
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return [token]
    raise DataError(
        "a prompt is empty, and the tokenizer has no token that begins or ends a text to stand for it; give a prompt"
    )


def whole_text(text: str, place: str) -> str:
    """`text`, if a tokenizer can take it: JSON can hold half of a character, an argument bytes that are not UTF-8.

    Raises:
        DataError: it cannot; `place` is named.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: {text[error.start]} is not a character but half of a surrogate pair, or a byte that is not UTF-8; "
            "remove it"
        ) from None
    return text
