"""Switching: which vectors a step exchanges, the exchange, and freezing the vectors whose state it made stale."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

import peft_core as pc

from . import optimizer as optimizers
from .kernels import switch_update_
from .options import Options

DIMS = {"A": 0, "B": 1}
"""The dimension along which a factor's vectors lie (rows of A, columns of B), and its row in the state's tensors."""


class Choice(NamedTuple):
    """In one factor, the vectors at `places` make way for the candidates in `slots`."""

    places: list[int]
    slots: list[int]


@dataclass
class FactorExchange:
    """One factor's part in a site's exchange, of k vectors.

    Attributes:
        dim: see `DIMS`. parameter: the factor. candidates: [c, width], the vectors that wait for a place in it.
        places: of the vectors that leave. slots: of the candidates that arrive. home_slots: to which those that leave
            return. All are int64 [k] on the CPU.
        places_there, arriving: set by `fetch`: the places, and the vectors [k, width] to put there, on the parameter's
            device. leaving: set by `exchange_`: the vectors [k, width] that stood there.
    """

    dim: int
    parameter: Tensor
    candidates: Tensor
    places: Tensor
    slots: Tensor
    home_slots: Tensor
    places_there: Tensor = field(init=False)
    arriving: Tensor = field(init=False)
    leaving: Tensor = field(init=False)


@dataclass
class SiteExchange:
    """What a step exchanges at one site: equally many vectors of A and of B, at different places."""

    member: pc.StepMember
    in_A: FactorExchange
    in_B: FactorExchange


class FrozenVectors(NamedTuple):
    """Vectors of a parameter that an optimizer step must not move, and their values."""

    parameter: Tensor
    dim: int
    places: Tensor
    values: Tensor


@contextmanager
def switching(step: pc.OptimizerStep) -> Iterator[None]:
    """Around one optimizer step: exchange vectors before it, and put back the frozen ones after it.

    Raises:
        OptimizerStepError: the optimizer's state is not understood, or the length of the run is not known.
    """
    # Where a user has frozen a factor, nothing is exchanged.
    members = [m for m in step.members if m.state and all(tensor.requires_grad for tensor in m.tensors.values())]
    if members:
        optimizers.check(step.optimizer, [tensor for member in members for tensor in member.tensors.values()])
    lengths = {total_steps(step, member.site.options) for member in members}
    if (length := step.index - step.run_start) in lengths:
        warnings.warn(
            f"adapter '{step.adapter}': its run of {length} steps is over, and SwitchLoRA hardly switches any more; where "
            "another training begins, call adapter.begin_run(total_steps) before it",
            stacklevel=2,
        )
    for member in members:
        if not member.site.options.offload_candidates:
            move_candidates(member)
    with torch.no_grad():
        switch_(step, members)
        frozen = snapshot_frozen(members, step.index)
        for parameter, dim, places, _ in frozen:
            if parameter.grad is not None:
                parameter.grad.index_fill_(dim, places, 0)  # so their moments stay zero
    yield
    decays_through_moments = optimizers.decays_through_moments(step.optimizer)
    with torch.no_grad():
        for parameter, dim, places, values in frozen:
            parameter.index_copy_(dim, places, values)
            if decays_through_moments:
                optimizers.zero_moments(step.optimizer, parameter, dim, places)


def switch_(step: pc.OptimizerStep, members: Sequence[pc.StepMember]) -> None:
    """Decide and make this step's exchanges."""
    sites = [site for member in members if (site := choose(step, member)) is not None]
    exchanges = [exchange for site in sites for exchange in (site.in_A, site.in_B)]
    fetch(exchanges)
    for site in sites:
        member, options = site.member, site.member.site.options
        assert member.weight is not None  # the method owns it
        exchange_(member.weight, options.scale, site.in_A, site.in_B)
        member.weight_changed = True
        record_exchange_(member.state, site, step.index, options.freeze_steps)
        for switched, counterpart in ((site.in_A, site.in_B), (site.in_B, site.in_A)):
            optimizers.restart(
                step.optimizer, counterpart.parameter, counterpart.dim, switched.places_there, switched.places
            )
    return_candidates(exchanges)


