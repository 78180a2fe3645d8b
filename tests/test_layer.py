"""Adapted layers in models that use them in unusual ways."""

import copy
import functools
import itertools
import pickle
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel

import peft_core as pc
from peft_core import AdapterSpec
from peft_core.slots import Slot
from peft_core.testing.checks import Snapshot, assert_near, randomise

pytestmark = pytest.mark.usefixtures("sound_method")


def attached(model: nn.Module, name: str = "default", **fields) -> pc.Adapter:
    return pc.attach(model, AdapterSpec(method="sound", options={"r": 4}, **fields), name=name)


class Net(nn.Module):
    """One layer, called as `call` says."""

    def __init__(self, layer: nn.Module, call) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.layer, x)


class Scaled(nn.Linear):
    """A Linear with a forward of its own, so that its product cannot be fused."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Widened(nn.Linear):
    """Gives the product, but for dropout, and takes more than its input."""

    def forward(self, hidden_states: Tensor, scale: float = 1.0, *, shift: float = 0.0) -> Tensor:
        dropped = nn.functional.dropout(hidden_states, 0.5, self.training)
        return super().forward(dropped) * scale + shift


def halved(layer: nn.Module, x: Tensor) -> Tensor:
    y = layer(x)
    y /= 2
    return y


@pytest.mark.parametrize("kernels", ["auto", "naive"])
@pytest.mark.parametrize("shape", [(24,), (3, 24), (2, 3, 24)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kind", [nn.Linear, Scaled])
def test_the_output_may_be_changed_in_place(kind, bias: bool, shape: tuple[int, ...], kernels: str) -> None:
    net = Net(kind(24, 20, bias=bias), halved)
    adapter = randomise(attached(net))
    x = torch.randn(shape, requires_grad=True)
    with pc.kernels(kernels):
        y = net(x)
        y.square().sum().backward()
    expected = net.layer(x) / 2
    torch.testing.assert_close(y, expected)
    found = [p.grad.clone() for p in adapter.parameters()]
    wanted = torch.autograd.grad(expected.square().sum(), list(adapter.parameters()))
    torch.testing.assert_close(found, list(wanted))


def test_the_input_may_be_named() -> None:
    from transformers.pytorch_utils import Conv1D

    x = torch.randn(2, 24)
    for layer, call in ((nn.Linear(24, 20), "input"), (Conv1D(20, 24), "x")):
        net = Net(layer, lambda layer, x, name=call: layer(**{name: x}))
        randomise(attached(net))
        torch.testing.assert_close(net(x), net.layer(x))
        with pytest.raises(TypeError, match="'input'"):
            net.layer()


@pytest.mark.parametrize("hooked", [False, True])
def test_a_layer_is_called_as_its_own_forward_takes_it(hooked: bool) -> None:
    x = torch.randn(2, 24)
    calls = (
        lambda layer, x: layer(hidden_states=x),
        lambda layer, x: layer(x, 0.5),
        lambda layer, x: layer(shift=1.0, hidden_states=x, scale=0.5),
    )
    layer = Widened(24, 20).eval()
    if hooked:
        layer.forward = functools.partial(Widened.forward, layer)
    nets = [Net(layer, call) for call in calls]
    plain = [net(x) for net in nets]
    adapter = randomise(attached(nets[0]))
    with adapter.disabled():
        torch.testing.assert_close([net(x) for net in nets], plain, rtol=0, atol=0)
    added = nets[0](x) - plain[0]
    assert added.abs().max() > 0.1
    torch.testing.assert_close([net(x) - y for net, y in zip(nets, plain, strict=True)], [added] * 3)
    with pytest.raises(TypeError, match="scales"):
        layer(x, scales=2.0)


def test_a_layer_that_returns_more_than_its_product_is_named(refused) -> None:
    class Pair(nn.Linear):
        def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(input), input

    net = Net(Pair(24, 20), lambda layer, x: layer(x)[0])
    attached(net)
    with refused(pc.AdapterError, "'layer'", "Pair", "tuple", "exclude"):
        net(torch.randn(2, 24))


def test_autocast_leaves_float64_alone() -> None:
    net = nn.Sequential(nn.Linear(24, 24)).double()
    x = torch.randn(3, 24, dtype=torch.float64)
    randomise(attached(net))
    on = net(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net(x), on)


def test_tracing_records_the_adapted_model() -> None:
    net = Net(nn.Linear(24, 20), lambda layer, x: layer(x))
    randomise(attached(net))
    x = torch.randn(5, 24)
    with torch.no_grad():
        traced = torch.jit.trace(net, torch.randn(2, 24))
    torch.testing.assert_close(traced(x), net(x))


def test_a_module_trained_in_full_keeps_the_ties_within_it() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(24, 24), nn.Linear(24, 24)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x)))

    net = nn.ModuleDict({"trunk": nn.Linear(24, 24), "head": Head()})
    adapter = attached(net, targets=["trunk"], train_modules=["head"])
    x = torch.randn(3, 24)
    net["head"](x).sum().backward()
    plain = Head()
    plain.load_state_dict(net["head"].state_dict())
    plain.b.weight = plain.a.weight
    plain(x).sum().backward()
    torch.testing.assert_close(dict(adapter.named_parameters())["head.a.weight"].grad, plain.a.weight.grad)
    adapter.merge()
    adapter.unmerge()


def tied() -> nn.Module:
    net = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))
    net[1].weight = net[0].weight
    return net


def twice() -> nn.Module:
    net = nn.ModuleDict({"a": nn.Linear(24, 24)})
    net["b"] = net["a"]
    return net


def test_two_layers_with_one_weight_cannot_be_merged(refused) -> None:
    net = tied()
    adapter = randomise(attached(net))
    before = Snapshot.of(net)
    with refused(pc.MergeError, "'0.weight'", "'1.weight'", "exclude"):
        adapter.merge()
    before.assert_restored(net)


def test_one_layer_under_two_names_can() -> None:
    net = twice()
    adapter = randomise(attached(net))
    x = torch.randn(3, 24)
    on = net["b"](x)
    adapter.merge()
    torch.testing.assert_close(net["b"](x), on)


@pytest.mark.parametrize(
    "wrap",
    [parametrizations.weight_norm, parametrizations.orthogonal, nn.utils.spectral_norm],
    ids=lambda f: f.__name__,
)
def test_a_computed_weight_cannot_be_merged(wrap, refused) -> None:
    net = nn.Sequential(wrap(nn.Linear(24, 24))).eval()
    adapter = randomise(attached(net))
    x = torch.randn(3, 24)
    on = net(x)
    for merge in (adapter.merge, adapter.merge_and_detach):
        with refused(pc.MergeError, "'0'", "computed at every forward"):
            merge()
    torch.testing.assert_close(net(x), on)


class Activated(nn.Linear):
    """Gives something else than a product."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.relu(super().forward(input))


