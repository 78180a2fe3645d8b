"""torch.compile: no graph break, the same numbers, one compilation for all adapters of a layout."""

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import peft_core as pc

from .checks import Trial, adapted, assert_near, gradients, randomise, run, weighted
from .families import Family

ADAPTERS = 10


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.families("odd")
def test_compiled_model_agrees_in_forward_and_gradients(trial: Trial, family: Family) -> None:
    model, adapter = adapted(family, trial)
    expected = family.forward(model, family.inputs())
    reference = gradients(adapter, weighted(expected))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = family.forward(compiled, family.inputs())  # type: ignore[arg-type]
    assert_near(found, expected, 1e-5, "output")
    for key, gradient in gradients(adapter, weighted(found)).items():
        assert_near(gradient, reference[key], 1e-5, f"gradient of '{key}'")
    randomise(adapter, seed=1)
    assert_near(
        family.forward(compiled, family.inputs()),  # type: ignore[arg-type]
        family.forward(model, family.inputs()),
        1e-5,
        "output after the tensors changed",
    )


@pytest.mark.methods(owns_base_weight=False)
@pytest.mark.families("odd")
def test_switching_adapters_of_one_layout_compiles_once(trial: Trial, family: Family) -> None:
    model = family.build()
    names = [f"adapter{number}" for number in range(ADAPTERS)]
    for number, name in enumerate(names):
        randomise(pc.attach(model, trial.spec(family), name=name, seed=number), seed=number)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for name in [*names, *reversed(names)]:
            pc.activate(model, name)
            found = family.forward(compiled, family.inputs())  # type: ignore[arg-type]
            assert_near(found, run(family, model), 1e-5, f"output with '{name}'")
    assert counter.frame_count == 1, f"{counter.frame_count} compilations for {ADAPTERS} adapters of one layout"
