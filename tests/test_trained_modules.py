"""Modules trained in full: the bank's copies are read in a forward, and the base holds its own parameters all the while."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import peft_core as pc
from peft_core.testing.checks import assert_near, gradients, randomise, weighted

pytestmark = pytest.mark.usefixtures("sound_method")
X = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.trunk, self.head = nn.Linear(24, 24), head

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(torch.tanh(self.trunk(x)))
        return y[0] if isinstance(y, tuple) else y


class Pausing(nn.Linear):
    """Waits between two readings of its weight, where it is told to."""

    def wait(self) -> None: ...

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        self.wait()
        return y + nn.functional.linear(input, self.weight)


class Checkpointing(nn.Module):
    """Checkpoints a layer, and code of its own that reads what another layer holds."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.read = nn.Linear(24, 24), nn.Linear(24, 24, bias=False)
        self.gain = nn.Parameter(torch.ones(24))
        self.reentrant: bool | None = None

    def scaled(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.read.weight).tanh() * self.gain

    def forward(self, x: Tensor) -> Tensor:
        for part in (self.inner, self.scaled):
            x = part(x) if self.reentrant is None else checkpoint(part, x, use_reentrant=self.reentrant)
        return x


class Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.listed = nn.ParameterList([torch.ones(24), torch.ones(24)])
        self.named = nn.ParameterDict({"a": torch.ones(24)})
        self.own = nn.Parameter(torch.ones(24))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.listed[0] + self.listed[1] * self.named["a"] + sum(self.listed) * self.own


class Attention(nn.MultiheadAttention):
    """Reads the weights of its `out_proj` without calling it."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return super().forward(x, x, x)


class Reading(nn.Module):
    """Computes its output with the weights of its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.embedding = nn.Linear(24, 24), nn.Embedding(9, 24)

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.linear(torch.tanh(self.trunk(self.embedding(ids))), self.embedding.weight)


def attached(model: nn.Module, *modules: str, name: str = "default", seed: int = 0) -> pc.Adapter:
    spec = pc.AdapterSpec(method="sound", options={"r": 4}, targets=["trunk"], train_modules=modules or ("head",))
    return randomise(pc.attach(model, spec, name=name), seed=seed)


HEADS = {
    "one layer": lambda: nn.Linear(24, 24),
    "several": lambda: nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.LayerNorm(24)),
    "lists": Lists,
    "attention": lambda: Attention(24, 2, batch_first=True),
    "encoder": lambda: nn.TransformerEncoderLayer(24, 2, 32, batch_first=True, dropout=0.0),
    "recurrent": lambda: nn.LSTM(24, 8),
    "parametrized": lambda: parametrizations.weight_norm(nn.Linear(24, 24)),
}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_way_of_reading_a_parameter_gives_the_copy(kind: str, dtype: torch.dtype) -> None:
    net, x = Net(HEADS[kind]()).to(dtype), X.to(dtype)
    net.requires_grad_(False)  # as it will be: by a weight that is trained torch may multiply in another order
    before = net(x)
    adapter = attached(net)
    y = net(x)
    y.sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())
    with torch.inference_mode():
        assert_near(net(x), y, 3e-2 if dtype == torch.bfloat16 else 1e-5, "without gradients")
    with adapter.disabled():
        torch.testing.assert_close(net(x), before, rtol=0, atol=0)
    adapter.merge_and_detach()
    assert_near(net(x), y, 3e-2 if dtype == torch.bfloat16 else 1e-5, "merged")


def test_a_parent_that_reads_a_weight_of_a_trained_module_reads_the_copy() -> None:
    net, ids = Reading(), torch.arange(9)
    adapter = attached(net, "embedding")
    y = net(ids)
    adapter.merge()
    assert_near(net(ids), y, 1e-5, "merged")


