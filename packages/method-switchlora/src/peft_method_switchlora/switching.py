"""Switching: which vectors a step exchanges, the exchange, and keeping still what it made stale."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from peft_core import OptimizerStep, OptimizerStepError, StepMember

from . import optimizer as optimizers
from .kernels import switch_update_
from .options import Options

# Rows of the bookkeeping tensors, and the dimension along which a factor's vectors lie: rows, columns.
A, B = 0, 1


class Exchange(NamedTuple):
    """In one factor, the vectors at `places` make way for the candidates in `slots`."""

    places: list[int]
    slots: list[int]


class Move(NamedTuple):
    """One factor's part in a site's exchange. `left`: the slots into which the vectors go back that make way."""

    member: StepMember
    parameter: Tensor
    candidates: Tensor
    exchange: Exchange
    left: list[int]


class Leaving(NamedTuple):
    """Vectors [k, ·] on their way back into the `slots` of their `candidates`."""

    candidates: Tensor
    slots: Tensor
    vectors: Tensor


class Still(NamedTuple):
    """Vectors of a parameter that an optimizer step must not move, and their values."""

    parameter: Tensor
    dim: int
    places: Tensor
    values: Tensor


@contextmanager
def switching(step: OptimizerStep) -> Iterator[None]:
    """Around one optimizer step: exchange before it, and afterwards put back what must not have moved.

    Raises:
        OptimizerStepError: the optimizer's state is not understood, or nobody knows how long the run is.
    """
    members = [member for member in step.members if member.state]
    if members:
        optimizers.check(step.optimizer, [tensor for member in members for tensor in member.tensors.values()])
    for member in members:
        _length(step, member.site.options)
        if not member.site.options.offload_candidates:
            to_device(member)
    with torch.no_grad():
        send_home(switch_(step, members))
        still = hold_still(members, step.index)
    yield
    coupled = optimizers.decays_through_moments(step.optimizer)
    with torch.no_grad():
        for parameter, dim, places, values in still:
            parameter.index_copy_(dim, places, values)
            if coupled:
                optimizers.zero_moments(step.optimizer, parameter, dim, places)


def switch_(step: OptimizerStep, members: Sequence[StepMember]) -> list[Leaving]:
    """Decide and make this step's exchanges. Returns the vectors that left.

    What all sites need on an accelerator goes there together: every copy by itself would wait for it.
    """
    moves = [move for member in members for move in _moves(step, member)]
    indices = on_devices(
        [
            (torch.tensor(numbers, device="cpu"), like.device)
            for move in moves
            for numbers, like in (
                (move.exchange.places, move.parameter),
                (move.exchange.slots, move.candidates),
                (move.left, move.candidates),
            )
        ]
    )
    at, chosen, left = indices[0::3], indices[1::3], indices[2::3]
    arriving = on_devices(
        [
            (move.candidates.index_select(0, slots).to(move.parameter.dtype), move.parameter.device)
            for move, slots in zip(moves, chosen, strict=True)
        ]
    )
    leaving = []
    for first in range(0, len(moves), 2):
        pair = slice(first, first + 2)  # in A and in B
        member = moves[first].member
        options: Options = member.site.options
        assert member.weight is not None  # the method owns it
        old = exchange_(member.tensors, member.weight, options.scale, at[pair], arriving[pair])
        member.weight_changed = True
        for move, slots, vectors in zip(moves[pair], left[pair], old, strict=True):
            leaving.append(Leaving(move.candidates, slots, vectors))
        book_(member.state, [move.exchange for move in moves[pair]], step.index, options.freeze_steps)
        for dim, counterpart in ((B, "A"), (A, "B")):
            places = torch.tensor(moves[first + dim].exchange.places, device="cpu")
            optimizers.restart(step.optimizer, member.tensors[counterpart], 1 - dim, at[first + dim], places)
    return leaving


def _moves(step: OptimizerStep, member: StepMember) -> list[Move]:
    """What a site does at this step: nothing, or as much in A as in B."""
    options, state = member.site.options, member.state
    draws = random.Random(f"{step.seed}/{step.index}/{member.site.path}")
    exchanges = decide(options, state, step.index, _length(step, options), draws)
    if not exchanges[A].places:
        return []
    slots = state["slots"].tolist()
    return [
        Move(
            member,
            member.tensors[name],
            state[f"candidates_{name}"],
            exchanges[factor],
            [slots[factor][place] for place in exchanges[factor].places],
        )
        for factor, name in ((A, "A"), (B, "B"))
    ]


def decide(
    options: Options, state: Mapping[str, Tensor], step: int, total_steps: int, draws: random.Random
) -> tuple[Exchange, Exchange]:
    """What a site exchanges in A and in B at this step (from 0): equally many, and never at the same place.

    Pure, and so the same on every rank.
    """
    r, c = options.r, state["candidates_A"].shape[0]
    expected = options.expected_switches(step, total_steps)
    count = int(expected) + (draws.random() < expected % 1)
    next_A, next_B = state["next"].tolist()
    count = min(count, (next_B - next_A) % r, (next_A - next_B) % r, c - r)
    if count:
        blocked = (state["frozen_until"] > step).any(0).tolist()
        count = min(count, _run(blocked, next_A), _run(blocked, next_B))
    exchanges = []
    for place, slots in zip((next_A, next_B), state["slots"].tolist(), strict=True):
        if options.order == "random":
            chosen = draws.sample(sorted(set(range(c)).difference(slots)), count)
        else:
            chosen = [(slots[place - 1] + 1 + k) % c for k in range(count)]
        exchanges.append(Exchange([(place + k) % r for k in range(count)], chosen))
    return exchanges[A], exchanges[B]


def exchange_(
    tensors: Mapping[str, Tensor], weight: Tensor, scale: float, at: Sequence[Tensor], arriving: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Put vectors [k, in] and [k, out] in their places in A and B, and into W [out, in] what keeps W + s·B·A the same: one
    pass over W. Returns the vectors that stood there.
    """
    rows, columns = tensors["A"], tensors["B"]  # [r, in], [out, r]
    at_A, at_B = at
    new_A, new_B = arriving[A], arriving[B].T
    old_A, old_B = rows.index_select(0, at_A), columns.index_select(1, at_B)

    wide = torch.promote_types(weight.dtype, torch.float32)
    left = torch.cat([old_B.to(wide) - new_B.to(wide), columns.index_select(1, at_A).to(wide)], dim=1)
    right = torch.cat([rows.index_select(0, at_B).to(wide), old_A.to(wide) - new_A.to(wide)])
    switch_update_(weight, left, right, scale)

    rows.index_copy_(0, at_A, new_A)
    columns.index_copy_(1, at_B, new_B)
    return old_A, old_B.T


