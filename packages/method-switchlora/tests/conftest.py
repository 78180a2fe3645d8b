from __future__ import annotations

import pytest
import torch

import peft_core as pc
from peft_core.sharing import draw
from peft_method_switchlora import Options
from peft_method_switchlora.layout import lay_out
from peft_method_switchlora.switching import switching


class Bench:
    """One site with its tensors, as an optimizer step sees it; no model around it."""

    def __init__(self, out_features=24, in_features=20, dtype=torch.float64, seed=0, path="layers.0.q", **options):
        options = {"r": 6, "interval": 2, "freeze_steps": 0, "total_steps": 10**9, **options}
        self.site = pc.Site(path, in_features, out_features, False, dtype, Options(**options))
        self.options = self.site.options
        self.seed = seed
        (group,) = lay_out([self.site]).groups
        self.tensors = {
            name: torch.nn.Parameter(draw(spec, dtype, seed, group.name, name)) for name, spec in group.tensors.items()
        }
        self.state = {name: draw(spec, dtype, seed, group.name, name) for name, spec in group.state.items()}
        generator = torch.Generator().manual_seed(seed)
        self.original = torch.randn(out_features, in_features, generator=generator, dtype=dtype) / in_features**0.5
        self.weight = (self.original - self.delta()).detach()
        self.generator = generator

    def delta(self):
        return self.options.scale * self.tensors["B"].detach() @ self.tensors["A"].detach()

    def effective(self):
        return self.weight + self.delta()

    def parameters(self):
        return list(self.tensors.values())

    def around(self, index, optimizer, total_steps=None):
        member = pc.StepMember(self.site, self.tensors, {}, self.state, self.weight)
        return switching(pc.OptimizerStep("default", index, total_steps, self.seed, optimizer, 1.0, [member]))

    def random_gradients(self):
        for parameter in self.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=self.generator, dtype=torch.float32).to(parameter)

    def snapshot(self):
        everything = {**self.tensors, **self.state, "weight": self.weight}
        return {name: tensor.detach().clone() for name, tensor in everything.items()}


@pytest.fixture
def bench():
    return Bench