def test_outside_of_a_forward_the_base_is_what_it_was() -> None:
    net = Net(nn.Linear(24, 24))
    weight = net.head.weight
    attached(net)
    net(X)
    assert net.head.weight is weight
    assert net.get_parameter("head.weight") is weight


def test_threads_share_a_model() -> None:
    """One is in the middle of the trained module; what others do, and see, is as if it were not there."""
    net = Net(Pausing(24, 24))
    base = copy.deepcopy(net.head.state_dict())
    adapter = attached(net)
    expected = net(X).detach()
    inside, go_on, got = threading.Event(), threading.Event(), []

    def wait() -> None:
        if threading.current_thread() is worker:
            inside.set()
            go_on.wait()

    worker = threading.Thread(target=lambda: got.append(net(X).detach()))
    net.head.wait = wait
    worker.start()
    inside.wait()
    for name, value in net.head.state_dict().items():
        torch.testing.assert_close(value, base[name], rtol=0, atol=0)
    torch.testing.assert_close(net(X), expected, rtol=0, atol=0)
    torch.testing.assert_close(net.head.weight, base["weight"], rtol=0, atol=0)
    go_on.set()
    worker.join()
    torch.testing.assert_close(got[0], expected, rtol=0, atol=0)
    del net.head.wait
    adapter.detach()
    for name, value in net.head.state_dict().items():
        torch.testing.assert_close(value, base[name], rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing_within_a_trained_module(reentrant: bool) -> None:
    net = Net(Checkpointing())
    adapter = attached(net)
    expected = gradients(adapter, weighted(net(X)))
    net.head.reentrant = reentrant
    found = gradients(adapter, weighted(net(X)))
    assert found.keys() == expected.keys()
    for key in expected:
        assert_near(found[key], expected[key], 1e-6, f"gradient of '{key}'")


def test_adapters_of_one_layout_compile_once() -> None:
    net = Net(HEADS["several"]())
    names = [f"adapter{number}" for number in range(10)]
    for number, name in enumerate(names):
        attached(net, name=name, seed=number)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    with torch.no_grad():
        for name in names:
            pc.activate(net, name)
            assert_near(compiled(X), net(X), 1e-6, f"output with '{name}'")
    assert counter.frame_count == 1


def test_parameters_that_are_replaced_for_one_call() -> None:
    net = Net(nn.Linear(24, 24))
    attached(net)
    doubled = {name: 2 * parameter for name, parameter in net.named_parameters()}
    y = torch.func.functional_call(net, doubled, (X,))
    other = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    torch.testing.assert_close(y, other(X))


def test_a_layer_within_a_trained_module_carries_no_other_adapter(refused) -> None:
    spec = pc.AdapterSpec(method="sound", options={"r": 4}, targets=["inner"])
    for first in ("trained", "adapted"):
        net = Net(Checkpointing())
        attached(net) if first == "trained" else pc.attach(net, spec)
        with refused(pc.AdapterError, "cannot share 'head.inner'", "one trains it in full"):
            pc.attach(net, spec, name="other") if first == "trained" else attached(net, name="other")


def test_a_layer_with_two_paths_is_trained_or_adapted(refused) -> None:
    net = Net(nn.Sequential(nn.Linear(24, 24)))
    net.trunk = net.head[0]
    with refused(pc.TargetError, "'trunk'", "both a target and in train_modules"):
        attached(net)


def test_an_embedding_of_several_names_is_trained_under_all(refused) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.used, self.trunk = nn.Embedding(9, 24), nn.Embedding(9, 24), nn.Linear(24, 24)
            self.used.weight = self.shared.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.trunk(self.used(ids))

    net = Tied()
    for name, other in (("shared", "used"), ("used", "shared")):
        with refused(pc.TargetError, f"'{name}' is one embedding with '{other}'", "name all"):
            attached(net, name)
    adapter = attached(net, "shared", "used")
    assert all(gradient.any() for gradient in gradients(adapter, weighted(net(torch.arange(9)))).values())