def on_devices(parts: Sequence[tuple[Tensor, torch.device]]) -> list[Tensor]:
    """Tensors on the devices where they are wanted: what comes from the CPU goes to each accelerator in one copy, for which
    nobody waits.
    """
    out = [tensor for tensor, _ in parts]
    together: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for number, (tensor, device) in enumerate(parts):
        if tensor.device != device:
            together.setdefault((device, tensor.dtype), []).append(number)
    for (device, _), numbers in together.items():
        packed = torch.cat([out[number].flatten() for number in numbers])
        if device.type == "cuda":
            packed = packed.pin_memory()
        pieces = packed.to(device, non_blocking=True).split([out[number].numel() for number in numbers])
        for number, piece in zip(numbers, pieces, strict=True):
            out[number] = piece.view(out[number].shape)
    return out


def send_home(leaving: Sequence[Leaving]) -> None:
    """Put vectors back into their slots. From each accelerator in one copy: every copy would wait for it."""
    by_device: dict[torch.device, list[Leaving]] = {}
    for one in leaving:
        by_device.setdefault(one.vectors.device, []).append(one)
    for group in by_device.values():
        together = torch.cat([one.vectors.flatten() for one in group]).to(group[0].candidates)
        for one, values in zip(group, together.split([one.vectors.numel() for one in group]), strict=True):
            one.candidates[one.slots] = values.view(one.vectors.shape)


def book_(state: Mapping[str, Tensor], exchanges: Sequence[Exchange], step: int, freeze_steps: int) -> None:
    """Note who is where now, whose counterpart is frozen until when, and where the next switch begins."""
    for factor, exchange in zip((A, B), exchanges, strict=True):
        places = torch.tensor(exchange.places, device="cpu")
        state["slots"][factor, places] = torch.tensor(exchange.slots, device="cpu")
        state["frozen_until"][1 - factor, places] = step + freeze_steps
    state["next"].add_(len(exchanges[A].places)).remainder_(state["slots"].shape[1])


def hold_still(members: Sequence[StepMember], step: int) -> list[Still]:
    """The frozen vectors, as they are. Their gradients are zeroed: so their moments stay zero."""
    frozen = [
        (member.tensors[name], dim, places)
        for member in members
        for dim, name in ((A, "A"), (B, "B"))
        if (places := (member.state["frozen_until"][dim] > step).nonzero().flatten()).numel()
    ]
    still = []
    moved = on_devices([(places, parameter.device) for parameter, _, places in frozen])
    for (parameter, dim, _), places in zip(frozen, moved, strict=True):
        if parameter.grad is not None:
            parameter.grad.index_fill_(dim, places, 0)
        still.append(Still(parameter, dim, places, parameter.index_select(dim, places)))
    return still


def to_device(member: StepMember) -> None:
    """Move a site's candidates to where its parameters are: at the first step, since a model may move until then; and once,
    since the tensors stay the same objects.
    """
    for name in ("A", "B"):
        candidates = member.state[f"candidates_{name}"]
        if candidates.device != member.tensors[name].device:
            candidates.data = candidates.to(member.tensors[name].device)


def _length(step: OptimizerStep, options: Options) -> int:
    """Steps in the whole run."""
    total_steps = options.total_steps or step.total_steps
    if total_steps is None:
        raise OptimizerStepError(
            f"adapter '{step.adapter}': SwitchLoRA switches ever less in a run and must know its length: "
            "set the option total_steps, or adapter.total_steps (a trainer does)"
        )
    return total_steps


def _run(blocked: Sequence[bool], start: int) -> int:
    """How many places in a row, from `start` and round, are not blocked."""
    r = len(blocked)
    return next((k for k in range(r) if blocked[(start + k) % r]), r)
