"""Random specs on random models: what is refused is refused clearly, and what is accepted works from attach to merge.

`tox run` tries a few hundred; `tox run -e fuzz` ten thousand.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import event, given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import peft_core as pc
from peft_core.testing.checks import randomise

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.2}
"""Relative root mean square between two orders of the same sums, through up to twelve layers that may amplify it: for
16-bit numbers this only shows what is quite another function. The conformance suite measures site by site."""

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
WORDS = ["query", "up", "down", "out_proj", "mixer.in", "experts.0", "a-b", "weight"]


@dataclass
class Shape:
    """A random model's description, from which it can be built twice."""

    width: int
    blocks: tuple[tuple[tuple[str, int, bool, bool, bool], ...], ...]  # layers: name, inner width, bias, Conv1D, twice
    tied: bool
    dtype: torch.dtype
    seed: int

    def build(self) -> nn.Module:
        torch.manual_seed(self.seed)
        return Random(self).to(self.dtype)


class Layer(nn.Module):
    """width → inner → width around a residual, and a second time through the same layers if asked for."""

    def __init__(self, width: int, inner: int, bias: bool, transposed: bool, twice: bool) -> None:
        super().__init__()
        self.first = Conv1D(inner, width) if transposed else nn.Linear(width, inner, bias=bias)
        self.second = Conv1D(width, inner) if transposed else nn.Linear(inner, width, bias=bias)
        self.twice = twice

    def forward(self, x: Tensor) -> Tensor:
        y = x + torch.tanh(self.second(torch.tanh(self.first(x))))
        return y + self.second(torch.tanh(self.first(y))) if self.twice else y


class Random(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for block in shape.blocks:
            holder = nn.Module()
            holder.names = []
            for number, (word, *rest) in enumerate(block):
                name = f"{word}_{number}".replace(".", "_").replace("-", "_")
                holder.add_module(name, Layer(shape.width, *rest))
                holder.names.append(name)
            self.layers.append(holder)
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.width, bias=False)
        self.embed = nn.Embedding(shape.width, shape.width)
        if shape.tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            for name in block.names:
                x = block.get_submodule(name)(x)
        return self.head(x + self.norm(x))


sizes = st.sampled_from([1, 2, 3, 5, 7, 12, 17, 24, 24, 24, 48, 48])
layers = st.tuples(st.sampled_from(WORDS), sizes, st.booleans(), st.booleans(), st.booleans())
# Mostly blocks that repeat, as models do; sharing across layers begins there.
repeated = st.tuples(st.lists(layers, min_size=1, max_size=2).map(tuple), st.integers(1, 3)).map(
    lambda p: (p[0],) * p[1]
)
models = st.builds(
    Shape,
    width=sizes,
    blocks=repeated | st.lists(st.lists(layers, min_size=1, max_size=2).map(tuple), min_size=1, max_size=3).map(tuple),
    tied=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 3),
)


def of_schema(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    """Values of a JSON schema's type, allowed or just beyond."""
    if "$ref" in schema:
        return of_schema(definitions[schema["$ref"].rsplit("/", 1)[1]], definitions)
    if "enum" in schema or "const" in schema:
        return st.sampled_from([*schema.get("enum", ()), *([schema["const"]] if "const" in schema else ())])
    if "anyOf" in schema:
        return st.one_of([of_schema(option, definitions) for option in schema["anyOf"]])
    match schema.get("type"):
        case "integer":
            return st.integers(1, 6) | st.integers(1, 6) | st.integers(-1, 40)
        case "number":
            return st.floats(0.125, 64, width=16) | st.integers(1, 64) | st.floats()
        case "boolean":
            return st.booleans()
        case "null":
            return st.none()
        case "array":
            return st.lists(st.integers(0, 6), max_size=4)
        case "object" if "properties" in schema:
            fields = {name: of_schema(field, definitions) for name, field in schema["properties"].items()}
            return st.fixed_dictionaries({}, optional=fields)
        case "object":
            inner = schema.get("additionalProperties")
            values = of_schema(inner, definitions) if isinstance(inner, dict) else st.text(max_size=4)
            return st.dictionaries(patterns, values, max_size=2)
    return st.text(max_size=8)


names = [
    "first",
    "second",
    "head",
    "norm",
    "embed",
    "layers",
    "query_0.first",
    "up_0",
    "down_1.second",
    "layers.0.up_0.first",
]
patterns = (
    st.sampled_from(names)
    | st.sampled_from(names)
    | st.sampled_from([".*first", r"layers\.\d+\..*second", r".*\.(first|second)", ".*", "(", "[a-"])
    | st.text(max_size=4)
)


@st.composite
def options(draw: st.DrawFn, info: pc.MethodInfo) -> dict[str, Any]:
    """One of the method's trials, with some options drawn from its schema."""
    schema = info.options.model_json_schema()
    definitions = schema.get("$defs", {})
    drawn = {name: of_schema(field, definitions) for name, field in schema["properties"].items()}
    some = draw(st.sets(st.sampled_from(sorted(drawn)), max_size=2))
    return {**draw(st.sampled_from(info.trials)), **{name: draw(drawn[name]) for name in sorted(some)}}


@st.composite
def specs(draw: st.DrawFn) -> dict[str, Any]:
    """Fields of a spec: most of them sensible."""
    info = draw(st.sampled_from([info for _, info in sorted(pc.methods().items())]))
    optional = {
        "targets": st.lists(st.sampled_from(names[:3]), min_size=1) | patterns | st.lists(patterns, max_size=3),
        "exclude": patterns | st.lists(patterns, max_size=2),
        "layers": st.lists(st.integers(0, 1) | st.integers(-1, 3), min_size=1, max_size=2),
        "overrides": st.dictionaries(patterns, options(info), max_size=2),
        "train_modules": st.lists(st.sampled_from(names) | patterns, max_size=2),
        "dropout": st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.9, 1.0, -0.5, math.nan]),
        "dtype": st.sampled_from(["float32", "bfloat16", "float16", "float64"]),
        "base_model": st.none() | st.text(max_size=8),
    }
    some = draw(st.sets(st.sampled_from(sorted(optional)), max_size=2))
    return {
        "method": info.name,
        "options": draw(options(info)),
        **{name: draw(optional[name]) for name in sorted(some)},
    }


