"""torch.compile with the backend that users get. (The conformance suite uses a quicker one.)"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call, grad
from torch.utils.checkpoint import checkpoint

import peft_core as pc
from peft_core.slots import SLOT
from peft_core.testing.checks import assert_near, gradients, randomise, run, trials, weighted
from peft_core.testing.families import FAMILIES


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_inductor_agrees_in_forward_and_gradients(blocks, spec) -> None:
    family = FAMILIES["odd"]
    adapter = randomise(pc.attach(blocks, spec))
    expected = family.forward(blocks, family.inputs())
    reference = gradients(adapter, weighted(expected))
    compiled = torch.compile(blocks, fullgraph=True)
    found = family.forward(compiled, family.inputs())
    assert_near(found, expected, 1e-5, "output")
    for key, gradient in gradients(adapter, weighted(found)).items():
        assert_near(gradient, reference[key], 1e-5, f"gradient of '{key}'")


def test_what_is_compiled_first_in_a_thread_is_not_compiled_again(blocks, spec) -> None:
    family, counter = FAMILIES["odd"], CompileCounter()
    randomise(pc.attach(blocks, spec))
    compiled = torch.compile(blocks, fullgraph=True, backend=counter)

    def work() -> None:
        with torch.no_grad():
            for _ in range(2):
                assert_near(family.forward(compiled, family.inputs()), run(family, blocks), 1e-5, "output")

    with ThreadPoolExecutor(1) as fresh:
        fresh.submit(work).result()
    assert counter.frame_count == 1


@pytest.fixture
def trained(blocks) -> pc.Adapter:
    """Fixed tensors, tensors of its own, and a module trained in full, on `blocks`."""
    spec = pc.AdapterSpec(method="sound", targets=["up"], train_modules=["1.down"])
    return randomise(pc.attach(blocks, spec))


def _call(model: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return FAMILIES["odd"].forward(model, FAMILIES["odd"].inputs(seed, dtype))


def test_compiled_code_sees_tensors_that_take_the_place_of_others(blocks, trained) -> None:
    compiled = torch.compile(blocks, fullgraph=True, backend="aot_eager")
    _call(compiled)
    blocks.load_state_dict({key: 1.5 * value for key, value in blocks.state_dict().items()}, assign=True)
    found = _call(compiled)
    assert_near(found, _call(blocks), 1e-5, "output after assign=True")
    blocks.double()
    slot = blocks.get_submodule("0.up").__dict__[SLOT]
    assert all(
        tensor.dtype == torch.float64 for tensor in slot.uses()[0].binding.values() if tensor.is_floating_point()
    )
    assert_near(_call(compiled, dtype=torch.float64), _call(blocks, dtype=torch.float64), 1e-10, "output in double")


def test_compiled_code_keeps_to_the_model_s_own_tensors_after_a_functional_call(blocks, trained) -> None:
    compiled, expected = torch.compile(blocks, fullgraph=True, backend="aot_eager"), _call(blocks)
    functional_call(blocks, {name: 1.5 * p for name, p in blocks.named_parameters()}, (), FAMILIES["odd"].inputs())
    assert_near(_call(compiled), expected, 1e-5, "output")


def test_a_functional_call_can_be_compiled(blocks, trained) -> None:
    def loss(given: dict[str, Tensor]) -> Tensor:
        return functional_call(blocks, given, (), inputs).square().sum()

    inputs = FAMILIES["odd"].inputs()
    given = {name: 1.5 * p.detach() for name, p in blocks.named_parameters()}
    expected = grad(loss)(given)
    for name, found in torch.compile(grad(loss), fullgraph=True, backend="aot_eager")(given).items():
        assert_near(found, expected[name], 1e-5, f"gradient of '{name}'")
    assert all(expected[name].any() for name in given if "/" in name)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_computes_with_the_adapter_s_parameters(blocks, trained, strict) -> None:
    expected = _call(blocks)
    program = torch.export.export(blocks, (), FAMILIES["odd"].inputs(), strict=strict)
    exported = program.module()
    assert_near(_call(exported), expected, 1e-5, "output")
    names = [name for name, _ in blocks.named_parameters() if "/" in name]
    gradients = torch.autograd.grad(weighted(_call(exported)), [exported.get_parameter(name) for name in names])
    assert all(gradient.any() for gradient in gradients)
    assert_near(_call(blocks), expected, 0, "output of the model afterwards")


def _weight_of(layer: nn.Linear) -> Tensor:
    return layer.weight


@pytest.mark.parametrize("trial", {trial.method: trial for trial in trials([])}.values(), ids=str)
def test_checkpointed_layers_compile_with_sizes_and_numbers_that_change(trial) -> None:
    """Within a checkpoint, torch cannot make a symbol of a number that another checkpoint has made one of."""
    model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))
    randomise(pc.attach(model, pc.AdapterSpec(method=trial.method, options=dict(trial.options), targets=["0", "1"])))

    def forward(x: Tensor) -> Tensor:
        for layer in model:
            x = checkpoint(layer, x, use_reentrant=False)
        return x

    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found = torch.compile(forward, fullgraph=True, dynamic=True, backend="aot_eager")(x)
    assert_near(found, forward(x), 1e-5, "output")


class _Reader(nn.Module):
    """Reads the weight of one of its layers, in a way that no plan notices."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(24, 24), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.up(x), _weight_of(self.head))


