"""What the tests of core share: methods that no distribution provides, tiny random models, and what a clear error is."""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

import peft_core as pc
from peft_core import hookimpl, lowrank, plugins
from peft_core.testing.families import FAMILIES
from peft_core.testing.methods import register_sound

PHASES = [phase for phase in Phase if phase is not Phase.explain]
settings.register_profile("suite", deadline=None, derandomize=True, max_examples=200, phases=PHASES)
settings.register_profile("fuzz", deadline=None, max_examples=10_000, phases=PHASES)
settings.load_profile("suite")


class Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    r: int = 2
    owns: bool = False


class StepperAdamW(torch.optim.AdamW):
    """The optimizer that the method comes with."""


class Stepper:
    """ΔW = B·A. Before every step the gradients are multiplied by a number that is kept as training state, so that a lost
    state shows; with `owns`, every other step moves B·A into the base weight, so that a lost weight shows.

    `log` records what happens; tests add entries of their own. `fail` makes the hook raise.
    """

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.steps: list[pc.OptimizerStep] = []
        self.fail = ""

    @hookimpl
    def peft_method(self) -> pc.MethodInfo:
        return pc.MethodInfo(
            name="stepper",
            options=Options,
            capabilities=lambda options: pc.Capabilities(optimizer_step=True, owns_base_weight=options.owns),
            optimizer=StepperAdamW,
            trials=({}, {"owns": True}),
        )

    @hookimpl
    def peft_init(self, sites: Sequence[pc.Site]) -> pc.Layout:
        return pc.Layout(tuple(self._group(site) for site in sites))

    def _group(self, site: pc.Site) -> pc.SharingGroup:
        tensors = {
            "A": pc.TensorSpec((site.options.r, site.in_features), pc.Normal(0.1)),
            "B": pc.TensorSpec((site.out_features, site.options.r)),
        }
        return pc.SharingGroup.private(site, tensors, state={"factor": pc.TensorSpec((1,), pc.Normal(0.1, 1.0))})

    @hookimpl
    def peft_attach(self, site: pc.Site, weight: Tensor, tensors: pc.Tensors, binding: pc.Tensors) -> Tensor:
        return weight.to(torch.promote_types(weight.dtype, torch.float32))

    @hookimpl
    def peft_forward(self, site: pc.Site) -> pc.Forward:
        return lowrank.forward(1.0)

    @hookimpl
    def peft_merge(self, site: pc.Site, weight: Tensor, tensors: pc.Tensors, binding: pc.Tensors) -> Tensor:
        return lowrank.merged(weight, tensors["A"], tensors["B"], 1.0)

    @hookimpl
    def peft_optimizer_step(self, step: pc.OptimizerStep) -> Any:
        return self._around(step)

    @contextmanager
    def _around(self, step: pc.OptimizerStep) -> Iterator[None]:
        if self.fail == step.adapter:
            raise pc.OptimizerStepError("the method refuses")
        self.steps.append(step)
        self.log.append(f"before {step.index}")
        with torch.no_grad():
            for member in step.members:
                factor = member.state["factor"]
                for tensor in member.tensors.values():
                    if tensor.grad is not None:
                        tensor.grad.mul_(factor)
                factor.mul_(0.9)
                if member.weight is not None and step.index % 2:
                    member.weight.add_(
                        lowrank.delta(member.tensors["A"], member.tensors["B"], 1.0, member.weight.dtype)
                    )
                    member.tensors["B"].zero_()
        try:
            yield
        finally:
            self.log.append(f"after {step.index}")


@pytest.fixture
def stepper() -> Iterator[Stepper]:
    """The method `stepper`, installed for this test."""
    plugin = Stepper()
    plugins.register(plugin, "stepper")
    yield plugin
    plugins.unregister("stepper")


ROOT = Path(__file__).resolve().parent.parent
Refused = Callable[..., AbstractContextManager[None]]


@pytest.fixture(autouse=True, scope="session")
def sound_method() -> None:
    """The method `sound` is there for the whole run."""
    register_sound()


@pytest.fixture(scope="session")
def lora_method() -> None:
    """The example's method, installed or not."""
    _example("lora")


@pytest.fixture(scope="session")
def vera_method() -> None:
    """The example whose sites share fixed tensors."""
    _example("vera")


@pytest.fixture(scope="session")
def dora_method() -> None:
    """The example that is not additive and starts from the base weight."""
    _example("dora")


def _example(name: str) -> None:
    if name not in pc.methods():
        sys.path.insert(0, str(ROOT / "examples" / f"peft-method-{name}" / "src"))
        plugins.register(importlib.import_module(f"peft_method_{name}"), name)


@pytest.fixture
def spec() -> pc.AdapterSpec:
    """All linear layers by the sound method."""
    return pc.AdapterSpec(method="sound")


@pytest.fixture
def blocks() -> nn.Module:
    """Two blocks of 63 → 60 → 63 in an nn.Sequential."""
    return FAMILIES["odd"].build()


@pytest.fixture
def llama() -> nn.Module:
    """A tiny random Llama."""
    return FAMILIES["llama"].build()


@pytest.fixture
def gpt2() -> nn.Module:
    """A tiny random GPT-2: Conv1D layers, tied head."""
    return FAMILIES["gpt2"].build()


@pytest.fixture
def bert() -> nn.Module:
    """A tiny random BERT classifier."""
    return FAMILIES["bert"].build()


@pytest.fixture(scope="session")
def llama_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory of the tiny Llama with a tokenizer of 60 words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("llama")
    FAMILIES["llama"].build().save_pretrained(directory)
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(56))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(directory)
    return directory


@pytest.fixture
def refused() -> Refused:
    """`with refused(SpecError, "word", ...)`: this error, in one line of reasonable length, with these words in it."""

    @contextmanager
    def check(error: type[pc.PeftCoreError], *words: str) -> Iterator[None]:
        with pytest.raises(error) as caught:
            yield
        assert_clear(str(caught.value), *words)

    return check


@pytest.fixture
def interrupted() -> Callable[[type, int], AbstractContextManager[None]]:
    """`with interrupted(Trainer, 6)`: Ctrl-C comes within that trainer's sixth step."""

    @contextmanager
    def within(trainer: Any, number: int) -> Iterator[None]:
        step, begun = trainer.training_step, itertools.count(1)

        def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
            if next(begun) == number:
                raise KeyboardInterrupt
            return step(self, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "training_step", training_step)
            yield

    return within


@pytest.fixture
def clear() -> Callable[..., None]:
    """The check of a message alone, for what a program prints."""
    return assert_clear


def assert_clear(message: str, *words: str) -> None:
    """One line, not too long, and with these words."""
    assert "\n" not in message.strip(), f"more than one line: {message}"
    assert 15 < len(message) < 700, f"{len(message)} characters: {message}"
    assert "Traceback" not in message
    for word in words:
        assert word in message, f"'{word}' is not in: {message}"
