"""torch.compile with the backend that users get. (The conformance suite uses a quicker one.)"""

import torch

import peft_core as pc
from peft_core.testing.checks import assert_near, gradients, randomise, weighted
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