def choose(step: pc.OptimizerStep, member: pc.StepMember) -> SiteExchange | None:
    """What a site exchanges at this step, if anything."""
    options: Options = member.site.options
    draws = random.Random(f"{step.seed}/{step.index}/{member.site.path}")
    in_A, in_B = decide(options, member.state, step.index, total_steps(step, options), draws, step.run_start)
    if not in_A.places:
        return None
    return SiteExchange(member, factor_exchange(member, "A", in_A), factor_exchange(member, "B", in_B))


def factor_exchange(member: pc.StepMember, name: str, choice: Choice) -> FactorExchange:
    """The choice as tensors, with all that it concerns."""
    places, slots = torch.tensor(choice, device="cpu")
    home_slots = member.state["slots"][DIMS[name]].index_select(0, places)
    candidates = member.state[f"candidates_{name}"]
    return FactorExchange(DIMS[name], member.tensors[name], candidates, places, slots, home_slots)


def decide(
    options: Options,
    state: Mapping[str, Tensor],
    step: int,
    total_steps: int,
    draws: random.Random,
    run_start: int = 0,
) -> tuple[Choice, Choice]:
    """What a site exchanges in A and in B at this step (from 0; its run from `run_start`): equally many, and never at the
    same place.

    Pure, and so the same on every rank.
    """
    r, c = options.r, state["candidates_A"].shape[0]
    expected = options.expected_switches(step - run_start, total_steps)
    count = int(expected) + (draws.random() < expected % 1)
    next_A, next_B = state["next"].tolist()
    count = min(count, (next_B - next_A) % r, (next_A - next_B) % r, c - r)
    if count:
        blocked = (state["frozen_until"] > step).any(0).tolist()
        count = min(_free_places(blocked, start, count) for start in (next_A, next_B))
    choices = []
    for start, used in zip((next_A, next_B), state["slots"].tolist(), strict=True):
        if options.order == "random":
            slots = draws.sample(sorted(set(range(c)).difference(used)), count)
        else:
            slots = [(used[start - 1] + 1 + k) % c for k in range(count)]
        choices.append(Choice([(start + k) % r for k in range(count)], slots))
    in_A, in_B = choices
    return in_A, in_B


def _free_places(blocked: Sequence[bool], start: int, most: int) -> int:
    """How many places in a row, going round from `start`, are not blocked: up to `most`."""
    return next((k for k in range(most) if blocked[(start + k) % len(blocked)]), most)


def fetch(exchanges: Sequence[FactorExchange]) -> None:
    """Bring places and arriving vectors to the parameters' devices."""
    places = on_devices([(exchange.places, exchange.parameter.device) for exchange in exchanges])
    slots = on_devices([(exchange.slots, exchange.candidates.device) for exchange in exchanges])
    arriving = on_devices(
        [
            (exchange.candidates.index_select(0, chosen).to(exchange.parameter.dtype), exchange.parameter.device)
            for exchange, chosen in zip(exchanges, slots, strict=True)
        ]
    )
    for exchange, places_there, vectors in zip(exchanges, places, arriving, strict=True):
        exchange.places_there, exchange.arriving = places_there, vectors


def exchange_(weight: Tensor, scale: float, in_A: FactorExchange, in_B: FactorExchange) -> None:
    """Put the arriving vectors in their places in A and B, and add to W [out, in] what keeps W + s·B·A the same, in one
    pass over W.
    """
    A, B = in_A.parameter, in_B.parameter  # [r, in], [out, r]
    old_rows, new_rows = A.index_select(0, in_A.places_there), in_A.arriving
    old_columns, new_columns = B.index_select(1, in_B.places_there), in_B.arriving.T

    wide = torch.promote_types(weight.dtype, torch.float32)
    columns = [old_columns.to(wide) - new_columns.to(wide), B.index_select(1, in_A.places_there).to(wide)]
    rows = [A.index_select(0, in_B.places_there).to(wide), old_rows.to(wide) - new_rows.to(wide)]
    switch_update_(weight, torch.cat(columns, dim=1), torch.cat(rows), scale)

    A.index_copy_(0, in_A.places_there, new_rows)
    B.index_copy_(1, in_B.places_there, new_columns)
    in_A.leaving, in_B.leaving = old_rows, old_columns.T