@pytest.mark.parametrize("kind", [Scaled, Activated])
def test_a_forward_that_is_no_product_cannot_be_merged(kind, refused, stepper) -> None:
    net = Net(kind(24, 20), lambda layer, x: layer(x))
    adapter = randomise(attached(net))
    assert any("forward of their own" in note and f"{kind.__name__} (1)" in note for note in adapter.plan.notes)
    before = Snapshot.of(net)
    with refused(pc.MergeError, "'layer'", kind.__name__, "x Wᵀ + b", "exclude"):
        adapter.merge()
    before.assert_restored(net)
    adapter.detach()
    with refused(pc.MergeError, "'layer'", kind.__name__):
        pc.attach(net, AdapterSpec(method="stepper", options={"owns": True}))
    assert not pc.adapters(net)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forward_of_its_own_that_is_a_product_can(dtype) -> None:
    net = Net(Widened(24, 20), lambda layer, x: layer(x)).to(dtype)
    adapter = randomise(attached(net))
    x = torch.randn(5, 24, dtype=dtype)
    net.eval()
    y = net(x)
    net.train()
    adapter.merge()
    assert net.layer.training
    assert_near(net.eval()(x), y, 1e-6 if dtype == torch.float32 else 2e-2, "merged")


def test_a_layer_belongs_to_one_root(refused) -> None:
    trunk = nn.Sequential(nn.Linear(24, 24))
    whole = nn.ModuleDict({"trunk": trunk, "head": nn.Linear(24, 8)})
    attached(trunk)
    before = Snapshot.of(whole)
    with refused(pc.AdapterError, "'trunk.0'", "Sequential", "detach"):
        attached(whole, "other")
    before.assert_restored(whole)
    assert not pc.adapters(whole)


