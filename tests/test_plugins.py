"""Finding methods: one provider per name, hooks that are known, answers from the method that was asked."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from pydantic import Field

import peft_core as pc
from peft_core import AdapterSpec, plugins
from peft_core.testing.checks import Snapshot
from peft_core.testing.methods import Options, Sound


def plugin(method: str, **overrides) -> object:
    """A sound method of another name; `overrides` replace hooks (None takes one away)."""
    kept = {name: hook for name, hook in vars(Sound).items() if name.startswith("peft_")}
    bare = type(
        "Bare",
        (),
        {name: value for name, value in vars(Sound).items() if name not in kept and name[:2] != "__"},
    )
    hooks = {name: hook for name, hook in {**kept, **overrides}.items() if hook is not None}
    return type(method.capitalize(), (bare,), {"name": method, **hooks})()


@contextmanager
def registered(made: object, name: str) -> Iterator[None]:
    plugins.register(made, name)
    try:
        yield
    finally:
        plugins.unregister(name)


def test_registered_method_works_and_goes(blocks, refused) -> None:
    with registered(plugin("other"), "other"):
        assert pc.methods()["other"].name == "other"
        assert pc.plan(blocks, AdapterSpec(method="other")).num_trainable
    assert "other" not in pc.methods()
    with refused(pc.PluginError, "'other'", "pip install peft-method-other", "installed:"):
        AdapterSpec(method="other")


def test_two_plugins_of_one_name_are_refused(refused) -> None:
    with refused(pc.PluginError, "'sound'"):
        plugins.register(plugin("other"), "sound")
    assert "other" not in pc.methods()


def test_two_providers_of_one_method_are_refused_and_named(refused) -> None:
    with refused(pc.PluginError, "'sound'", "twice", "'second'", "uninstall one"):
        plugins.register(plugin("sound"), "second")
    assert pc.methods()["sound"]
    with registered(plugin("other"), "second"):
        pass


def test_unknown_hook_is_refused_by_name(refused) -> None:
    @pc.hookimpl
    def peft_innit(self, sites):
        return None

    with refused(pc.PluginError, "peft_innit"):
        plugins.register(plugin("other", peft_innit=peft_innit), "other")
    assert "other" not in pc.methods()


def test_unknown_argument_of_a_hook_is_refused(refused) -> None:
    @pc.hookimpl
    def peft_init(self, sites, weights):
        return None

    with pytest.raises(pc.PluginError, match="weights"):
        plugins.register(plugin("other", peft_init=peft_init), "other")
    assert "other" not in pc.methods()


@pytest.mark.parametrize("hook", ["peft_init", "peft_forward", "peft_merge"])
def test_missing_hook_is_refused_by_name(hook, refused) -> None:
    with refused(pc.PluginError, "'other'", hook):
        plugins.register(plugin("other", **{hook: None}), "other")


@pytest.mark.parametrize(
    "capability, hook",
    [
        ("lowrank", "peft_lowrank"),
        ("owns_base_weight", "peft_attach"),
        ("optimizer_step", "peft_optimizer_step"),
    ],
)
def test_capability_without_its_hook_is_refused(capability, hook, refused) -> None:
    @pc.hookimpl
    def peft_method(self):
        return pc.MethodInfo("other", Options, pc.Capabilities(**{capability: True}))

    with refused(pc.PluginError, "'other'", hook):
        plugins.register(plugin("other", peft_method=peft_method, peft_lowrank=None), "other")


@pytest.mark.parametrize("answer", [None, 3, "sound"])
def test_method_description_of_another_type_is_refused(answer, refused) -> None:
    @pc.hookimpl
    def peft_method(self):
        return answer

    with refused(pc.PluginError, "'other'", "MethodInfo"):
        plugins.register(plugin("other", peft_method=peft_method), "other")
    assert "other" not in pc.methods()


@pytest.mark.parametrize("hook", ["peft_init", "peft_forward", "peft_merge"])
def test_hook_that_returns_nothing_is_named(blocks, hook, refused) -> None:
    arguments = {"peft_init": ("sites",), "peft_forward": ("site",), "peft_merge": ("site", "weight")}[hook]
    scope: dict = {}
    exec(f"def {hook}(self, {', '.join(arguments)}): pass", scope)
    broken = plugin("other", **{hook: pc.hookimpl(scope[hook])})
    with registered(broken, "other"), refused(pc.PluginError, "'other'", hook):
        pc.attach(blocks, AdapterSpec(method="other")).merge()


def test_wrapper_sees_every_call_of_every_method_and_changes_nothing(blocks, spec) -> None:
    calls: list[str] = []

    class Tracer:
        @pc.hookimpl(wrapper=True)
        def peft_init(self, sites):
            calls.append("init")
            return (yield)

        @pc.hookimpl(wrapper=True)
        def peft_forward(self, site):
            calls.append(f"forward {site.path}")
            return (yield)

        @pc.hookimpl(wrapper=True)
        def peft_merge(self, site):
            calls.append(f"merge {site.path}")
            return (yield)

    plain = pc.plan(blocks, spec)
    with registered(Tracer(), "tracer"):
        adapter = pc.attach(blocks, spec)
        paths = [site.path for site in adapter.plan.sites]
        assert calls == ["init", *(f"forward {path}" for path in paths)]
        blocks(torch.randn(2, 63))
        assert len(calls) == 1 + len(paths), "a hook was called in forward"
        calls.clear()
        adapter.merge()
        assert calls == [f"merge {path}" for path in paths]
        assert adapter.plan == plain
        adapter.unmerge()
        adapter.detach()
    assert "tracer" not in pc.methods()


def test_observer_must_say_that_it_observes(refused) -> None:
    class Intruder:
        @pc.hookimpl
        def peft_init(self, sites):
            return pc.Layout(())

    with refused(pc.PluginError, "'intruder'", "peft_init", "wrapper=True"):
        plugins.register(Intruder(), "intruder")


def test_a_plugin_registered_later_does_not_answer_for_another(blocks, spec) -> None:
    expected = pc.plan(blocks, spec)
    adapter = pc.attach(blocks, spec)
    asked: list[str] = []

    def answering(hook: str):
        original = vars(Sound)[hook]

        def wrong(self, **arguments):
            asked.append(hook)
            return original(self, **arguments)

        return wrong

    @pc.hookimpl
    def peft_init(self, sites):
        return answering("peft_init")(self, sites=sites)

    @pc.hookimpl
    def peft_merge(self, site, weight, tensors, binding):
        return answering("peft_merge")(self, site=site, weight=weight, tensors=tensors, binding=binding)

    with registered(plugin("later", peft_init=peft_init, peft_merge=peft_merge), "later"):
        assert pc.plan(blocks, spec) == expected
        adapter.merge()
        adapter.unmerge()
        assert asked == []
        pc.plan(blocks, AdapterSpec(method="later"))
        assert asked == ["peft_init"]


def test_weights_are_computed_from_widened_tensors(blocks) -> None:
    """What a method multiplies there would be rounded to the 16 bits of its parameters."""
    seen: dict[str, set] = {"peft_merge": set(), "peft_lowrank": set()}

    class Noting(Sound):
        name = "noting"

        @pc.hookimpl
        def peft_merge(self, site, weight, tensors, binding):
            seen["peft_merge"] |= {tensor.dtype for tensor in (*tensors.values(), *binding.values())}
            return super().peft_merge(site, weight, tensors, binding)

        @pc.hookimpl
        def peft_lowrank(self, site, tensors, binding):
            seen["peft_lowrank"] |= {tensor.dtype for tensor in (*tensors.values(), *binding.values())}
            return super().peft_lowrank(site, tensors, binding)

    with registered(Noting(), "noting"):
        adapter = pc.attach(blocks, AdapterSpec(method="noting", dtype="bfloat16"))
        adapter.merge()
        for site in adapter.plan.sites:
            tensors, binding = adapter.bank.tensors(site.path), adapter.bank.binding(site.path)
            plugins.call("noting", "peft_lowrank", site=site, tensors=tensors, binding=binding)
    assert seen["peft_merge"] == seen["peft_lowrank"] == {torch.float32, torch.int64}


def _distribution(site, name: str, module: str, source: str, entry: str) -> None:
    """An installed distribution, as far as importlib.metadata can tell."""
    info = site / f"{name.replace('-', '_')}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[peft_core.plugins]\n{entry} = {module}\n")
    (site / f"{module}.py").write_text(source)


METHOD = """
import peft_core as pc
from peft_core.testing.methods import Sound
class Found(Sound):
    name = "found"
