"""The adapter spec: what a user asks for, whatever the method."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from . import plugins
from .errors import SpecError, finding, listed, reason
from .method import Capabilities, MethodInfo

DTYPE_OF_NAME = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
Patterns = str | tuple[str, ...]


class AdapterSpec(BaseModel):
    """What to adapt and how. Frozen; equal specs on equal models give equal plans.

    Errors:
        SpecError: names the field and the nearest valid name.
        PluginError: the method is not installed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = Field(description="Name of an installed method; see `peft-core methods`.")
    targets: Patterns = Field(
        default="all-linear",
        description="'all-linear' (every linear layer but heads and tied embeddings), a list of module names or path "
        "suffixes, or one regex that must match the whole module path.",
    )
    exclude: Patterns = Field(
        default=(), description="What `targets` should leave out: a list of names or suffixes, or one regex."
    )
    layers: tuple[int, ...] | None = Field(
        default=None,
        description="Indices of the layers to adapt (the first number in a module's path); null: all.",
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="The method's own options, completed with its defaults."
    )
    overrides: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="Pattern (name, suffix or whole-path regex) → options that differ there. The last match wins.",
    )
    train_modules: tuple[str, ...] = Field(
        default=(),
        description="Names or suffixes of modules to train in full: a new head, embeddings, norms.",
    )
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0, description="Dropout on the adapter's input while training.")
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = Field(
        default="float32", description="dtype of the adapter's parameters; products run in the base's dtype."
    )
    base_model: str | None = Field(default=None, description="Name or path of the base model, for the record.")

    @field_validator("targets", "exclude", mode="before")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        if isinstance(value, str) and not value:
            raise ValueError("an empty pattern matches nothing")
        return value

    @model_validator(mode="after")
    def _completed(self) -> AdapterSpec:
        """With the method's options checked and complete."""
        info = self.info
        options = check_options(info, self.options)
        complete, general = options.model_dump(mode="json"), info.can(options)
        self._check_dropout(general, "these options")
        for pattern, different in self.overrides.items():
            where = f"overrides['{pattern}']"
            can = info.can(check_options(info, {**complete, **different}, where))
            self._check_dropout(can, f"the options of {where}")
            for whole in ("owns_base_weight", "optimizer_step"):
                if getattr(can, whole) != getattr(general, whole):
                    raise SpecError(
                        f"{where}: these options change '{whole}' of method '{self.method}', which must be the same for the "
                        "whole adapter; attach two adapters, each with its own targets"
                    )
        # Frozen for users; completed here, before anybody sees it.
        self.__dict__["options"] = _Options(complete)
        self.__dict__["overrides"] = _Options({pattern: _Options(own) for pattern, own in self.overrides.items()})
        return self

    def _check_dropout(self, can: Capabilities, options: str) -> None:
        if self.dropout and not can.dropout:
            raise SpecError(f"method '{self.method}' does not allow dropout with {options}; set dropout to 0")

    @model_validator(mode="wrap")
    @classmethod
    def _explained(cls, data: Any, handler: Callable[[Any], AdapterSpec]) -> AdapterSpec:
        """With pydantic's errors in one line."""
        try:
            return handler(data)
        except ValidationError as error:
            raise SpecError(_explain("AdapterSpec", error, list(cls.model_fields))) from None

    @property
    def info(self) -> MethodInfo:
        """The description of the spec's method."""
        return plugins.method(self.method)

    @property
    def capabilities(self) -> Capabilities:
        """What the method can do under this spec's options."""
        return self.info.can(self.info.options.model_validate(self.options))

    @property
    def torch_dtype(self) -> torch.dtype:
        """dtype of the adapter's parameters."""
        return DTYPE_OF_NAME[self.dtype]

    def to_json(self) -> str:
        """The spec as JSON, options complete."""
        return self.model_dump_json(indent=2)

    def to_yaml(self) -> str:
        """The spec as YAML, options complete."""
        return str(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))

    @classmethod
    def from_json(cls, text: str) -> AdapterSpec:
        """The spec that `to_json` wrote."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise SpecError(f"AdapterSpec: not JSON: {error}") from None
        return cls.model_validate(_mapping(data))

    @classmethod
    def from_yaml(cls, text: str) -> AdapterSpec:
        """The spec that `to_yaml` wrote (JSON is YAML, too)."""
        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise SpecError(f"AdapterSpec: not YAML: {' '.join(str(error).split())}") from None
        return cls.model_validate(_mapping(data))

    @classmethod
    def from_file(cls, path: str | Path) -> AdapterSpec:
        """A spec from a `.json`, `.yaml` or `.yml` file."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SpecError(f"spec file '{path}' cannot be read: {reason(error)}") from None
        return cls.from_json(text) if Path(path).suffix == ".json" else cls.from_yaml(text)


class _Options(dict[str, Any]):
    """A dictionary that stays as it is, as the rest of a spec does."""

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError("an AdapterSpec is frozen; make another one with other options")

    __setitem__ = __delitem__ = __ior__ = update = setdefault = pop = popitem = clear = _refuse

    def __reduce__(self) -> Any:
        return _Options, (dict(self),)


def check_options(info: MethodInfo, options: Mapping[str, Any], where: str = "options") -> BaseModel:
    """The method's options, completed and validated.

    Raises:
        SpecError: an option is unknown or has a value that is not allowed.
    """
    try:
        made = info.options.model_validate(dict(options))
    except ValidationError as error:
        known = list(info.options.model_fields)
        raise SpecError(_explain(f"method '{info.name}': {where}", error, known)) from None
    for name, value in options.items():
        if isinstance(value, bool) and type(getattr(made, name, None)) in (int, float):
            raise SpecError(f"method '{info.name}': {where}: '{name}': expected a number, got {value}")
    for name, value in made.model_dump().items():
        if endless := [number for number in _floats(value) if not math.isfinite(number)]:
            raise SpecError(
                f"method '{info.name}': {where}: '{name}': expected a finite number, got {endless[0]}, which no file can hold; "
                "choose a large one instead"
            )
    return made


def _floats(value: Any) -> Iterator[float]:
    """The numbers in an option's value."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _floats(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _floats(inner)


def _mapping(data: Any) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise SpecError(f"AdapterSpec: expected a mapping of fields, found {type(data).__name__}")
    return data


def _explain(what: str, error: ValidationError, known: list[str]) -> str:
    """pydantic's findings in one line, with the nearest valid name for each unknown one."""
    details = error.errors()
    found = "; ".join(finding(detail, known) for detail in details)
    unknown = any(detail["type"] == "extra_forbidden" for detail in details)
    return f"{what}: {found}" + (f"; the fields are {listed(known, 20)}" if unknown else "")
