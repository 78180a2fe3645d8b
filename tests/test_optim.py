"""The optimizer-step seam: when a method's hook is called, in what order, and what is refused."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import peft_core as pc
from peft_core import optim
from peft_core.owned import OwnedWeight

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["loop", "foreach", "fused"])


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))


def adapted(**fields: Any) -> tuple[nn.Sequential, pc.Adapter]:
    """Layers 0 and 2 adapted."""
    made = model()
    return made, pc.attach(made, pc.AdapterSpec(method="stepper", targets=["0", "2"], **fields))


def backward(module: nn.Module, scale: float = 1.0) -> None:
    (module(X).square().mean() * scale).backward()


def adamw(parameters: Any, implementation: str = "loop", **settings: Any) -> torch.optim.AdamW:
    ways = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
    return torch.optim.AdamW(parameters, lr=0.1, **ways[implementation], **settings)


def values(adapter: pc.Adapter) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in adapter.parameters()]


def unchanged(adapter: pc.Adapter, before: Sequence[Tensor]) -> bool:
    return all(torch.equal(now, then) for now, then in zip(adapter.parameters(), before, strict=True))


class LoggedSGD(torch.optim.SGD):
    """Says when it updates."""

    def __init__(self, parameters: Any, log: list[Any], name: str = "update") -> None:
        super().__init__(parameters, lr=0.1)
        self.log, self.name = log, name

    def step(self, closure: Any = None) -> None:
        self.log.append(self.name)
        if closure is not None:
            closure()


# The order of calls


def test_a_training_step_in_order(stepper: Any) -> None:
    net, adapter = adapted()
    log = stepper.log
    for parameter in list(adapter.parameters())[:1]:
        parameter.register_post_accumulate_grad_hook(lambda _: log.append("gradient"))
    optimizer = LoggedSGD(adapter.parameters(), log)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    for _ in range(2):
        for _ in range(2):  # accumulation: the hook is called once per step, not per backward
            backward(net, 0.5)
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        log.append("clipped")
        optimizer.step()
        scheduler.step()
        log.append("scheduled")
        optimizer.zero_grad()
    once = ["gradient", "gradient", "clipped", "before {0}", "update", "after {0}", "scheduled"]
    assert log == [entry.format(number) for number in (0, 1) for entry in once]
    assert adapter.steps == 2
    assert [step.adapter for step in stepper.steps] == ["default"] * 2
    assert {step.loss_scale for step in stepper.steps} == {1.0}
    assert all(step.optimizer is optimizer for step in stepper.steps)


def test_what_a_step_is_given(stepper: Any) -> None:
    made = model()
    adapter = pc.attach(made, pc.AdapterSpec(method="stepper", targets=["0", "2"]), name="mine", seed=7)
    adapter.total_steps = 11
    optimizer = adamw(adapter.parameters())
    backward(made)
    optimizer.step()
    (step,) = stepper.steps
    assert (step.adapter, step.index, step.total_steps, step.seed) == ("mine", 0, 11, 7)
    assert [member.site.path for member in step.members] == ["0", "2"]
    named = dict(adapter.named_parameters())
    for member in step.members:
        assert {name: id(t) for name, t in member.tensors.items()} == {
            n: id(named[f"{member.site.path}.{n}"]) for n in "AB"
        }
        assert list(member.state) == ["factor"]
        assert member.weight is None


def test_the_method_may_change_gradients(stepper: Any) -> None:
    """What the optimizer sees is what the method left."""
    net, adapter = adapted()
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1.0)
    factor = [member.clone() for member in adapter.bank.state.values()]
    backward(net)
    expected = [
        parameter.detach() - parameter.grad * factor[number // 2]
        for number, parameter in enumerate(adapter.parameters())
        if parameter.grad is not None
    ]
    optimizer.step()
    assert unchanged(adapter, expected)


# Gradient scalers


@IMPLEMENTATIONS
@pytest.mark.parametrize("unscale", [False, True])
def test_a_step_that_the_scaler_skips_does_not_count(stepper: Any, implementation: str, unscale: bool) -> None:
    net, adapter = adapted()
    optimizer = adamw(adapter.parameters(), implementation)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=1000)
    seen = []
    for overflow in (False, True, False, True, True, False):
        before = values(adapter)
        scaler.scale(net(X).square().mean()).backward()
        if overflow:
            next(adapter.parameters()).grad[0, 0] = torch.inf  # type: ignore[index]
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        seen.append(adapter.steps)
        assert unchanged(adapter, before) == overflow
    assert seen == [1, 1, 2, 2, 2, 3]
    assert stepper.log == [f"{when} {index}" for index in range(3) for when in ("before", "after")]
    scaled_inside = implementation == "fused" and not unscale
    assert [step.loss_scale for step in stepper.steps] == ([16.0, 8.0, 2.0] if scaled_inside else [1.0] * 3)


def test_gradients_times_the_loss_scale_are_the_same_for_every_implementation(stepper: Any) -> None:
    results = []
    for implementation in ("loop", "foreach", "fused"):
        net, adapter = adapted()
        optimizer = adamw(adapter.parameters(), implementation)
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        for _ in range(3):
            scaler.scale(net(X).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        results.append(torch.cat([parameter.flatten() for parameter in adapter.parameters()]))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-7)


# Several optimizers


def test_an_optimizer_that_holds_nothing_of_the_adapter_passes(stepper: Any) -> None:
    net, adapter = adapted()
    other = nn.Linear(6, 1)
    strangers = LoggedSGD(other.parameters(), stepper.log, "stranger")
    mine = LoggedSGD(adapter.parameters(), stepper.log, "mine")
    for _ in range(2):
        (net(X).square().mean() + other(X).mean()).backward()
        strangers.step()
        mine.step()
    assert stepper.log == [
        "stranger",
        "before 0",
        "mine",
        "after 0",
        "stranger",
        "before 1",
        "mine",
        "after 1",
    ]


def test_the_optimizer_of_a_trained_head_does_not_count_for_the_sites(stepper: Any) -> None:
    net, adapter = adapted(train_modules=["4"])
    named = dict(adapter.named_parameters())
    head = LoggedSGD([p for key, p in named.items() if key.startswith("4.")], stepper.log, "head")
    sites = LoggedSGD([p for key, p in named.items() if not key.startswith("4.")], stepper.log, "sites")
    backward(net)
    head.step()
    with pytest.raises(pc.OptimizerStepError, match="no optimizer stepped"):
        optim.check_stepped(adapter.bank)
    sites.step()
    assert stepper.log == ["head", "before 0", "sites", "after 0"]


@pytest.mark.parametrize("first", [0, 1])
def test_two_optimizers_with_a_site_each_make_one_step(stepper: Any, first: int) -> None:
    net, adapter = adapted()
    named = dict(adapter.named_parameters())
    both = [LoggedSGD([p for k, p in named.items() if k.startswith(site)], stepper.log, site) for site in ("0", "2")]
    for _ in range(2):
        backward(net)
        both[first].step()
        both[1 - first].step()
        net.zero_grad()
    names = [both[first].name, both[1 - first].name]
    assert stepper.log == [
        f"{w} {i}".removeprefix("at ") if w != "at" else n
        for i in (0, 1)
        for n in names
        for w in ("before", "at", "after")
    ]
    assert adapter.steps == 2
    assert [[m.site.path for m in step.members] for step in stepper.steps] == [[names[0]], [names[1]]] * 2


def test_optimizers_in_turn_make_a_step_each(stepper: Any) -> None:
    """As in adversarial training: a backward before every step."""
    net, adapter = adapted()
    named = dict(adapter.named_parameters())
    both = [LoggedSGD([p for k, p in named.items() if k.startswith(site)], stepper.log, site) for site in ("0", "2")]
    for optimizer in both:
        backward(net)
        optimizer.step()
    assert [step.index for step in stepper.steps] == [0, 1]


def test_the_tensors_of_a_site_must_be_together(stepper: Any) -> None:
    net, adapter = adapted()
    named = dict(adapter.named_parameters())
    optimizer = adamw([named["0.A"], named["2.A"], named["2.B"]])
    before = values(adapter)
    backward(net)
    with pytest.raises(pc.OptimizerStepError, match=r"'0' are split across optimizers \(A here\)"):
        optimizer.step()
    assert unchanged(adapter, before) and adapter.steps == 0 and not stepper.log


def test_two_adapters_in_one_optimizer(stepper: Any) -> None:
    made = model()
    first = pc.attach(made, pc.AdapterSpec(method="stepper", targets=["0"]), name="a")
    second = pc.attach(made, pc.AdapterSpec(method="stepper", targets=["0", "2"]), name="b")
    pc.activate(made, ["a", "b"])
    optimizer = adamw([*first.parameters(), *second.parameters()])
    backward(made)
    optimizer.step()
    assert [step.adapter for step in stepper.steps] == ["a", "b"]
    assert stepper.log == ["before 0", "before 0", "after 0", "after 0"]
    assert (first.steps, second.steps) == (1, 1)


def test_a_method_that_refuses_leaves_no_context_open(stepper: Any) -> None:
    made = model()
    first = pc.attach(made, pc.AdapterSpec(method="stepper", targets=["0"]), name="a")
    second = pc.attach(made, pc.AdapterSpec(method="stepper", targets=["2"]), name="b")
    pc.activate(made, ["a", "b"])
    optimizer = adamw([*first.parameters(), *second.parameters()])
    before = values(first) + values(second)
    stepper.fail = "b"
    backward(made)
    with pytest.raises(pc.OptimizerStepError, match="the method refuses"):
        optimizer.step()
    assert stepper.log == ["before 0", "after 0"]
    assert (first.steps, second.steps) == (0, 0)
    assert unchanged(first, before[:2]) and unchanged(second, before[2:])
    stepper.fail = ""
    optimizer.step()
    assert [step.index for step in stepper.steps] == [0, 0, 0] and (first.steps, second.steps) == (1, 1)


# When the optimizer is made


def test_an_optimizer_made_before_attaching_never_steps_the_adapter(stepper: Any, tmp_path: Path) -> None:
    made = model()
    optimizer = adamw(made.parameters())
    adapter = pc.attach(made, pc.AdapterSpec(method="stepper"))
    backward(made)
    optimizer.step()
    assert not stepper.log
    with pytest.raises(pc.OptimizerStepError, match=r"received gradients, but no optimizer .* after attaching"):
        adapter.save(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_an_optimizer_made_before_attaching_may_be_given_the_parameters(stepper: Any, tmp_path: Path) -> None:
    made = model()
    optimizer = adamw(made.parameters())
    adapter = pc.attach(made, pc.AdapterSpec(method="stepper"))
    optimizer.add_param_group({"params": list(adapter.parameters())})
    backward(made)
    optimizer.step()
    assert stepper.log == ["before 0", "after 0"]
    adapter.save(tmp_path / "a")


def test_a_warning_after_256_gradients_without_a_step(stepper: Any) -> None:
    net, _ = adapted()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(optim.WARN_AFTER - 1):
            backward(net)
    assert optim.WARN_AFTER == 256
    with pytest.warns(UserWarning, match="'default': 256 backward passes without an optimizer step"):
        backward(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward(net)  # once is enough


def test_no_warning_where_steps_come(stepper: Any) -> None:
    net, adapter = adapted()
    optimizer = adamw(adapter.parameters())
    backward(net)
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2 * optim.WARN_AFTER):
            backward(net)


def test_reentrant_checkpointing_counts_a_backward_once(stepper: Any) -> None:
    net, adapter = adapted()
    x = X.clone().requires_grad_()
    y = torch.utils.checkpoint.checkpoint(net[:3], x, use_reentrant=True)
    net[3:](y).square().mean().backward()
    assert adapter.bank.progress.backwards == 1


# Closures


def test_a_closure_is_refused(stepper: Any) -> None:
    net, adapter = adapted()
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    before = values(adapter)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = net(X).square().mean()
        loss.backward()
        return loss

    calls: list[Callable[[], Any]] = [
        lambda: optimizer.step(closure),
        lambda: optimizer.step(closure=closure),
    ]
    for gradients_are_there in (False, True):  # before the first step they are not
        for call in calls:
            with pytest.raises(pc.OptimizerStepError, match=r"call backward first and step\(\) without a closure"):
                call()
        assert unchanged(adapter, before) and not stepper.log
        if not gradients_are_there:
            backward(net)
    optimizer.step(None)  # as Accelerate calls it
    optimizer.step(closure=None)
    assert adapter.steps == 2


def test_a_closure_is_fine_for_other_parameters(stepper: Any) -> None:
    adapted()
    other = nn.Linear(2, 1)
    optimizer = torch.optim.LBFGS(other.parameters())
    optimizer.step(lambda: other(torch.ones(1, 2)).square().sum())


# Gradients that are not there


def test_an_inactive_adapter_is_not_stepped(stepper: Any) -> None:
    net, adapter = adapted(train_modules=["4"])
    other = pc.attach(net, pc.AdapterSpec(method="stepper", targets=["0"], train_modules=["4"]), name="other")
    optimizer = adamw([*adapter.parameters(), *other.parameters()])
    backward(net)
    optimizer.step()
    assert [step.adapter for step in stepper.steps] == ["other"]
    assert (adapter.steps, other.steps) == (0, 1)


def test_zeroed_gradients_are_stepped_all_the_same(stepper: Any) -> None:
    """AdamW moves parameters whose gradient is zero (momentum, decay); those without one it leaves alone."""
    net, adapter = adapted()
    optimizer = adamw(adapter.parameters())
    backward(net)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    before = values(adapter)
    optimizer.step()
    assert not unchanged(adapter, before)
    assert adapter.steps == 2
    optimizer.zero_grad()
    before = values(adapter)
    optimizer.step()
    assert unchanged(adapter, before)
    assert adapter.steps == 2


def test_a_frozen_tensor_need_not_be_in_the_optimizer(stepper: Any) -> None:
    net, adapter = adapted()
    for key, parameter in adapter.named_parameters():
        parameter.requires_grad_(not key.endswith("A"))
    optimizer = adamw([parameter for parameter in adapter.parameters() if parameter.requires_grad])
    backward(net)
    optimizer.step()
    assert adapter.steps == 1


def test_a_saved_adapter_is_used_without_training(stepper: Any, tmp_path: Path) -> None:
    adapted()[1].save(tmp_path)
    loaded = pc.load(model(), tmp_path)
    loaded.model(X.requires_grad_()).sum().backward()
    loaded.save(tmp_path / "again")
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


# Copies, and the end


def test_a_copy_in_training_is_stepped_on_its_own(stepper: Any, tmp_path: Path) -> None:
    net, adapter = adapted()
    optimizer = adamw(adapter.parameters())
    backward(net)
    optimizer.step()
    twin = copy.deepcopy(net)
    copied = pc.adapters(twin)["default"]
    own = adamw(copied.parameters())
    before = values(adapter)
    backward(twin)
    own.step()
    assert stepper.log == ["before 0", "after 0", "before 1", "after 1"]
    assert stepper.steps[1].members[0].tensors["A"] is dict(copied.named_parameters())["0.A"]
    assert (adapter.steps, copied.steps) == (1, 2) and unchanged(adapter, before)
    assert adapter.bank.state["0.factor"] != copied.bank.state["0.factor"]
    copied.detach()
    backward(net)
    optimizer.step()
    assert adapter.steps == 2


@pytest.mark.parametrize(
    "make", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copied", "pickled"]
)
def test_a_copy_that_nobody_steps_is_noticed(
    stepper: Any, tmp_path: Path, make: Callable[[nn.Module], nn.Module]
) -> None:
    net, adapter = adapted()
    twin = make(net)
    copied = pc.adapters(twin)["default"]
    backward(twin)
    adapter.save(tmp_path / "original")
    with pytest.raises(pc.OptimizerStepError, match="no optimizer stepped"):
        copied.save(tmp_path / "copy")
    adamw(copied.parameters()).step()
    copied.save(tmp_path / "copy")


def test_a_model_that_was_saved_whole_is_stepped(stepper: Any) -> None:
    net, _ = adapted()
    file = io.BytesIO()
    torch.save(net, file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    adapter = pc.adapters(loaded)["default"]
    optimizer = adamw(adapter.parameters())
    backward(loaded)
    optimizer.step()
    assert adapter.steps == 1


def test_a_detached_adapter_is_forgotten(stepper: Any) -> None:
    net, adapter = adapted()
    optimizer = adamw(adapter.parameters())
    backward(net)
    adapter.detach()
    optimizer.step()
    assert not stepper.log


def test_other_threads_attach_and_detach_during_a_step(stepper: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step looks at every adapter in the process: those of other models may come and go meanwhile."""
    (net, adapter), (_, gone) = adapted(), adapted()
    bank, hook, came = gone.bank, optim._Watch.hook_gradients, []

    def meanwhile(watch: optim._Watch) -> None:
        if watch.bank() is bank:
            gone.detach()
            came.append(adapted())
        hook(watch)

    monkeypatch.setattr(optim._Watch, "hook_gradients", meanwhile)
    backward(net)
    adamw(adapter.parameters()).step()
    assert adapter.steps == 1 and len(came) == 1


