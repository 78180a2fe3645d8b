"""Generating with an adapter of every installed method and of the field's PEFT library, against the base, on SmolLM2-135M.

    tox run -e bench -- generate.py [--rounds 9] [--tokens 24] [--only miss,lora] [--cpu-time]

One sequence, greedily, with a cache: a token at a time, where what a layer costs besides its weights is seen best. The runs
take turns in one process, on one copy of the base's weights (bfloat16 where the processor has instructions for it); the figures
are medians of the per-round ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Collection

import torch
from figures import Figure, show
from runs import FLOOR, in_turn, median_ratio
from torch import nn
from train_step import JUDGED, base_model, makers

from peft_core.dtypes import name_of
from peft_core.models import fast_dtype

PROMPT = 16


def generate(model: nn.Module, tokens: int) -> None:
    """Make so many tokens."""
    ids = torch.arange(PROMPT)[None]
    model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )


def measure(
    labels: Collection[str], rounds: int, tokens: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Label → seconds of a token against the floor's; the floor's own in seconds."""
    made = makers(base_model(fast_dtype()))
    models = {label: made[label]().model.eval() for label in made if label in labels}
    seconds: dict[str, list[float]] = {label: [] for label in models}
    for model in models.values():
        generate(model, 2)
    for number in range(rounds):
        for label in in_turn(models, number):
            start = clock()
            generate(models[label], tokens)
            seconds[label].append(clock() - start)
    floor = seconds.pop(FLOOR)
    ratios = {label: median_ratio(own, floor) for label, own in seconds.items()}
    return {FLOOR: statistics.median(floor) / tokens, **ratios}


def short() -> list[Figure]:
    """Three rounds of twelve tokens."""
    warnings.filterwarnings("ignore")
    found = measure(JUDGED, rounds=3, tokens=12)
    return [Figure(f"a generated token, {label}", ratio) for label, ratio in found.items() if label != FLOOR]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="rounds in which every run generates (9)")
    parser.add_argument("--tokens", type=int, default=24, help="tokens of each (24)")
    parser.add_argument("--only", default="", help="labels of the runs beside the floor, separated by commas")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, its processor time: beside other work")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    if given.cpu_time:
        torch.set_num_threads(1)
    labels = {FLOOR, *given.only.split(",")} if given.only else JUDGED
    found = measure(labels, given.rounds, given.tokens, time.process_time if given.cpu_time else time.perf_counter)
    floor = found.pop(FLOOR)
    print(
        f"SmolLM2-135M {name_of(fast_dtype())}, {given.tokens} tokens, {torch.get_num_threads()} threads; "
        f"base: {1e3 * floor:.1f} ms a token"
    )
    show("A generated token", [Figure(label, ratio) for label, ratio in found.items()])


if __name__ == "__main__":
    main()
