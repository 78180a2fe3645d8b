"""RUN.yaml: what `peft-core train` is asked to do.

It is read strictly: a mistake is one line that names the key and the remedy.
"""

from __future__ import annotations

import json
import os
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from ..errors import PeftCoreError, finding, listed, reason
from ..spec import AdapterSpec
from .rows import SUFFIXES

CONFIG = "run.yaml"
"""The configuration of a run in its `output_dir`."""


class RunError(PeftCoreError):
    """The configuration of a run is not valid, or does not fit the model, the data or what `output_dir` holds."""


def _absolute(path: str | Path, info: ValidationInfo) -> Path:
    """The same wherever the program is started, and wherever the configuration is written to."""
    folder = (info.context or {}).get("folder", Path())
    try:
        return Path(os.path.abspath(folder / Path(path).expanduser()))
    except RuntimeError:
        raise ValueError(f"there is no user whose home directory {path} could be in; write the path out") from None


def _if_path(name: str, info: ValidationInfo) -> str:
    """An absolute path where there is such a thing, or one was meant; anything else is a name and stays as it is."""
    path = _absolute(name, info)
    meant = name.startswith(("./", "../", "~")) or Path(name).suffix in SUFFIXES
    return str(path) if meant or path.exists() else name


PathOrName = Annotated[str, AfterValidator(_if_path)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelSection(_Section):
    """The base model. A string alone is its `path`."""

    path: PathOrName = Field(
        description="Checkpoint directory, a known name (smollm2-135m), package:NAME/FOLDER for one inside an installed "
        "Python package, or a name on the Hugging Face hub. With `pretrain` a config.json or a model type (llama) will do."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto: the checkpoint's own, but float32 where the machine is slow in 16 bits."
    )
    device: Literal["auto", "cpu", "cuda", "mps", "xpu"] = Field(
        default="auto", description="auto: the GPU, if there is one; mps is Apple's, xpu Intel's."
    )

    @model_validator(mode="before")
    @classmethod
    def _short(cls, data: Any) -> Any:
        return {"path": data} if isinstance(data, str) else data

    @property
    def used_device(self) -> str:
        """`device`, or what torch finds where that is `auto`."""
        if self.device != "auto":
            return self.device
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found.type if found else "cpu"


class PretrainSection(_Section):
    """Start from random weights instead of those in `model.path`: drawn by `training.seed`, saved to output_dir/base."""

    config: dict[str, Any] = Field(
        default={},
        description="Fields of the model's configuration that differ from those in `model.path`: hidden_size, ...",
    )
    tokenizer: PathOrName | None = Field(
        default=None, description="Directory of the tokenizer; null: the one in `model.path`."
    )
    vocab_size: int | None = Field(
        default=None,
        ge=260,  # the bytes, the end of a text, and something to learn
        description="Train a new tokenizer on `data.train`: a byte-level BPE of this many tokens.",
    )

    @model_validator(mode="after")
    def _one_tokenizer(self) -> PretrainSection:
        if self.tokenizer is not None and self.vocab_size is not None:
            raise ValueError("tokenizer names an existing one and vocab_size trains a new one; choose one of them")
        return self


class DataSection(_Section):
    """What to train on. A string alone is `train`."""

    train: PathOrName = Field(description="A .jsonl, .csv or .parquet file, or a name for `datasets.load_dataset`.")
    evaluation: PathOrName | None = Field(
        default=None, description="Data to evaluate on, as for `train`; null: a part of `train`."
    )
    hold_out: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="Without `evaluation`: the part of `train` that is held out for it; 0: none.",
    )
    format: Literal["auto", "text", "prompt", "messages", "label"] = Field(
        default="auto",
        description="Columns: text; prompt and completion; messages; text and label. auto: by the columns.",
    )
    subset: str | None = Field(default=None, description="Configuration of a `datasets` name.")
    split: str = Field(default="train", description="Split of a `datasets` name.")
    evaluation_split: str = Field(default="test", description="Split of a `datasets` name given as `evaluation`.")
    max_length: int | None = Field(
        default=None,
        ge=2,
        description="Tokens of the longest example; longer ones are cut. null: 512, or what the model can take if that is less.",
    )
    packing: bool = Field(
        default=False, description="Put several examples into one row of `max_length` tokens (causal language models)."
    )

    @model_validator(mode="before")
    @classmethod
    def _short(cls, data: Any) -> Any:
        return {"train": data} if isinstance(data, str) else data