@pytest.mark.parametrize("order", list(itertools.permutations(("outer", "middle", "inner"))), ids=" ".join)
@pytest.mark.parametrize("first", ["outer", "inner"])
def test_models_within_models_may_lose_their_adapters_in_any_order(first: str, order: tuple[str, ...]) -> None:
    net = nn.Sequential(nn.Linear(24, 24), nn.Sequential(nn.Linear(24, 24), nn.Sequential(nn.Linear(24, 24))))
    net[0].bias.requires_grad_(False)
    net[1][1][0].bias.requires_grad_(False)
    models = {"outer": net, "middle": net[1], "inner": net[1][1]}
    before = Snapshot.of(net)
    names = models if first == "outer" else reversed(models)
    adapters = {name: attached(models[name], targets="0") for name in names}
    for done, name in enumerate(order, start=1):
        adapters[name].detach()
        for other in order[done:]:
            free = [key for key, p in models[other].named_parameters() if p.requires_grad and "peft_core/" not in key]
            assert not free, f"'{free[0]}' can be trained beside the adapter of the {other} model"
    before.assert_restored(net)
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["0.bias", "1.1.0.bias"]


def test_a_model_gets_its_own_save_pretrained_back(llama) -> None:
    own = llama.save_pretrained = functools.partial(llama.save_pretrained, max_shard_size="1GB")
    first, second = attached(llama), attached(llama, name="second")
    first.detach()
    assert llama.save_pretrained is not own
    second.detach()
    assert llama.save_pretrained is own


def test_names_that_hold_a_slash_are_kept_apart() -> None:
    net = nn.ModuleDict({"user": nn.ModuleDict({"age": nn.Linear(24, 24)}), "user/age": nn.Linear(24, 24)})
    net["user%2Fage"] = nn.Linear(24, 24)
    adapter = attached(net)
    parameters = list(adapter.parameters())
    assert len(set(parameters)) == len(parameters) == sum("peft_core/" in key for key in net.state_dict())


def replaced(net: nn.Module) -> None:
    net.layers[2] = nn.Linear(24, 24)


def cut_off(net: nn.Module) -> None:
    net.layers = net.layers[:2]


def moved(net: nn.Module) -> None:
    net.layers = net.layers[:1] + net.layers[2:] + net.layers[1:2]


@pytest.mark.parametrize(("change", "place"), [(replaced, "2"), (cut_off, "2"), (moved, "1")])
@pytest.mark.parametrize("owns", [False, True])
def test_a_model_that_lost_an_adapted_layer(change, place: str, owns: bool, refused, stepper) -> None:
    net = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(24, 24) for _ in range(3))})
    weights = [layer.weight.clone() for layer in net.layers]
    adapter = pc.attach(net, AdapterSpec(method="stepper", options={"owns": owns}))
    change(net)
    before = [layer.weight.clone() for layer in net.layers]
    for use in (adapter.merge, lambda: pc.activate(net, []), lambda: adapter.disabled().__enter__()):
        with refused(pc.AdapterError, f"'layers.{place}'", "'default'", "detach"):
            use()
    torch.testing.assert_close([layer.weight for layer in net.layers], before, rtol=0, atol=0)
    adapter.detach()
    assert torch.equal(net.layers[0].weight, weights[0])
    assert [type(layer) for layer in net.layers] == [nn.Linear] * len(net.layers)
    assert not [key for key in net.state_dict() if "peft_core/" in key]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("step", ["peft_core.bank.Bank.register", "peft_core.install.optim.watch"])
def test_an_attach_that_is_interrupted_leaves_no_trace(step: str, first: bool, monkeypatch) -> None:
    net = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))
    if not first:
        randomise(attached(net))
    before, on = Snapshot.of(net), net(torch.ones(24))

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        attached(net, "other")
    monkeypatch.undo()
    before.assert_restored(net)
    assert "other" not in pc.adapters(net) and torch.equal(net(torch.ones(24)), on)
    attached(net, "other")


