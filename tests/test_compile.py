"""torch.compile with the backend that users get. (The conformance suite uses a quicker one.)"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import peft_core as pc
from peft_core.testing.checks import assert_near, gradients, randomise, run, weighted
from peft_core.testing.families import FAMILIES


def test_inductor_agrees_in_forward_and_gradients(blocks, spec) -> None:
    family = FAMILIES["odd"]
    adapter = randomise(pc.attach(blocks, spec))
    expected = family.forward(blocks, family.inputs())
    reference = gradients(adapter, weighted(expected))
    torch._dynamo.reset()
    compiled = torch.compile(blocks, fullgraph=True)
    found = family.forward(compiled, family.inputs())
    assert_near(found, expected, 1e-5, "output")
    for key, gradient in gradients(adapter, weighted(found)).items():
        assert_near(gradient, reference[key], 1e-5, f"gradient of '{key}'")
    torch._dynamo.reset()


def test_what_is_compiled_first_in_a_thread_is_not_compiled_again(blocks, spec) -> None:
    family, counter = FAMILIES["odd"], CompileCounter()
    randomise(pc.attach(blocks, spec))
    torch._dynamo.reset()
    compiled = torch.compile(blocks, fullgraph=True, backend=counter)

    def work() -> None:
        with torch.no_grad():
            for _ in range(2):
                assert_near(family.forward(compiled, family.inputs()), run(family, blocks), 1e-5, "output")

    with ThreadPoolExecutor(1) as fresh:
        fresh.submit(work).result()
    torch._dynamo.reset()
    assert counter.frame_count == 1


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