def record_exchange_(state: Mapping[str, Tensor], site: SiteExchange, step: int, freeze_steps: int) -> None:
    """Note which vector is where now, whose counterpart is frozen until when, and where the next switch begins."""
    for switched, counterpart in ((site.in_A, site.in_B), (site.in_B, site.in_A)):
        state["slots"][switched.dim, switched.places] = switched.slots
        state["frozen_until"][counterpart.dim, switched.places] = step + freeze_steps
    state["next"].add_(len(site.in_A.places)).remainder_(state["slots"].shape[1])


def return_candidates(exchanges: Sequence[FactorExchange]) -> None:
    """Put the vectors that left back into their slots."""
    slots = on_devices([(exchange.home_slots, exchange.candidates.device) for exchange in exchanges])
    vectors = on_devices(
        [(exchange.leaving.to(exchange.candidates.dtype), exchange.candidates.device) for exchange in exchanges]
    )
    for exchange, home_slots, leaving in zip(exchanges, slots, vectors, strict=True):
        exchange.candidates[home_slots] = leaving


def snapshot_frozen(members: Sequence[pc.StepMember], step: int) -> list[FrozenVectors]:
    """The vectors that are frozen at this step, as they are."""
    found = [
        (member.tensors[name], dim, places)
        for member in members
        for name, dim in DIMS.items()
        if (places := (member.state["frozen_until"][dim] > step).nonzero().flatten()).numel()
    ]
    moved = on_devices([(places, parameter.device) for parameter, _, places in found])
    return [
        FrozenVectors(parameter, dim, places, parameter.index_select(dim, places))
        for (parameter, dim, _), places in zip(found, moved, strict=True)
    ]


def on_devices(parts: Sequence[tuple[Tensor, torch.device]]) -> list[Tensor]:
    """Tensors on the devices where they are wanted. What goes from one device to another goes in one copy, since each copy by
    itself would wait for the accelerator; for the copies to an accelerator nobody waits.
    """
    out = [tensor for tensor, _ in parts]
    together: dict[tuple[torch.device, torch.device, torch.dtype], list[int]] = {}
    for number, (tensor, device) in enumerate(parts):
        if tensor.device != device:
            together.setdefault((tensor.device, device, tensor.dtype), []).append(number)
    for (_, device, _), numbers in together.items():
        packed = torch.cat([out[number].flatten() for number in numbers])
        if device.type == "cuda" and packed.device.type == "cpu":
            packed = packed.pin_memory()
        pieces = packed.to(device, non_blocking=device.type != "cpu").split([out[number].numel() for number in numbers])
        for number, piece in zip(numbers, pieces, strict=True):
            out[number] = piece.view(out[number].shape)
    return out


def move_candidates(member: pc.StepMember) -> None:
    """Move a site's candidates to where its parameters are: at the first step, since a model may move until then; and once,
    since the tensors stay the same objects.
    """
    for name in DIMS:
        candidates = member.state[f"candidates_{name}"]
        if candidates.device != member.tensors[name].device:
            candidates.data = candidates.to(member.tensors[name].device)


def total_steps(step: pc.OptimizerStep, options: Options) -> int:
    """Steps in the whole run."""
    known = options.total_steps or step.total_steps
    if known is None:
        raise pc.OptimizerStepError(
            f"adapter '{step.adapter}': SwitchLoRA decays its switching rate over the run and needs to know its length; "
            "set the option total_steps, or adapter.total_steps (pc.AdapterTrainer sets it itself)"
        )
    return known