def clear(error: pc.PeftCoreError) -> None:
    """One line that says something."""
    assert "\n" not in str(error) and 15 < len(str(error)) < 2000, str(error)


def agree(found: Tensor, expected: Tensor, x: Tensor, tolerance: float, what: str) -> None:
    """Equal up to rounding of what goes through the model; where 16-bit numbers overflow, nothing can be said."""
    if expected.numel() == 0 or not expected.isfinite().all():
        return
    found, expected, x = found.double(), expected.double(), x.double()
    size = (expected.square().mean() + x.square().mean()).sqrt()
    assert (found - expected).square().mean().sqrt() <= tolerance * size, f"{what}: {found} for {expected}"


@given(
    shape=models,
    fields=specs(),
    leading=st.lists(st.integers(0, 3), max_size=3),
    grad=st.booleans(),
    autocast=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_spec_on_any_model(
    shape: Shape, fields: dict[str, Any], leading: Sequence[int], grad: bool, autocast: bool, seed: int
) -> None:
    model = shape.build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        spec = pc.AdapterSpec(**fields)
        assert pc.AdapterSpec.from_yaml(spec.to_yaml()) == spec == pc.AdapterSpec.from_json(spec.to_json())
        planned = pc.plan(model, spec)
        str(planned)
        adapter = pc.attach(model, spec, seed=seed)
    except pc.PeftCoreError as error:
        clear(error)
        event("refused")
        assert not pc.adapters(model) and model.state_dict().keys() == before.keys()
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        return
    event(f"attached {spec.method}")
    assert adapter.num_trainable == planned.num_trainable == sum(p.numel() for p in adapter.parameters())
    randomise(adapter, seed, std=0.05)

    x = torch.randn(*leading, shape.width, generator=torch.Generator().manual_seed(seed)).to(shape.dtype)
    x.requires_grad_(grad)
    model.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast and shape.dtype == torch.float32):
        y = model(x)
    assert y.shape == x.shape
    optimizer = (spec.info.optimizer or torch.optim.AdamW)(adapter.parameters(), lr=1e-3)
    adapter.total_steps = 10
    y.float().sum().backward()
    optimizer.step()
    if not all(parameter.isfinite().all() for parameter in adapter.parameters()):
        event("diverged")  # an alpha beyond float16
        return
    model.eval()
    slack = TOLERANCE[shape.dtype]
    with torch.no_grad():
        y = model(x)
        with pc.kernels("naive"):
            agree(model(x), y, x, slack, "naive against torch")

        with tempfile.TemporaryDirectory() as directory:
            adapter.save(Path(directory) / "saved")
            again = shape.build().eval()
            pc.load(again, Path(directory) / "saved")
            assert torch.equal(again(x).nan_to_num(), y.nan_to_num()), (
                "a loaded adapter computes what the saved one did"
            )
        try:
            merged = adapter.merge_and_detach()
        except pc.MergeError as error:
            clear(error)
        else:
            assert not pc.adapters(merged)
            agree(merged(x), y, x, slack, "merged")


@given(text=st.text(max_size=40), fields=specs())
def test_any_text_is_a_spec_or_a_clear_error(text: str, fields: dict[str, Any]) -> None:
    for source in (text, f"method: {fields['method']}\n{text}", f"{fields}"):
        try:
            pc.AdapterSpec.from_yaml(source)
        except pc.PeftCoreError as error:
            clear(error)