def test_an_attach_that_fails_late_leaves_what_was_active(monkeypatch) -> None:
    net = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))
    randomise(attached(net))
    before, on = Snapshot.of(net), net(torch.ones(24))

    activate, left = Slot.activate, [1]

    def fail_at_the_second(slot, scales) -> None:
        left[0] -= 1
        activate(slot, scales)
        if left[0] < 0 and "other" in scales:
            raise RuntimeError("late")

    monkeypatch.setattr(Slot, "activate", fail_at_the_second)
    with pytest.raises(RuntimeError, match="late"):
        attached(net, "other")
    before.assert_restored(net)
    assert list(pc.adapters(net)) == ["default"] and torch.equal(net(torch.ones(24)), on)


def test_an_average_of_weights_follows_the_adapter() -> None:
    net = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))
    adapter = attached(net)
    average = AveragedModel(net, use_buffers=True)
    values = []
    for _ in range(3):
        randomise(adapter)
        average.update_parameters(net)
        values.append({key: p.detach().clone() for key, p in adapter.named_parameters()})
    held = dict(pc.adapters(average.module)["default"].named_parameters())
    for key, value in held.items():
        torch.testing.assert_close(value, sum(v[key] for v in values) / 3)
    torch.testing.assert_close(average.module[0].weight, net[0].weight)


def test_a_head_resized_after_attaching_is_not_saved(tmp_path, llama, refused) -> None:
    adapter = attached(llama, targets=["q_proj"], train_modules=["lm_head"])
    llama.resize_token_embeddings(llama.config.vocab_size + 3)
    with refused(pc.CheckpointError, "'lm_head.weight'", "resize first"):
        adapter.save(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_embeddings_resized_after_attaching(tmp_path, llama) -> None:
    adapter = randomise(attached(llama, targets=["q_proj"]))
    llama.resize_token_embeddings(llama.config.vocab_size + 3)
    adapter.save(tmp_path)
    ids = torch.arange(4)[None]
    expected = llama(ids).logits
    adapter.detach()
    pc.load(copy.deepcopy(llama), tmp_path)
    pc.load(llama, tmp_path)
    torch.testing.assert_close(llama(ids).logits, expected)


def test_forward_mode_differentiation() -> None:
    net = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))
    randomise(attached(net))
    x, along = torch.randn(2, 24), torch.randn(2, 24)
    with torch.autograd.forward_ad.dual_level():
        found = torch.autograd.forward_ad.unpack_dual(net(torch.autograd.forward_ad.make_dual(x, along))).tangent
    with pc.kernels("naive"):
        _, expected = torch.autograd.functional.jvp(net, x, along)
    assert_near(found, expected, 1e-5, "directional derivative")


class Locked(nn.Sequential):
    """Says itself what of it is copied and pickled."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.lock = threading.Lock()

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "lock"}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.lock = threading.Lock()


class Remade(nn.Sequential):
    """Is made anew by its own constructor."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, width))
        self.width = width

    def __reduce__(self) -> tuple:
        return type(self), (self.width,), self.__dict__


class Compiled(nn.Sequential):
    """Compiled in place."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.compile(backend="eager")


class Recurrent(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(24, 24), nn.LSTM(24, 4))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"])
@pytest.mark.parametrize("kind", [Locked, Remade, Compiled, Recurrent])
def test_a_module_is_copied_as_its_class_says(kind, copied) -> None:
    net = {Remade: lambda: Remade(24), Recurrent: Recurrent}.get(kind, lambda: kind(nn.Linear(24, 24)))()
    adapter = randomise(attached(net, train_modules=["1"] if kind is Recurrent else []))
    other, x = copied(net), torch.randn(3, 24)
    assert type(other) is type(net)
    expected = net(x)
    torch.testing.assert_close(other(x), expected)
    randomise(adapter, seed=1)
    torch.testing.assert_close(other(x), expected)
    pc.adapters(other)["default"].detach()
    assert type(other) is kind