class TrainingSection(_Section):
    """How to train."""

    epochs: float | None = Field(
        default=None, gt=0, description="Passes over the data; null: 1, unless `steps` is given."
    )
    steps: int | None = Field(default=None, gt=0, description="Optimizer steps, instead of `epochs`.")
    batch_size: int = Field(
        default=8, ge=1, description="Examples (or packed rows) in a forward pass, on each process."
    )
    accumulate: int = Field(default=1, ge=1, description="Forward passes for one optimizer step.")
    lr: float = Field(default=1e-3, gt=0, description="Highest learning rate.")
    module_lr: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={},
        description="Other learning rates for modules that are trained in full, by name: {embed_tokens: 0.01}.",
    )
    schedule: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="Of the learning rate, after the warm-up."
    )
    warmup: float = Field(default=0.1, ge=0, lt=1, description="Part of the run over which the learning rate rises.")
    weight_decay: float = Field(default=0.0, ge=0, description="Weight decay of the optimizer.")
    max_grad_norm: float = Field(default=1.0, ge=0, description="Norm that gradients are clipped to; 0: no clipping.")
    optimizer: Literal["auto", "adamw", "adafactor", "sgd"] = Field(
        default="auto", description="auto: the method's own, if it has one, else AdamW."
    )
    autocast: bool = Field(
        default=False,
        description="Compute in bfloat16 where torch's autocast does; slow on a processor without instructions for it.",
    )
    checkpoint_activations: bool = Field(
        default=False, description="Recompute activations in backward: less memory, more time."
    )
    evaluate_every: int | None = Field(default=None, ge=1, description="Steps between evaluations; null: every epoch.")
    save_every: int | None = Field(default=None, ge=1, description="Steps between checkpoints; null: every epoch.")
    keep: int = Field(default=2, ge=1, description="How many checkpoints to keep.")
    best: bool = Field(
        default=False, description="Save the weights with the lowest evaluation loss, not the last ones."
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="Same seed, same numbers.")

    @model_validator(mode="after")
    def _consistent(self) -> TrainingSection:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("epochs and steps both set the length of the run; choose one")
        if self.best and self.save_every != self.evaluate_every:
            raise ValueError("best needs save_every and evaluate_every to be the same")
        return self


class RunConfig(_Section):
    """A whole RUN.yaml. Relative paths in it are relative to the file, and absolute once it is read.

    Attributes:
        adapter: None, for pre-training only: all of the model's weights are trained and saved.
    """

    model: ModelSection
    pretrain: PretrainSection | None = None
    data: DataSection
    adapter: AdapterSpec | None
    training: TrainingSection = TrainingSection()
    output_dir: Annotated[Path, AfterValidator(_absolute)] = Field(
        description="Directory for what the run leaves; it must not hold another run."
    )

    @field_validator("adapter", mode="before")
    @classmethod
    def _from_file(cls, data: Any, info: ValidationInfo) -> Any:
        return AdapterSpec.from_file(_absolute(data, info)) if isinstance(data, str) else data

    @model_validator(mode="after")
    def _something_to_train(self) -> RunConfig:
        if self.adapter is None and self.pretrain is None:
            raise ValueError("adapter: null trains all weights, which is for pre-training only; name a method")
        if self.pretrain is not None and self.data.packing:
            raise ValueError("pre-training packs its rows already; remove data.packing")
        return self

    @classmethod
    def from_file(cls, path: str | Path, pretrain: bool = False) -> RunConfig:
        """Read a RUN.yaml.

        Args:
            path: of the file; relative paths in it are relative to its directory.
            pretrain: whether to start from random weights even if the file has no section `pretrain`.

        Raises:
            RunError: the file cannot be read, or a key or value is not valid.
            SpecError: the adapter's spec is not valid.
            PluginError: the adapter's method is not installed.
        """
        path = Path(path)
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise RunError(f"cannot read '{path}': {reason(error)}") from None
        except yaml.YAMLError as error:
            raise RunError(f"'{path}' is not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(data, dict):
            raise RunError(f"'{path}': expected the keys {listed(cls.model_fields)}, got {type(data).__name__}")
        if pretrain and data.get("pretrain") is None:
            data["pretrain"] = {}
        return cls.from_data(data, path.parent, str(path))

    @classmethod
    def from_data(cls, data: dict[str, Any], folder: Path = Path(), what: str = "run") -> RunConfig:
        """The configuration in `data`; relative paths are relative to `folder`. See `from_file` for the errors."""
        try:
            return cls.model_validate(data, context={"folder": folder.resolve()})
        except ValidationError as error:
            found = sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
            raise RunError(f"{what}: " + "; ".join(_finding(cls, detail) for detail in found)) from None

    @property
    def go_on(self) -> str:
        """How to go on with a run that has stopped."""
        begun = (self.output_dir / CONFIG).is_file()
        return "what was saved is kept: continue with --resume" if begun else "nothing was trained yet: start again"

    def to_yaml(self) -> str:
        """The configuration with all defaults."""
        return str(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))


def differences(one: RunConfig, other: RunConfig) -> list[str]:
    """`data.max_length was 512, now 64`, for every key that differs and says what is trained (`training.keep` and `output_dir` do
    not).
    """
    return list(_differences(one.model_dump(mode="json"), other.model_dump(mode="json")))


def _differences(one: Any, other: Any, place: str = "") -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in dict.fromkeys([*one, *other]):
            yield from _differences(one.get(key), other.get(key), f"{place}.{key}".lstrip("."))
    elif one != other and place not in ("training.keep", "output_dir"):
        yield f"{place} was {json.dumps(one)}, now {json.dumps(other)}"


def _finding(model: type[BaseModel], detail: ErrorDetails) -> str:
    place = detail["loc"]
    if detail["type"] == "extra_forbidden":
        known = list(_section(model, place[:-1]).model_fields)
        return f"{finding(detail, known, 'key')}; the keys are {listed(known, 20)}"
    if detail["type"] in ("model_type", "model_attributes_type"):
        detail["msg"] = f"expected the keys {listed(_section(model, place).model_fields, 20)}"
    return finding(detail)


def _section(model: type[BaseModel], place: tuple[Any, ...]) -> type[BaseModel]:
    for name in place:
        annotation = model.model_fields[name].annotation
        options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
        model = next(option for option in options if isinstance(option, type) and issubclass(option, BaseModel))
    return model