@pytest.mark.parametrize("first", ["compiled", "attached"])
@pytest.mark.parametrize("how", ["torch.compile", "nn.Module.compile", "around it"])
def test_a_compiled_model_follows_what_comes_and_goes(how, first) -> None:
    def compile_() -> nn.Module:
        if how == "nn.Module.compile":
            model.compile(backend="aot_eager")
            return model
        return torch.compile(nn.Sequential(model) if how == "around it" else model, backend="aot_eager")

    def check() -> None:
        with torch.compiler.set_stance("force_eager"):
            expected = model(x)
        assert_near(compiled(x), expected, 1e-5, "output")

    model, x = _Reader(), torch.randn(2, 24, generator=torch.Generator().manual_seed(0))
    if first == "compiled":
        compiled = compile_()
        check()
    base = model(x)
    adapter = randomise(pc.attach(model, pc.AdapterSpec(method="sound", targets=["up"], train_modules=["head"])))
    if first == "attached":
        compiled = compile_()
    check()
    with adapter.disabled():
        check()
        assert_near(compiled(x), base, 1e-5, "output when disabled")
    adapted = compiled(x)
    adapter.merge_and_detach()
    check()
    assert_near(compiled(x), adapted, 1e-5, "output when merged")


def test_attaching_to_a_compiled_model_attaches_to_the_model_inside(blocks, spec) -> None:
    family = FAMILIES["odd"]
    compiled = torch.compile(blocks, backend="eager")
    adapter = pc.attach(compiled, spec)
    assert adapter.model is blocks and adapter.plan.sites[0].path == "0.up"
    assert pc.adapters(compiled).keys() == pc.adapters(blocks).keys() == {"default"}
    randomise(adapter)
    torch.testing.assert_close(family.forward(compiled, family.inputs()), run(family, blocks))


@pytest.mark.parametrize("wrapper", [torch.nn.DataParallel, torch.compile])
def test_a_model_that_is_wrapped_for_parallel_training_is_refused(blocks, spec, wrapper, refused) -> None:
    inner = torch.nn.DataParallel(blocks)
    wrapped = inner if wrapper is torch.nn.DataParallel else torch.compile(inner, backend="eager")
    for put in (lambda: pc.attach(wrapped, spec), lambda: pc.load(wrapped, "adapter")):
        with refused(pc.AdapterError, "DataParallel", "then wrap"):
            put()
    assert not pc.adapters(blocks) and len(pc.plan(wrapped, spec).sites) == len(pc.plan(blocks, spec).sites)


def test_what_is_no_model_is_refused(spec, refused) -> None:
    with refused(pc.AdapterError, "'path/to/model'", "loaded model"):
        pc.attach("path/to/model", spec)