def test_training_goes_on_after_loading(stepper: Any, tmp_path: Path) -> None:
    net, adapter = adapted()
    optimizer = adamw(adapter.parameters())
    backward(net)
    optimizer.step()
    adapter.save(tmp_path)
    loaded = pc.load(model(), tmp_path, trainable=True)
    own = adamw(loaded.parameters())
    backward(loaded.model)
    own.step()
    assert [step.index for step in stepper.steps] == [0, 1]
    assert torch.equal(loaded.bank.state["0.factor"], adapter.bank.state["0.factor"] * 0.9)


def test_an_optimizer_resumed_without_its_adapter_is_refused(stepper: Any) -> None:
    """As a plain checkpoint of `model.state_dict()` and `optimizer.state_dict()` would do."""
    net, adapter = adapted()
    optimizer = adamw(adapter.parameters())
    backward(net)
    optimizer.step()
    again, fresh = adapted()
    again.load_state_dict(net.state_dict())
    resumed = adamw(fresh.parameters())
    resumed.load_state_dict(optimizer.state_dict())
    backward(again)
    with pytest.raises(pc.OptimizerStepError, match="was never stepped, but its optimizer was"):
        resumed.step()


# Steps within steps, and steps that fail


def test_an_optimizer_that_calls_its_parents_step_makes_one_step(stepper: Any) -> None:
    class Outer(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            stepper.log.append("outer")
            return super().step(closure)

    net, adapter = adapted()
    adamw([nn.Parameter(torch.zeros(1))])  # torch hooks a class's step when the first of the class is made
    optimizer = Outer(adapter.parameters(), lr=0.1)
    for _ in range(2):
        backward(net)
        optimizer.step()
    assert stepper.log == ["before 0", "outer", "after 0", "before 1", "outer", "after 1"]


def test_an_optimizer_around_another_makes_one_step(stepper: Any) -> None:
    class Around(torch.optim.Optimizer):
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            super().__init__(inner.param_groups, {})
            self.inner = inner

        def step(self, closure: Any = None) -> None:
            self.inner.step()

    net, adapter = adapted()
    optimizer = Around(LoggedSGD(adapter.parameters(), stepper.log))
    backward(net)
    optimizer.step()
    assert stepper.log == ["before 0", "update", "after 0"]
    assert stepper.steps[0].optimizer is optimizer


def test_after_a_step_that_failed(stepper: Any, tmp_path: Path) -> None:
    class Failing(torch.optim.SGD):
        fails = False

        def step(self, closure: Any = None) -> Any:
            if self.fails:
                raise RuntimeError("out of memory")
            return super().step(closure)

    net, adapter = adapted()
    optimizer = Failing(adapter.parameters(), lr=0.1)
    for fails in (False, True, False):
        optimizer.fails = fails
        backward(net)
        try:
            optimizer.step()
        except RuntimeError:
            adapter.save(tmp_path)  # one step was made: what it trained can be saved
        optimizer.zero_grad()
    assert adapter.steps == 2
    assert [step.index for step in stepper.steps] == [0, 1, 1]
    another = torch.optim.SGD(adapter.parameters(), lr=0.1)
    optimizer.fails = True
    backward(net)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    another.step()
    assert adapter.steps == 3


def test_a_step_that_failed_holds_nothing(stepper: Any) -> None:
    class Fails(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            raise RuntimeError("out of memory")

    def run() -> weakref.ref[nn.Module]:
        net, adapter = adapted()
        optimizer = Fails(adapter.parameters(), lr=0.1)
        backward(net)
        with contextlib.suppress(RuntimeError):
            optimizer.step()
        return weakref.ref(net)

    net = run()
    gc.collect()
    assert net() is None


def test_a_hook_may_change_a_steps_arguments(stepper: Any) -> None:
    net, adapter = adapted()
    optimizer = LoggedSGD(adapter.parameters(), stepper.log)
    optimizer.register_step_pre_hook(lambda self, args, kwargs: (args, dict(kwargs)))
    for _ in range(2):
        backward(net)
        optimizer.step()
    assert stepper.log == ["before 0", "update", "after 0", "before 1", "update", "after 1"]


def test_a_compiled_optimizer_step_is_seen(stepper: Any) -> None:
    net, adapter = adapted()
    optimizer = adamw(adapter.parameters())
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(3):
        backward(net)
        step()
        optimizer.zero_grad()
    assert stepper.log == [f"{when} {index}" for index in range(3) for when in ("before", "after")]


# Weights that the method owns


def test_an_adapter_without_its_training_state_is_not_stepped(
    stepper: Any, blocks, tmp_path: Path, refused: Any
) -> None:
    pc.attach(blocks, pc.AdapterSpec(method="stepper")).save(tmp_path / "adapter")
    pc.adapters(blocks)["default"].detach()
    adapter = pc.load(blocks, tmp_path / "adapter")
    parameters = [parameter.requires_grad_(True) for parameter in adapter.parameters()]
    blocks(torch.randn(2, 63)).sum().backward()
    before = [parameter.detach().clone() for parameter in parameters]
    with refused(pc.OptimizerStepError, "'default'", "training state", "trainable=True"):
        torch.optim.SGD(parameters, lr=1.0).step()
    assert all(torch.equal(parameter, value) for parameter, value in zip(parameters, before, strict=True))


class Elsewhere:
    """Of a tensor, its device: there is one only here."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)

    def to(self, device: torch.device) -> Elsewhere:
        return Elsewhere(str(device))


def test_a_master_follows_its_weight() -> None:
    """A trainer moves the model to the GPU after the adapter was attached, and masters are no parameters."""
    site = pc.Site("layer", 4, 4, False, torch.bfloat16)
    layer: Any = SimpleNamespace(weight=Elsewhere("cuda:1"))
    owned = OwnedWeight(master=Elsewhere("cpu"))  # type: ignore[arg-type]
    assert owned.current(layer, site).device == owned.current(layer, site).device == torch.device("cuda:1")
    layer.weight = Elsewhere("meta")  # it holds no values then; the master still does
    assert owned.current(layer, site).device == torch.device("cuda:1")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_owned_weight_is_changed_and_rounded(stepper: Any, dtype: torch.dtype) -> None:
    net = model().to(dtype)
    original = net[0].weight.detach().clone()
    adapter = pc.attach(net, pc.AdapterSpec(method="stepper", targets=["0", "2"], options={"owns": True}))
    optimizer = adamw(adapter.parameters())
    for _ in range(2):
        net(X.to(dtype)).square().mean().backward()
        optimizer.step()
    owned = stepper.steps[-1].members[0].weight
    assert owned.dtype == torch.float32
    assert not torch.equal(net[0].weight, original)
    assert torch.equal(net[0].weight, owned.to(dtype))
    with adapter.disabled():
        assert torch.equal(net[0].weight, original)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_while_inactive_does_not_touch_the_base(stepper: Any, dtype: torch.dtype) -> None:
    net = model().to(dtype)
    original = net[0].weight.detach().clone()
    adapter = pc.attach(net, pc.AdapterSpec(method="stepper", targets=["0", "2"], options={"owns": True}))
    optimizer = adamw(adapter.parameters())
    for _ in range(2):
        net(X.to(dtype)).square().mean().backward()
        with adapter.disabled():
            optimizer.step()
            assert torch.equal(net[0].weight, original)
    assert torch.equal(net[0].weight, stepper.steps[-1].members[0].weight.to(dtype))
    assert not torch.equal(net[0].weight, original)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_dict_loaded_while_training_is_what_is_saved(stepper: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    """As by who keeps the best weights in memory. A word says that the method's own state is not in there."""
    net = model().to(dtype)
    adapter = pc.attach(net, pc.AdapterSpec(method="stepper", targets=["0", "2"], options={"owns": True}))
    optimizer = adamw(adapter.parameters())

    def train(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            net(X.to(dtype)).square().mean().backward()
            optimizer.step()

    train(4)
    best, output = copy.deepcopy(net.state_dict()), net(X.to(dtype))
    train(4)
    with pytest.warns(UserWarning, match="neither the training state of method 'stepper' nor its count of steps"):
        net.load_state_dict(best)
    assert torch.equal(net(X.to(dtype)), output)
    adapter.save(tmp_path)
    other = model().to(dtype)
    pc.load(other, tmp_path)
    assert torch.equal(other(X.to(dtype)), output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_its_own_state_dict_changes_no_owned_weight(stepper: Any, dtype: torch.dtype) -> None:
    net = model().to(dtype)
    adapter = pc.attach(net, pc.AdapterSpec(method="stepper", targets=["0", "2"], options={"owns": True}))
    optimizer = adamw(adapter.parameters())
    for _ in range(4):
        net(X.to(dtype)).square().mean().backward()
        optimizer.step()
    kept = {site.path: adapter.bank.owned_weight(site).clone() for site in adapter.plan.sites}
    with pytest.warns(UserWarning, match="is in training"):
        net.load_state_dict(net.state_dict())
    assert all(torch.equal(adapter.bank.owned_weight(site), kept[site.path]) for site in adapter.plan.sites)


# Accelerate


def test_accelerates_loop(stepper: Any) -> None:
    """prepare, accumulation, clipping and a scheduler: the same steps, at the same places, as in a loop of one's own."""
    net, adapter = adapted()
    log = stepper.log
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    optimizer = LoggedSGD(adapter.parameters(), log)
    loader = DataLoader(TensorDataset(torch.randn(12, 6, generator=torch.Generator().manual_seed(1))), batch_size=2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    prepared, wrapped, loader, scheduler = accelerator.prepare(net, optimizer, loader, scheduler)
    for (batch,) in loader:
        with accelerator.accumulate(prepared):
            log.append("forward")
            accelerator.backward(prepared(batch).square().mean())
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
                log.append("clipped")
            wrapped.step()
            scheduler.step()
            wrapped.zero_grad()
    once = ["forward", "forward", "clipped", "before {0}", "update", "after {0}"]
    assert log == [entry.format(number) for number in range(3) for entry in once]
    assert adapter.steps == 3


def test_accelerates_loop_gives_what_a_bare_loop_gives(stepper: Any) -> None:
    batches = torch.randn(6, 2, 6, generator=torch.Generator().manual_seed(1))
    results = []
    for bare in (True, False):
        net, adapter = adapted()
        optimizer = adamw(adapter.parameters())
        if bare:
            for number, batch in enumerate(batches):
                (net(batch).square().mean() / 2).backward()
                if number % 2:
                    torch.nn.utils.clip_grad_norm_(adapter.parameters(), 0.1)
                    optimizer.step()
                    optimizer.zero_grad()
        else:
            accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
            net, wrapped, loader = accelerator.prepare(net, optimizer, DataLoader(batches, batch_size=None))
            for batch in loader:
                with accelerator.accumulate(net):
                    accelerator.backward(net(batch).square().mean())
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(net.parameters(), 0.1)
                    wrapped.step()
                    wrapped.zero_grad()
        assert adapter.steps == 3
        results.append(values(adapter))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
