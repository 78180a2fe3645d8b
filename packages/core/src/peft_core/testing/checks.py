"""What the conformance tests share: trials, attaching with random values, and comparisons."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft_core as pc
from peft_core import plugins
from peft_core.bases import ROOT_PREFIX
from peft_core.kernels import obstacle
from peft_core.layer import seen_weight
from peft_core.method import BASE_WEIGHT, Gradient

from .families import Family

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Relative root mean square that rounding may cost in one site's arithmetic, by dtype."""


@dataclass(frozen=True)
class Trial:
    """A method with one of the option sets that it offers for the suite."""

    method: str
    options: Mapping[str, Any] = field(hash=False)

    @property
    def can(self) -> pc.Capabilities:
        """What the method declares under these options."""
        return pc.AdapterSpec(method=self.method, options=dict(self.options)).capabilities

    def spec(self, family: Family, **fields: Any) -> pc.AdapterSpec:
        """A spec that adapts all linear layers of a family's models."""
        fields = {"train_modules": family.train_modules, **fields}
        return pc.AdapterSpec(method=self.method, options=dict(self.options), **fields)

    def __str__(self) -> str:
        options = ",".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.method}({options})"


def trials(names: list[str]) -> list[Trial]:
    """The trials of these methods, or of all that are installed.

    Raises:
        PluginError: a method is not installed.
    """
    infos = [plugins.method(name) for name in names] or [info for _, info in sorted(pc.methods().items())]
    return [Trial(info.name, options) for info in infos for options in info.trials]


KERNELS = pytest.mark.parametrize(
    "kernels", ["torch", "naive", *(["triton"] if not obstacle("cpu", torch.float32) else [])]
)
"""With each kind of kernels that runs here: Triton's do where TRITON_INTERPRET=1 was set before Python started."""


def randomise(adapter: pc.Adapter, seed: int = 0, std: float = 0.1) -> pc.Adapter:
    """Give every trainable tensor normal values, so that nothing is at its (often zero) start. They lie around zero, or, of a
    tensor that starts at other numbers than random ones about zero, around these.
    """
    generator = torch.Generator().manual_seed(seed)
    specs = dict(adapter.plan.tensors())
    with torch.no_grad():
        for key, parameter in adapter.named_parameters():
            values = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(values + _center(specs[key], adapter))
    return adapter


def _center(spec: pc.TensorSpec, adapter: pc.Adapter) -> Tensor | float:
    match spec.init:
        case pc.Constant(value):
            return value
        case pc.Normal(_, mean):
            return mean
        case pc.FromWeight(path, compute):
            return compute(seen_weight(adapter.model.get_submodule(path)).float())
    return 0.0


def adapted(
    family: Family,
    trial: Trial,
    base_dtype: torch.dtype = torch.float32,
    seed: int = 0,
    std: float = 0.1,
    **fields: Any,
) -> tuple[nn.Module, pc.Adapter]:
    """A family's model with a randomised adapter of the trial; `fields` are further fields of the spec."""
    model = family.build(dtype=base_dtype)
    return model, randomise(pc.attach(model, trial.spec(family, **fields), seed=seed), seed, std)


