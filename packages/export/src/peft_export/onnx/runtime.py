"""An ONNX export in ONNX Runtime: its logits, computed in every way that the graphs allow, and its greedy continuation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_core import CheckpointError

from .. import output
from ..running import shifted
from .graphs import DECODER, ENCODER, MODEL
from .installed import require_packages

ONE_BY_ONE, PADDED, WHOLE = "with the cache", "in a padded batch", "at once"

_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(int64)": torch.int64,
}


class OnnxModel:
    """An export opened for running on the CPU.

    Attributes:
        generates: it has a cache. two_sided: it is an encoder and a decoder.
    """

    def __init__(self, directory: str | Path) -> None:
        """Open the files.

        Raises:
            CheckpointError: one is missing, or ONNX Runtime cannot load it. ModelError: a package is missing.
        """
        require_packages()
        folder = Path(directory)
        self.two_sided = (folder / f"{ENCODER}.onnx").is_file()
        self._encoder = _Session(folder / f"{ENCODER}.onnx") if self.two_sided else None
        self._model = _Session(folder / f"{DECODER if self.two_sided else MODEL}.onnx")
        config = output.read_config(folder)
        self._start = config.get("decoder_start_token_id") or 0
        self._pad = {**config, **(config.get("text_config") or {})}.get("pad_token_id") or 0
        self._masked = "attention_mask" in (self._encoder or self._model).inputs
        self.generates = any(name.startswith("past_key_values.") for name in self._model.inputs)

    def logits(self, ids: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        """Each prompt's logits [tokens, vocabulary] (or [1, classes]) in float32, by the way in which they were computed."""
        ways = {WHOLE: [self._alone(prompt, len(prompt)) for prompt in ids]}
        if self.generates:
            ways[ONE_BY_ONE] = [self._alone(prompt, (len(prompt) + 1) // 2) for prompt in ids]
        if self._masked and len(ids) > 1:
            ways[PADDED] = self._together(ids)
        return ways

    def greedy(self, ids: Tensor, count: int) -> Tensor:
        """The likeliest continuation [count] of a prompt, token by token with the cache."""
        state = _State(self, ids[None], torch.ones_like(ids[None]))
        token = torch.tensor([[self._start]]) if self.two_sided else ids[None]
        written = []
        for _ in range(count):
            token = state.step(token)[:, -1:].argmax(-1)
            written.append(token[0])
        return torch.cat([ids[:0], *written])

    def _alone(self, ids: Tensor, first: int) -> Tensor:
        """A prompt by itself: `first` tokens at once, the others one by one."""
        state = _State(self, ids[None], torch.ones_like(ids[None]))
        tokens = shifted(ids, self._start)[None] if self.two_sided else ids[None]
        pieces = [tokens[:, :first], *tokens[:, first:].split(1, dim=1)] if first < len(ids) else [tokens]
        found = torch.cat([state.step(piece) for piece in pieces], dim=-2)
        return found.reshape(-1, found.shape[-1])

    def _together(self, ids: Sequence[Tensor]) -> list[Tensor]:
        """All prompts in one batch: filled up on the left for models that write on and are told positions, else on the right."""
        left = self.generates and "position_ids" in self._model.inputs
        masks = _batch([torch.ones_like(prompt) for prompt in ids], left)
        state = _State(self, _batch(ids, left, self._pad), masks)
        texts = [shifted(prompt, self._start) for prompt in ids] if self.two_sided else ids
        found = state.step(_batch(texts, left, self._pad))
        if found.dim() == 2:  # a class per text
            return list(found[:, None])
        return [row[mask.bool()] for row, mask in zip(found, masks, strict=True)]


class _State:
    """A batch in progress: its cache, its mask and how far it is."""

    def __init__(self, model: OnnxModel, ids: Tensor, mask: Tensor) -> None:
        """`ids`, `mask`: [batch, tokens], of the whole texts as far as they are known."""
        self._model, self._mask = model._model, mask
        self._seen = 0
        self._feeds: dict[str, Tensor] = {}
        if model._encoder is not None:
            made = model._encoder.run({"input_ids": ids, "attention_mask": mask})
            self._feeds = {name.replace("present.", "past_key_values."): value for name, value in made.items()}
            self._feeds["encoder_attention_mask"] = mask
        for name, shape in self._model.inputs.items():
            if name.startswith("past_key_values.") and name not in self._feeds:
                self._feeds[name] = torch.zeros(len(ids), shape[1], 0, shape[3])

    def step(self, ids: Tensor) -> Tensor:
        """Logits after these further tokens [batch, tokens], or of the texts' classes."""
        end = self._seen + ids.shape[1]
        grown = end - self._mask.shape[1]
        mask = nn.functional.pad(self._mask, (0, grown), value=1) if grown > 0 else self._mask[:, :end]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, self._seen :]
        own = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        made = self._model.run({**self._feeds, **own, "token_type_ids": torch.zeros_like(ids)})
        self._seen = end
        self._feeds |= {
            name.replace("present.", "past_key_values."): value
            for name, value in made.items()
            if name.startswith("present.")
        }
        if "logits" not in made:
            raise CheckpointError(f"'{self._model.path}' has no logits to compare, only {', '.join(made)}")
        return made["logits"].float()


class _Session:
    """One ONNX file: named tensors in and out."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise CheckpointError(f"'{path}' is missing")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Threads that wait by spinning take the time of whatever else runs here.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 4  # what it reports as an error, it raises as well
        try:
            self._session: Any = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its own classes, which derive from nothing narrower
            reason = str(error).rpartition(" : ")[2]  # before it: codes, and the signature of a function
            raise CheckpointError(
                f"'{path}' or its data cannot be loaded: {' '.join(reason.split())[:300].rstrip('.')}; export it again"
            ) from error
        self.path = path
        self.inputs = {found.name: found.shape for found in self._session.get_inputs()}
        self._dtypes = {found.name: _DTYPES[found.type] for found in self._session.get_inputs()}
        self._outputs = [found.name for found in self._session.get_outputs()]

    def run(self, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
        """The outputs for those of these tensors that are inputs."""
        given = {name: feeds[name].to(dtype).contiguous().numpy() for name, dtype in self._dtypes.items()}
        found = self._session.run(None, given)
        return {name: torch.from_numpy(value) for name, value in zip(self._outputs, found, strict=True)}


def _batch(texts: Sequence[Tensor], left: bool, fill: int = 0) -> Tensor:
    """[texts, longest], filled up with one token."""
    longest = max(map(len, texts))
    gaps = [(longest - len(text), 0) if left else (0, longest - len(text)) for text in texts]
    return torch.stack([nn.functional.pad(text, gap, value=fill) for text, gap in zip(texts, gaps, strict=True)])
