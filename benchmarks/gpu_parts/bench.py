"""What all parts of the GPU benchmark share: where to measure, how to measure, until when, and what was found."""

from __future__ import annotations

import gc
import json
import os
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from peft_core.errors import first_line


@dataclass
class Bench:
    """What all parts share: where, how large, until when.

    Attributes:
        out: where the figures go. settings, labels: of training steps and their profiles, those wanted.
        found: part → its figures. left_out: what was not measured, and why.
    """

    device: torch.device
    tiny: bool
    rounds: int
    backend: str
    deadline: float
    out: Path
    settings: re.Pattern[str] = re.compile("")
    labels: re.Pattern[str] = re.compile("")
    found: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def late(self, what: str, needs: float = 0.0) -> bool:
        """Whether there are not as many seconds left as this needs; it is then noted."""
        if time.monotonic() + needs < self.deadline:
            return False
        self.left_out.append(f"{what}: out of time")
        return True

    def failed(self, what: str, error: Exception) -> None:
        """Note what went wrong, and go on."""
        self.left_out.append(f"{what}: {type(error).__name__}: {first_line(error)}")

    def asked(self, what: str, parts: Sequence[str]) -> bool:
        """Whether this run tries again what an earlier one left out."""
        if not any(what.startswith(part.removesuffix("s")) for part in parts):
            return False
        part, _, of_setting = what.partition(" ")
        setting, _, rest = of_setting.partition(": ")
        wanted = self.settings.search(setting) and self.labels.search(rest.partition(": ")[0])
        return part not in ("steps", "profile") or bool(wanted)

    def keep(self) -> None:
        """Write what was found so far."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.out.with_suffix(".unfinished")
        unfinished.write_text(json.dumps({**self.found, "left_out": self.left_out}, indent=2) + "\n")
        os.replace(unfinished, self.out)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def clocked(self, function: Callable[[], Any]) -> tuple[float, float]:
        """Wall time of one call: until it returns, which is the host's part, and until the device has done its work."""
        self.synchronize()
        start = time.perf_counter()
        function()
        returned = time.perf_counter()
        self.synchronize()
        return returned - start, time.perf_counter() - start

    def seconds(self, function: Callable[[], Any]) -> float:
        """Wall time of one call, the device's work included."""
        return self.clocked(function)[1]

    def per_call(self, function: Callable[[], Any], calls: int, rounds: int = 5) -> float:
        """The device's seconds for a call: the median of some rounds of calls. The device pauses before each round for twice the
        time that the host takes to issue it, so that launches wait in its queue and not it for the host. An upper bound for
        rounds of more launches than the queue holds (about a thousand).
        """

        def round_of_calls() -> None:
            for _ in range(calls):
                function()

        function()
        pause = 2 * self.clocked(round_of_calls)[0]
        return statistics.median(self._after(pause, round_of_calls) for _ in range(rounds)) / calls

    def _after(self, pause: float, function: Callable[[], Any]) -> float:
        """The device's seconds for a call that it begins after a pause of so many seconds."""
        if self.device.type != "cuda":
            return self.seconds(function)
        self.synchronize()
        torch.cuda._sleep(int(2e9 * pause))  # cycles of half a nanosecond
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()  # type: ignore[no-untyped-call]
        function()
        stop.record()  # type: ignore[no-untyped-call]
        self.synchronize()
        return start.elapsed_time(stop) / 1e3

    def profiled(self, function: Callable[[], Any]) -> dict[str, float]:
        """Kernel → its seconds on the device in one call, the longest first; on a CPU, of operators.

        Raises:
            RuntimeError: the profiler saw none.
        """
        cuda = self.device.type == "cuda"
        activity = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
        with torch.profiler.profile(activities=[activity]) as profiler:
            function()
            self.synchronize()
        seconds = {
            event.key: (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
            for event in profiler.key_averages()
            if (event.device_type == torch.autograd.DeviceType.CPU) is not cuda
        }
        if not seconds:
            raise RuntimeError("the profiler saw no kernels")
        return dict(sorted(seconds.items(), key=lambda item: -item[1]))

    def held(self) -> int:
        """Bytes in use; 0 where the device does not tell."""
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def peak(self, function: Callable[[], Any]) -> int:
        """Bytes at the highest point of a call above what was there before it; 0 where the device does not tell."""
        if self.device.type != "cuda":
            function()
            return 0
        self.synchronize()
        before = self.held()
        torch.cuda.reset_peak_memory_stats(self.device)
        function()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before

    def free(self) -> None:
        """Give memory back that nobody holds."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