def borrowed(adapter: pc.Adapter, path: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a site borrows by name, and its binding: detached copies."""
    tensors = {name: tensor.detach().clone() for name, tensor in adapter.bank.tensors(path).items()}
    return tensors, {name: tensor.clone() for name, tensor in adapter.bank.binding(path).items()}


def base_weight(model: nn.Module, site: pc.Site) -> Tensor:
    """A copy of a site's weight as it stands in the model, out × in."""
    weight = model.get_parameter(f"{site.path}.weight").detach()
    return (weight.T if site.transposed else weight).clone()


def functions(trial: Trial, site: pc.Site) -> pc.Forward:
    """The method's forward for a site."""
    found: pc.Forward = plugins.call(trial.method, "peft_forward", site=site)
    return found


def naive(trial: Trial, site: pc.Site, x: Tensor, tensors: pc.Tensors, binding: pc.Tensors, weight: Tensor) -> Tensor:
    """The method's reference Δ(x) at a site; `weight` (out × in) is the base's, for methods that need it."""
    given = tensors if trial.can.additive else {**tensors, BASE_WEIGHT: weight}
    return functions(trial, site).naive(x, given, binding)


def merged(trial: Trial, site: pc.Site, weight: Tensor, tensors: pc.Tensors, binding: pc.Tensors) -> Tensor:
    """The method's merged weight for a site."""
    found: Tensor = plugins.call(trial.method, "peft_merge", site=site, weight=weight, tensors=tensors, binding=binding)
    return found


def doubled(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Floating-point tensors in float64, requiring gradients; integers as they are."""
    return {
        name: tensor.detach().double().requires_grad_() if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


def dense(gradient: Gradient, like: Tensor) -> Tensor:
    """A gradient of full size, of a tensor of this shape."""
    if isinstance(gradient, Tensor):
        return gradient
    assert gradient.index.unique().numel() == gradient.index.numel(), "pc.Rows names a row twice"
    whole = gradient.values.new_zeros(like.shape)
    whole[gradient.index] = gradient.values
    return whole


def relative(found: Tensor, expected: Tensor, scale: Tensor | None = None) -> float:
    """Root mean square of the difference over that of `scale` (default: of what is expected)."""
    assert found.shape == expected.shape, f"shape {list(found.shape)}, expected {list(expected.shape)}"
    if not expected.numel():
        return 0.0
    difference = (found.detach().double() - expected.detach().double()).square().mean().sqrt()
    reference = (expected if scale is None else scale).detach().double().square().mean().sqrt()
    return float(difference / reference) if float(reference) else float(difference)


def rounded_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a model whose weights, its adapters' too, are rounded to this dtype, and computed with as before."""
    copy = deepcopy(model)
    with torch.no_grad():
        for tensor in [*copy.parameters(), *copy.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(tensor.to(dtype))
    return copy


def assert_near(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Relative root mean square within `tolerance`; non-finite values never are."""
    distance = relative(found, expected)
    assert distance <= tolerance, f"{what}: off by {distance:.2e} relative, allowed {tolerance:.0e}"


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` gives NaN, so that reading what nobody wrote is seen."""
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]


def far_apart(values: Tensor) -> Tensor:
    """The matrix with more than 2³¹ elements from one row to the next: address space is reserved, memory hardly used."""
    rows, columns = values.shape
    stride = 2**31 + 64
    there = torch.empty((rows - 1) * stride + columns, dtype=values.dtype, device=values.device)
    far = there.as_strided((rows, columns), (stride, 1))
    far.copy_(values)
    return far


@dataclass
class Snapshot:
    """Everything about a model that an adapter must leave, or put back, as it was."""

    state: dict[str, Tensor]
    flags: dict[str, bool]
    classes: dict[str, type]
    attributes: dict[str, set[str]]
    parameters: list[int]
    buffers: list[str]

    @classmethod
    def of(cls, model: nn.Module) -> Snapshot:
        """Taken now; values are copied."""
        modules = dict(model.named_modules())
        return cls(
            state={key: value.detach().clone() for key, value in model.state_dict().items()},
            flags={name: parameter.requires_grad for name, parameter in model.named_parameters()},
            classes={path: type(module) for path, module in modules.items()},
            attributes={path: set(vars(module)) for path, module in modules.items()},
            parameters=[id(parameter) for parameter in model.parameters()],
            buffers=[name for name, _ in model.named_buffers()],
        )

    def assert_same_values(self, model: nn.Module) -> None:
        """Every entry of the state dict has its old value, bit for bit; new entries do not matter here."""
        now = model.state_dict()
        for key, value in self.state.items():
            assert same_bits(now[key], value), f"'{key}' has other values than before"

    def assert_restored(self, model: nn.Module) -> None:
        """The model is what it was: values, keys, classes, attributes, flags."""
        now = Snapshot.of(model)
        assert list(now.state) == list(self.state), f"state_dict keys differ: {set(now.state) ^ set(self.state)}"
        self.assert_same_values(model)
        assert now.buffers == self.buffers
        assert now.flags == self.flags, "requires_grad flags differ"
        for path, was in self.classes.items():
            assert now.classes[path] is was, f"'{path}' is a {now.classes[path]}, was {was}"
            traces = now.attributes[path] ^ self.attributes[path]
            assert not traces, f"'{path}' has kept or lost attributes: {traces}"
        assert now.parameters == self.parameters, "parameters are other objects than before"


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Same dtype, shape and values, NaN and the sign of zero included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    whole = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[a.element_size()]
    return torch.equal(a.detach().contiguous().view(whole), b.detach().contiguous().view(whole))


def run(family: Family, model: nn.Module, seed: int = 0) -> Tensor:
    """The model's output for the family's inputs, without autograd."""
    dtype = next(p.dtype for name, p in model.named_parameters() if not name.startswith(ROOT_PREFIX))
    with torch.no_grad():
        return family.forward(model, family.inputs(seed, dtype)).clone()


def gradients(adapter: pc.Adapter, loss: Tensor) -> dict[str, Tensor]:
    """Key → gradient of this loss; the parameters' `.grad` is left empty."""
    named = dict(adapter.named_parameters())
    for parameter in named.values():
        parameter.grad = None
    loss.backward()  # type: ignore[no-untyped-call]
    found = {}
    for key, parameter in named.items():
        assert parameter.grad is not None, f"'{key}' got no gradient"
        found[key] = parameter.grad
        parameter.grad = None
    return found


def weighted(output: Tensor) -> Tensor:
    """A loss that sees every element of an output differently."""
    generator = torch.Generator().manual_seed(99)
    weights = torch.randn(output.shape, generator=generator).to(output)
    return (output * weights).sum()