_found = Found()
for _hook in ("peft_method", "peft_init", "peft_forward", "peft_merge", "peft_lowrank"):
    globals()[_hook] = getattr(_found, _hook)
"""


def test_installed_plugin_is_found_with_its_distribution(tmp_path, monkeypatch) -> None:
    _distribution(tmp_path, "peft-method-found", "found_plugin", METHOD, "found")
    monkeypatch.syspath_prepend(tmp_path)
    (info,) = [i for i, _ in plugins._methods(plugins.manager.__wrapped__()).values() if i.name == "found"]
    assert (info.distribution, info.version) == ("peft-method-found", "1.2")


@pytest.mark.parametrize(
    "source, words",
    [
        ("import nothing_of_this_name", ["cannot be imported", "nothing_of_this_name"]),
        ("raise RuntimeError('broken')", ["cannot be imported", "broken"]),
        ("import peft_core as pc\n@pc.hookimpl\ndef peft_nonsense(): pass", ["peft_nonsense"]),
        (
            "import peft_core as pc\n@pc.hookimpl\ndef peft_init(sites): pass",
            ["peft_init", "registers no method"],
        ),
    ],
)
def test_broken_installed_plugin_is_named(source, words, tmp_path, monkeypatch, refused) -> None:
    module = f"broken_plugin_{abs(hash(source))}"
    _distribution(tmp_path, "peft-method-broken", module, source, "broken")
    monkeypatch.syspath_prepend(tmp_path)
    with refused(pc.PluginError, "broken", *words):
        plugins.manager.__wrapped__()


def test_two_distributions_with_one_method_are_named(tmp_path, monkeypatch, refused) -> None:
    _distribution(tmp_path, "peft-method-found", "found_plugin", METHOD, "found")
    _distribution(tmp_path, "peft-method-again", "again_plugin", METHOD, "again")
    monkeypatch.syspath_prepend(tmp_path)
    with refused(pc.PluginError, "'found'", "twice", "peft-method-found 1.2", "peft-method-again 1.2", "uninstall"):
        plugins.manager.__wrapped__()


def test_two_distributions_with_one_plugin_name_are_named(tmp_path, monkeypatch, refused) -> None:
    _distribution(tmp_path, "peft-method-found", "found_plugin", METHOD, "found")
    _distribution(tmp_path, "peft-method-again", "again_plugin", METHOD, "found")
    monkeypatch.syspath_prepend(tmp_path)
    with refused(pc.PluginError, "'found'", "another installed distribution", "uninstall"):
        plugins.manager.__wrapped__()


def _described(**fields):
    @pc.hookimpl
    def peft_method(self):
        return pc.MethodInfo(**{"name": "other", "options": Options, **fields})

    return peft_method


class _Refusing(Options):
    r: int = Field(default=0, ge=1)


@pytest.mark.parametrize("capabilities", [pc.Capabilities(), lambda options: pc.Capabilities()])
@pytest.mark.parametrize(
    "hook, capability", [("peft_attach", "owns_base_weight"), ("peft_optimizer_step", "optimizer_step")]
)
def test_hook_that_would_never_be_called_is_refused(hook, capability, capabilities, refused) -> None:
    @pc.hookimpl
    def implemented(self): ...

    implemented.__name__ = hook
    with refused(pc.PluginError, "'other'", hook, f"{capability}=True"):
        plugins.register(plugin("other", peft_method=_described(capabilities=capabilities), **{hook: implemented}), "o")
    assert "other" not in pc.methods()


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"capabilities": {"lowrank": True}}, ["capabilities", "{'lowrank': True}"]),
        ({"capabilities": lambda options: None}, ["capabilities", "None"]),
        ({"options": _Refusing}, ["default", "'r'"]),
        ({"trials": ()}, ["trials", "()"]),
        ({"trials": {"r": 4}}, ["trials", "{'r': 4}"]),
        ({"trials": ({"rank": 4},)}, ["trial", "{'rank': 4}", "'rank'"]),
    ],
)
def test_description_that_cannot_be_meant_is_refused(fields, words, refused) -> None:
    with refused(pc.PluginError, "'other'", *words):
        plugins.register(plugin("other", peft_method=_described(**fields)), "other")
    assert "other" not in pc.methods()


def test_description_that_raises_is_named(refused) -> None:
    @pc.hookimpl
    def peft_method(self):
        raise ValueError("oops")

    with refused(pc.PluginError, "'other'", "peft_method", "oops"):
        plugins.register(plugin("other", peft_method=peft_method), "other")


@pytest.mark.parametrize("hook, wanted", [("peft_forward", "Forward"), ("peft_merge", "Tensor")])
def test_hook_that_returns_another_type_is_named_with_the_site(blocks, hook, wanted, refused) -> None:
    @pc.hookimpl
    def answer(self, site):
        return lambda x: x

    path = pc.plan(blocks, AdapterSpec(method="sound")).sites[0].path
    with (
        registered(plugin("other", **{hook: answer}), "other"),
        refused(pc.PluginError, "'other'", f"'{path}'", hook, wanted),
    ):
        pc.attach(blocks, AdapterSpec(method="other")).merge()


@pytest.mark.parametrize("delta", [None, torch.zeros(1), torch.zeros(2, 1)])
def test_naive_of_another_shape_is_named_with_the_site(blocks, delta, refused) -> None:
    @pc.hookimpl
    def peft_forward(self, site):
        return pc.Forward(lambda x, tensors, binding: delta)

    with registered(plugin("other", peft_forward=peft_forward), "other"):
        adapter = pc.attach(blocks, AdapterSpec(method="other"))
        with refused(pc.PluginError, "'other'", f"'{adapter.plan.sites[0].path}'", "naive", "[2, "):
            blocks(torch.randn(2, 63))


def test_options_that_are_not_printed_tell_layouts_apart_too(blocks) -> None:
    class Silent(Options):
        gain: float = Field(default=1.0, repr=False)

    @pc.hookimpl
    def peft_forward(self, site):
        return pc.Forward(lambda x, tensors, binding: x.new_full((*x.shape[:-1], site.out_features), site.options.gain))

    with registered(plugin("other", peft_method=_described(options=Silent), peft_forward=peft_forward), "other"):
        for gain in (1.0, 5.0):
            pc.attach(blocks, AdapterSpec(method="other", options={"gain": gain}), name=f"gain-{gain:.0f}")
        first = pc.plan(blocks, AdapterSpec(method="other")).sites[0]
        layer, x = blocks.get_submodule(first.path), torch.randn(2, first.in_features)
        outputs = {}
        for name in ("gain-1", "gain-5"):
            pc.activate(blocks, name)
            outputs[name] = layer(x)
        torch.testing.assert_close(outputs["gain-5"] - outputs["gain-1"], torch.full_like(outputs["gain-1"], 4.0))


def test_a_method_that_reads_the_base_weight_finds_the_one_that_is_used(refused) -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    class Same(torch.nn.Linear):
        def forward(self, input):
            return super().forward(input)

    reading = _described(capabilities=pc.Capabilities(additive=False, lowrank=False))
    with registered(plugin("other", peft_method=reading, peft_lowrank=None), "other"):
        model = torch.nn.Sequential(Same(8, 8), Doubled(8, 8))
        with refused(pc.AdapterError, "'1' is a Doubled", "'other' computes with W", "exclude"):
            pc.attach(model, AdapterSpec(method="other"))
        assert not pc.adapters(model)
        assert pc.attach(model, AdapterSpec(method="other", exclude=["1"])).active


def test_owned_weight_of_another_shape_is_refused(blocks, refused) -> None:
    before = Snapshot.of(blocks)

    @pc.hookimpl
    def peft_attach(self, weight):
        return weight[:1]

    owning = _described(capabilities=pc.Capabilities(owns_base_weight=True))
    with (
        registered(plugin("other", peft_method=owning, peft_attach=peft_attach), "other"),
        refused(pc.PluginError, "'other'", "peft_attach", "out × in"),
    ):
        pc.attach(blocks, AdapterSpec(method="other"))
    before.assert_restored(blocks)


def test_merging_into_the_weight_that_was_lent_is_refused(blocks, refused) -> None:
    @pc.hookimpl
    def peft_merge(self, weight):
        return weight.add_(1.0)

    with registered(plugin("other", peft_merge=peft_merge), "other"):
        adapter = pc.attach(blocks, AdapterSpec(method="other"))
        with refused(pc.PluginError, "'other'", "peft_merge", "in place", f"'{adapter.plan.sites[0].path}'"):
            adapter.merge()
        assert not adapter.merged


def _transposed_in_place(weight: torch.Tensor) -> torch.Tensor:
    return weight.mul_(2.0).T


def test_first_values_are_contiguous_and_leave_the_base_alone(blocks) -> None:
    @pc.hookimpl
    def peft_init(self, sites):
        start = {s: pc.FromWeight(s.path, _transposed_in_place) for s in sites}
        tensors = {s: {"T": pc.TensorSpec((s.in_features, s.out_features), start[s])} for s in sites}
        return pc.Layout(tuple(pc.SharingGroup.private(s, tensors[s]) for s in sites))

    before = Snapshot.of(blocks)
    with registered(plugin("other", peft_init=peft_init), "other"):
        adapter = pc.attach(blocks, AdapterSpec(method="other"))
        assert all(parameter.is_contiguous() for parameter in adapter.parameters())
        before.assert_same_values(blocks)
