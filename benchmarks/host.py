"""What an adapted layer costs the host beside its arithmetic: of every installed method, and of the field's PEFT library.

    tox run -e bench -- host.py [--layers 200] [--rounds 36]

Toy widths and four tokens in float32, on one thread: processor time of forward and backward above that of the frozen layers,
for each layer. On a GPU whose work is short this, with the launches, is what a step waits for.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import warnings
from typing import Any

import torch
from figures import Figure, show
from runs import FLOOR
from torch import nn
from train_step import OURS, THEIRS, R

import peft_core as pc

WIDTH, TOKENS = 64, 4


class Layer(nn.Module):
    """A layer with a name of its own, so that methods share between layers as in a model."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


def models(layers: int) -> dict[str, nn.Module]:
    """Label → a stack of layers, the frozen one first."""
    import peft

    def stack() -> nn.Module:
        return nn.Sequential(*(Layer() for _ in range(layers))).requires_grad_(False)

    made = {FLOOR: stack()}
    for label, method, options in OURS:
        if method in pc.methods():
            made[label] = stack()
            pc.attach(made[label], pc.AdapterSpec(method=method, options=options))
    for label, (kind, wide) in THEIRS.items():
        config: Any = getattr(peft, kind)(r=R, target_modules=["proj"])
        if wide:  # all is float32 here
            made[label] = peft.get_peft_model(stack(), config)  # type: ignore[arg-type]
    return made


def measure(layers: int, rounds: int) -> dict[str, float]:
    """Label → microseconds of a layer above the floor's: the median of rounds in which all take turns."""
    torch.set_num_threads(1)
    made = models(layers)
    x = torch.randn(1, TOKENS, WIDTH, requires_grad=True)
    seconds: dict[str, list[float]] = {label: [] for label in made}
    gc.disable()
    for index in range(rounds + 3):
        for label, model in made.items():
            start = time.process_time()
            model(x).sum().backward()
            if index >= 3:
                seconds[label].append(time.process_time() - start)
            for tensor in (x, *model.parameters()):
                tensor.grad = None
        gc.collect()
    floor = seconds.pop(FLOOR)
    above = {label: (a - b for a, b in zip(own, floor, strict=True)) for label, own in seconds.items()}
    return {label: 1e6 * statistics.median(found) / layers for label, found in above.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=200, help="layers of a model (200)")
    parser.add_argument("--rounds", type=int, default=36, help="rounds in which every model takes a step (36)")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    found = measure(given.layers, given.rounds)
    show("The host's part of a layer", [Figure(label, us, unit="µs") for label, us in found.items()])


if __name__ == "__main__":
    main()
