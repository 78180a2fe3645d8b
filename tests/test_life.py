"""An adapter's life in any order: random walks through the public contract.

After every step the model must compute what a plain model does that is given the weights which should be in force, and refuse
what it should refuse and nothing else.
"""

from __future__ import annotations

import copy
import io
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import peft_core as pc
from peft_core import plugins
from peft_core.testing.checks import randomise, trials

pytestmark = [
    pytest.mark.usefixtures("sound_method", "lora_method", "dora_method"),
    pytest.mark.filterwarnings("ignore:.* a state_dict was loaded"),  # rightly: steps were taken since
]

WIDTH, TOGETHER = 24, 4
TARGETS = ["all-linear", ["q", "k"], ["q", "o", "down"], ["up"], ["v", "head"]]
TRAINED = [(), (), ("head",), ("norm", "last", "head"), ("last", "norm")]
which = st.integers(0, TOGETHER - 1)
scales = st.sampled_from([1.0, 1.0, 0.5, -2.0])


class Net(nn.Module):
    """Three layers that read one input, a transposed one, two of other sizes, two norms with one weight and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.o = Conv1D(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.norm, self.last, self.head = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 12)
        self.last.weight = self.norm.weight

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.o(torch.tanh(self.q(x)) * self.k(x) + self.v(x))
        return self.head(self.last(torch.tanh(self.norm(x + self.down(torch.tanh(self.up(x)))))))


@dataclass
class Place:
    """One of the base's tensors, and what was merged into it, with the scales.

    Attributes:
        value: without what is merged now; `pristine`, whether it still has the base's bits. beneath: merged, but not to be taken
            out alone. above: merged into what was `kept`, if it was. lasting: merged, and in `value` for good.
    """

    value: Tensor
    pristine: bool = True
    beneath: dict[str, float] = field(default_factory=dict)
    above: dict[str, float] = field(default_factory=dict)
    kept: bool = False
    lasting: set[str] = field(default_factory=set)

    @property
    def merged(self) -> dict[str, float]:
        return {**self.beneath, **self.above}

    def stuck(self, name: str) -> bool:
        return name in self.merged and not (self.kept and name in self.above)

    def put(self, name: str, scale: float, keep: bool) -> None:
        if keep and not self.kept:
            self.beneath, self.above, self.kept = self.merged, {}, True
        self.above[name] = scale

    def take(self, name: str) -> None:
        if name in self.above:
            del self.above[name]
            if not self.above:
                self.above, self.beneath, self.kept = self.beneath, {}, False

    def settle(self, name: str, value: Tensor) -> None:
        left = {other: scale for other, scale in self.merged.items() if other != name}
        self.value, self.pristine, self.kept = value, False, False
        self.above, self.beneath, self.lasting = left, {}, set(left)


class Saved(NamedTuple):
    directory: Path
    spec: pc.AdapterSpec
    values: dict[str, Tensor]
    resumable: bool


class Life(RuleBasedStateMachine):
    """The walk. `places`, `active` and `adapters` say what should be."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model: Any = Net().double().eval()
        self.plain = copy.deepcopy(self.model)
        with torch.device("meta"):
            self.meta = Net()
        self.places = {key: Place(value.clone()) for key, value in self.model.state_dict().items()}
        self.adapters: dict[str, pc.Adapter] = {}
        self.active: dict[str, float] = {}
        self.moved: dict[str, dict[str, Tensor]] = {}
        self.saved: list[Saved] = []
        self.born = 0
        self.x = torch.randn(2, 3, WIDTH, dtype=torch.float64)
        self.directories = tempfile.TemporaryDirectory()

    def teardown(self) -> None:
        self.directories.cleanup()

    # What should be.

    def name(self, number: int) -> str:
        return list(self.adapters)[number % len(self.adapters)]

    def path(self, what: str) -> Path:
        return Path(self.directories.name) / f"{what}-{self.born}-{len(self.saved)}"

    def can(self, name: str, path: str) -> pc.Capabilities:
        bank = self.adapters[name].bank
        return bank.plan.spec.info.can(bank.sites[path].options)

    def owns(self, name: str) -> bool:
        return self.adapters[name].plan.spec.capabilities.owns_base_weight

    def merged(self, name: str) -> bool:
        return any(name in place.merged for place in self.places.values())

    def stuck(self, name: str) -> bool:
        return any(place.stuck(name) for place in self.places.values())

    def keys(self, name: str) -> list[str]:
        bank = self.adapters[name].bank
        return [*(f"{path}.weight" for path in bank.sites), *bank.stand_ins]

    def clash(self, names: Collection[str]) -> bool:
        carried: dict[str, list[str]] = {}
        for name in names:
            for path in self.adapters[name].bank.sites:
                carried.setdefault(path, []).append(name)
        return any(len(n) > 1 and any(self.can(one, path).exclusive for one in n) for path, n in carried.items())

    def fits(self, spec: pc.AdapterSpec) -> bool:
        plan = pc.plan(self.meta, spec)
        sites, trained = {site.path for site in plan.sites}, set(plan.trained)
        for name, other in self.adapters.items():
            theirs = set(other.bank.sites)
            if (spec.capabilities.owns_base_weight or self.owns(name)) and (sites | trained) & theirs:
                return False
            if trained & theirs or sites & set(other.plan.trained):
                return False
        return True

    def applied(self, name: str, key: str, weight: Tensor, scale: float, beneath: Tensor) -> Tensor:
        """`weight` with an adapter. `beneath`: the base's, which some methods' Δ depends on."""
        bank = self.adapters[name].bank
        if key in bank.stand_ins:
            return bank.parameter(bank.stand_ins[key]).detach()
        site = bank.sites[key.removesuffix(".weight")]
        if name in self.moved:
            return self.moved[name][key]
        if self.owns(name):
            owned = bank.owned_weight(site).detach()
            weight = owned.T if site.transposed else owned
        tensors = {own: tensor.detach() for own, tensor in bank.tensors(site.path).items()}
        if not self.can(name, site.path).additive:
            tensors["base_weight"] = beneath.T if site.transposed else beneath
        naive = plugins.call(bank.plan.spec.method, "peft_forward", site=site).naive
        delta = naive(torch.eye(site.in_features, dtype=torch.float64), tensors, bank.binding(site.path))
        return weight + scale * (delta if site.transposed else delta.T)

    def held(self, key: str, without: Collection[str] = ()) -> Tensor:
        """What the base should hold in a place."""
        place = self.places[key]
        value = place.value
        for name, scale in place.merged.items():
            if name not in place.lasting and name not in without:
                value = self.applied(name, key, value, scale, value)
        return value.clone()

    def check(self, without: Collection[str] = ()) -> None:
        """The model computes what it should."""
        base = {key: self.held(key, without) for key in self.places}
        force = dict(base)
        for name, scale in self.active.items():
            if name not in without:
                for key in self.keys(name):
                    force[key] = self.applied(name, key, force[key], scale, base[key])
        self.plain.load_state_dict(force)
        with torch.no_grad():
            torch.testing.assert_close(self.model(self.x), self.plain(self.x), rtol=1e-8, atol=1e-8)

    @contextmanager
    def expect(self, possible: bool) -> Iterator[None]:
        """What is within is refused, clearly, if it is not possible, and only then."""
        if possible:
            yield
            return
        with pytest.raises(pc.PeftCoreError) as caught:
            yield
        assert "\n" not in str(caught.value)

    # What happens.

    def came(self, adapter: pc.Adapter) -> None:
        self.adapters[adapter.name], self.active = adapter, {adapter.name: 1.0}
        self.born += 1

    def went(self, name: str) -> None:
        del self.adapters[name]
        self.active.pop(name, None)
        self.moved.pop(name, None)

    @precondition(lambda self: len(self.adapters) < TOGETHER)
    @rule(
        number=st.integers(0, 99),
        where=st.sampled_from(TARGETS),
        modules=st.sampled_from(TRAINED),
        seed=st.integers(0, 3),
    )
    def attach(self, number: int, where: str | list[str], modules: Sequence[str], seed: int) -> None:
        offered = trials([])
        trial = offered[number % len(offered)]
        modules = [module for module in modules if module not in where]
        spec = pc.AdapterSpec(
            method=trial.method, options=dict(trial.options), targets=where, train_modules=modules, dtype="float64"
        )
        try:
            possible = self.fits(spec)
        except pc.PlanError:
            return  # not for these sizes
        with self.expect(possible):
            adapter = pc.attach(self.model, spec, name=f"a{self.born}", seed=seed)
            self.came(adapter)
            if not spec.capabilities.owns_base_weight:
                randomise(adapter, seed, std=0.2)

    @precondition(lambda self: self.adapters)
    @rule(chosen=st.lists(st.tuples(which, scales), max_size=3))
    def activate(self, chosen: list[tuple[int, float]]) -> None:
        wanted = {self.name(number): scale for number, scale in chosen}
        with self.expect(not any(self.merged(name) for name in wanted) and not self.clash(wanted)):
            pc.activate(self.model, wanted)
            self.active = wanted

    @precondition(lambda self: self.adapters)
    @rule(number=which, keep=st.sampled_from(["host", "host", "disk", "none"]), leave=st.booleans())
    def merge(self, number: int, keep: str, leave: bool) -> None:
        """With `leave`, for good."""
        name = self.name(number)
        keys, scale, merged = self.keys(name), self.active.get(name, 1.0), self.merged(name)
        with self.expect((leave or not merged) and (merged or not self.owns(name) or scale == 1.0)):
            if self.owns(name) and not merged:
                base = {key: self.places[key].value for key in keys}
                self.moved[name] = {key: self.applied(name, key, base[key], 1.0, base[key]) for key in keys}
            places = copy.deepcopy(self.places)
            for key in keys if not merged else ():
                self.places[key].put(name, scale, keep != "none" and not leave)
            try:
                if leave:
                    for key in keys:
                        self.places[key].settle(name, self.held(key))
                    self.adapters[name].merge_and_detach()
                    self.went(name)
                else:
                    self.adapters[name].merge(keep=self.path("kept") if keep == "disk" else keep)
                    self.active.pop(name, None)
            except pc.PeftCoreError:
                self.places = places
                if not merged:
                    self.moved.pop(name, None)
                raise

    @precondition(lambda self: any(self.merged(name) for name in self.adapters))
    @rule(number=which)
    def unmerge(self, number: int) -> None:
        name = self.name(number)
        scale = next((place.merged[name] for place in self.places.values() if name in place.merged), 1.0)
        active = {**self.active, name: scale}
        with self.expect(self.merged(name) and not self.stuck(name) and not self.clash(active)):
            self.adapters[name].unmerge()
            self.active = active
            self.moved.pop(name, None)
            for place in self.places.values():
                place.take(name)

    @precondition(lambda self: self.adapters)
    @rule(chosen=st.lists(which, min_size=1, max_size=2))
    def disable(self, chosen: list[int]) -> None:
        without: list[str] = []
        with ExitStack() as inside:
            for name in map(self.name, chosen):
                with self.expect(not self.stuck(name)):
                    inside.enter_context(self.adapters[name].disabled())
                    without.append(name)
                    self.check(without)

    @precondition(lambda self: self.adapters)
    @rule(number=which)
    def detach(self, number: int) -> None:
        name = self.name(number)
        with self.expect(not self.merged(name)):
            self.adapters[name].detach()
            self.went(name)

    @precondition(lambda self: any(p.requires_grad for name in self.active for p in self.adapters[name].parameters()))
    @rule(seed=st.integers(0, 99))
    def train(self, seed: int) -> None:
        """The gradients are the readable reference's, and nothing else has one."""
        x = torch.randn(2, 3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        trained = [p for name in self.active for p in self.adapters[name].parameters() if p.requires_grad]
        gradients = []
        for kernels in ("naive", "auto"):
            self.model.zero_grad()
            with pc.kernels(kernels):
                self.model(x).square().mean().backward()
            assert {p for p in self.model.parameters() if p.grad is not None} <= set(trained)
            gradients.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trained])
        torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-9)
        torch.optim.SGD(trained, lr=0.01).step()
        self.model.zero_grad()

    @precondition(lambda self: self.adapters)
    @rule(number=which)
    def save(self, number: int) -> None:
        adapter, directory = self.adapters[self.name(number)], self.path("saved")
        with self.expect(not (self.owns(adapter.name) and self.stuck(adapter.name))):
            adapter.save(directory)
            values = {key: parameter.detach().clone() for key, parameter in adapter.named_parameters()}
            resumable = bool(adapter.bank.state) or not adapter.plan.state_bytes
            self.saved.append(Saved(directory, adapter.plan.spec, values, resumable))

    @precondition(lambda self: self.saved and len(self.adapters) < TOGETHER)
    @rule(number=st.integers(0, 99), trainable=st.booleans())
    def load(self, number: int, trainable: bool) -> None:
        saved = self.saved[number % len(self.saved)]
        with self.expect(self.fits(saved.spec) and (saved.resumable or not trainable)):
            adapter = pc.load(self.model, saved.directory, name=f"a{self.born}", trainable=trainable)
            self.came(adapter)
            assert all(p.requires_grad == trainable for p in adapter.parameters())
            self.same(adapter, saved.values)

    @precondition(lambda self: self.saved and self.adapters)
    @rule(number=which, other=st.integers(0, 99))
    def restore(self, number: int, other: int) -> None:
        adapter, saved = self.adapters[self.name(number)], self.saved[other % len(self.saved)]
        fits = saved.spec == adapter.plan.spec and (saved.resumable or not adapter.bank.state)
        with self.expect(fits and not self.merged(adapter.name)):
            adapter.restore(saved.directory)
            self.same(adapter, saved.values)

    @staticmethod
    def same(adapter: pc.Adapter, values: dict[str, Tensor]) -> None:
        assert all(torch.equal(parameter, values[key]) for key, parameter in adapter.named_parameters())

    @rule(how=st.sampled_from(["copy", "pickle", "state", "mode"]))
    def pass_on(self, how: str) -> None:
        """What leaves a model as it is: a copy does not depend on the original, nor a model on what it was loaded from."""
        old, state = self.model, {key: value.clone() for key, value in self.model.state_dict().items()}
        if how == "copy":
            self.model = copy.deepcopy(old)
        elif how == "pickle":
            buffer = io.BytesIO()
            torch.save(old, buffer)
            buffer.seek(0)
            self.model = torch.load(buffer, weights_only=False)
        elif how == "mode":
            old.train()(self.x)
            old.eval()
            return
        with torch.no_grad():
            for parameter in old.parameters():
                parameter.fill_(7.0)
        if how == "state":
            old.load_state_dict(state)
        self.adapters = pc.adapters(self.model)

    @invariant()
    def is_as_it_should_be(self) -> None:
        assert list(pc.adapters(self.model)) == list(self.adapters)
        for name, adapter in self.adapters.items():
            assert (adapter.merged, adapter.active) == (self.merged(name), name in self.active)
        self.check()
        state = self.model.state_dict()
        owned = {key for name in self.active if self.owns(name) for key in self.keys(name)}
        for key, place in self.places.items():
            if place.pristine and not place.merged and key not in owned:
                assert torch.equal(state[key], place.value), f"{key} has other bits than the base's"
        if not self.adapters:
            assert type(self.model) is Net and list(state) == list(self.places)
            assert all(parameter.requires_grad for parameter in self.model.parameters())
            assert not [name for module in self.model.modules() for name in vars(module) if "peft" in name]


class TestLife(Life.TestCase):  # type: ignore[misc, name-defined]
    settings = settings(max_examples=max(60, settings().max_examples // 4), stateful_step_count=30)


@pytest.mark.parametrize("seed", [None, 1.5, 3.0, True, "abc", torch.tensor(3)], ids=str)
def test_a_seed_that_is_no_whole_number(blocks, spec, seed, refused) -> None:
    """It would be found only when the trained adapter is saved."""
    with refused(pc.AdapterError, "seed", "whole number"):
        pc.attach(blocks, spec, seed=seed)
    assert not pc.adapters(blocks)
    assert pc.attach(blocks, spec, seed=np.int64(3)).bank.seed == 3


def test_what_is_no_model_or_no_name(blocks, spec, refused) -> None:
    for name in (None, 5, "a b"):
        with refused(pc.AdapterError, "adapter name", repr(name)):
            pc.attach(blocks, spec, name=name)
    for call in (pc.adapters, lambda model: pc.activate(model, "a")):
        with refused(pc.AdapterError, "expected a loaded model", "None"):
            call(None)
    with refused(pc.ModelError, "plan needs a model", "None"):
        pc.plan(None, spec)
