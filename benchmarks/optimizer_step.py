"""What switching costs: a training step with the optimizer-step hook beside the same step without it.

    tox run -e bench -- optimizer_step.py [--hidden 768 --layers 2 --tokens 1024 --rank 128 --steps 20]

Steps with and without alternate in one process; the figures are medians of the ratios of neighbours. Also:
RowAdamW beside torch's AdamW, and the update of W beside one plain pass over it.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from figures import Figure
from runs import median_ratio

import peft_core as pc
from peft_core import optim
from peft_method_switchlora import RowAdamW, kernels
from peft_method_switchlora.optimizer import restart

DEFAULTS = {"hidden": 768, "layers": 2, "tokens": 1024, "rank": 128, "steps": 20}
HOOK_LIMIT = 1.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads; {vars(given)}")
    report("training step, with / without the hook", *training_steps(given, device), given.steps)
    report("RowAdamW after resets / torch's AdamW", *optimizers(given, device, None), given.steps)
    report("RowAdamW after resets / torch's AdamW, foreach", *optimizers(given, device, True), given.steps)
    report("switch_update_ of 8 vectors / one pass over W", *updates(given, device), 10 * given.steps)


def short() -> list[Figure]:
    """The hook in a training step, and the optimizer beside torch's."""
    given = argparse.Namespace(**{**DEFAULTS, "steps": 9})
    hook = report("training step, with / without the hook", *training_steps(given, "cpu"), given.steps)
    rows = report("RowAdamW after resets / torch's AdamW, foreach", *optimizers(given, "cpu", True), given.steps)
    return [
        Figure("SwitchLoRA's hook in a training step", hook, HOOK_LIMIT, "× without"),
        Figure("RowAdamW", rows, 1.1, "× torch's foreach AdamW"),
    ]


def report(title: str, first: Callable[[], object], second: Callable[[], object], rounds: int) -> float:
    """Print, and return, the median ratio of the two, measured in turn."""
    for _ in range(3):
        first(), second()
    own, floor = zip(*((timed(first), timed(second)) for _ in range(rounds)), strict=True)
    ratio = median_ratio(own, floor)
    print(f"{title}: {ratio:.3f} ({statistics.median(own) * 1e3:.2f} / {statistics.median(floor) * 1e3:.2f} ms)")
    return ratio


def timed(call: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def training_steps(given: argparse.Namespace, device: str) -> list[Callable[[], object]]:
    """A step of a Llama with SwitchLoRA on all its linear layers; the second one's adapter is not watched."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=given.hidden,
        intermediate_size=8 * given.hidden // 3,
        num_hidden_layers=given.layers,
        num_attention_heads=given.hidden // 64,
        vocab_size=4096,
    )
    original = transformers.LlamaForCausalLM(config).to(device)
    ids = torch.randint(0, 4096, (given.tokens // 256 or 1, min(given.tokens, 256)), device=device)
    options = {"r": given.rank, "total_steps": 10**6}  # the rate of the start, all the time

    def stepper(watched: bool) -> Callable[[], object]:
        model = copy.deepcopy(original)
        adapter = pc.attach(model, pc.AdapterSpec(method="switchlora", options=options))
        optimizer = RowAdamW(adapter.parameters(), lr=1e-3)
        if not watched:
            optim.forget(adapter.bank)

        def step() -> None:
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()

        return step

    return [stepper(True), stepper(False)]


def optimizers(given: argparse.Namespace, device: str, foreach: bool | None) -> list[Callable[[], object]]:
    """Steps on A and B of a dozen square layers."""
    shapes = 12 * [(given.rank, given.hidden), (given.hidden, given.rank)]
    made = []
    for kind in (RowAdamW, torch.optim.AdamW):
        parameters = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer = kind(parameters, foreach=foreach)
        optimizer.step()
        if isinstance(optimizer, RowAdamW):
            for index, parameter in enumerate(parameters):
                restart(optimizer, parameter, index % 2, torch.tensor([0, 1], device=device))
        made.append(optimizer.step)
    return made


def updates(given: argparse.Namespace, device: str) -> list[Callable[[], object]]:
    weight = torch.randn(8 * given.hidden // 3, given.hidden, device=device)
    columns = torch.randn(weight.shape[0], 8, device=device)
    rows = torch.randn(8, weight.shape[1], device=device)
    return [lambda: kernels.switch_update_(weight, columns, rows, 1e-6), lambda: weight.mul_(1.0)]


if __name__ == "__main__":
    main()
