"""What is particular to this method. Everything else is `pytest --pyargs peft_core.testing --method vera`."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

import peft_core as pc

SPEC = pc.AdapterSpec(method="vera", options={"r": 8, "d_initial": 0.5})


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            [nn.ModuleDict({"up": nn.Linear(63, 60), "down": nn.Linear(60, 63)}) for _ in range(3)]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer["down"](layer["up"](x).tanh())
        return x


def test_output_is_the_papers_formula() -> None:
    model, x = Blocks(), torch.randn(5, 63)
    layer = model.layers[1]["up"]
    plain = layer(x)
    adapter = pc.attach(model, SPEC, seed=0)
    held = dict(adapter.named_parameters())
    b, d = (held[f"layers.1.up.{name}"] for name in "bd")
    fixed = dict(model.named_buffers())
    A, B = (fixed[f"peft_core/default/pair/up/{name}"] for name in "AB")
    with torch.no_grad():
        assert torch.equal(layer(x), plain) and bool((d == 0.5).all())
        b.normal_()
        torch.testing.assert_close(layer(x), plain + (x @ A.T * d) @ B.T * b)


def test_a_16_bit_adapter_of_a_wider_base_computes_what_it_merges_to() -> None:
    model, x = nn.Sequential(nn.Linear(63, 60)), torch.randn(5, 63)
    adapter = pc.attach(model, SPEC.model_copy(update={"dtype": "bfloat16"}))
    with torch.no_grad():
        adapter.bank.parameter("0.b").normal_()
        y = model(x)
        adapter.merge()
        torch.testing.assert_close(model(x), y)


def test_the_pair_is_held_and_saved_once(tmp_path: Path) -> None:
    adapter = pc.attach(Blocks(), SPEC, seed=0)
    assert adapter.num_trainable == 3 * (8 + 60 + 8 + 63)
    adapter.save(tmp_path)
    saved = load_file(tmp_path / "adapter.safetensors")
    assert sorted(key for key in saved if key.startswith("pair")) == [
        "pair.down.A",
        "pair.down.B",
        "pair.up.A",
        "pair.up.B",
    ]
    assert len(saved) == 4 + 3 * 2 * 2
