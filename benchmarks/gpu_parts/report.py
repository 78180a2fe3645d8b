"""What was found, for people: tables, and every target beside its figure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gpu_parts.kernels import LEAST_BANDWIDTH, LEAST_BYTES
from gpu_parts.steps import TARGETS, Setting

MOST_OVERHEAD, MOST_MEMORY = 0.5, 0.35  # of that library's LoRA


def verdicts(found: dict[str, Any]) -> list[str]:
    """Every target beside its figure."""
    lines = []
    if "tests" in found:
        lines.append(f"tests of the kernels: {_met(found['tests']['exit'] == 0)}")
    for name, case in found.get("kernels", {}).get("cases", {}).items():
        if name.split()[0] != "core" and "dropout" not in name and case["streams"] and case["bytes"] >= LEAST_BYTES:
            share = case["fraction_of_copy"]
            lines.append(
                f"{name}: {share:.2f} of the copy's rate (target ≥ {LEAST_BANDWIDTH}) {_met(share >= LEAST_BANDWIDTH)}"
            )
    with_targets = str(Setting("8B", 1024, False, False))
    figures = found.get("steps", {}).get(with_targets, {})
    profiles = found.get("profile", {}).get(with_targets, {})
    lora = figures.get("peft Lora r 16")
    for method, limit in TARGETS.items():
        own = figures.get(f"{method} r 16")
        if own is None:
            continue
        lines.append(f"{method}: {own['ratio']:.3f} of the floor (target ≤ {limit}) {_met(own['ratio'] <= limit)}")
        profile = profiles.get(f"{method} r 16")
        if own["ratio"] > limit and profile is not None:
            lines.append(
                f"  of {own['seconds'] * 1e3:.1f} ms the host's part is {own['host_seconds'] * 1e3:.1f} ms, the kernels' "
                f"{profile['device_seconds'] * 1e3:.1f} ms ({profile['device_ratio']:.3f} of the floor's), the longest:"
            )
            lines += [f"  {seconds * 1e3:9.2f} ms {kernel[:110]}" for kernel, seconds in profile["where"].items()]
        if lora is not None:
            overhead = (own["ratio"] - 1) / (lora["ratio"] - 1) if lora["ratio"] > 1 else float("inf")
            memory = (
                own["peak_above_floor"] / lora["peak_above_floor"] if lora["peak_above_floor"] > 0 else float("inf")
            )
            lines.append(
                f"{method} against peft's LoRA: overhead {overhead:.2f} (target ≤ {MOST_OVERHEAD}) "
                f"{_met(overhead <= MOST_OVERHEAD)}, memory {memory:.2f} (target ≤ {MOST_MEMORY}) {_met(memory <= MOST_MEMORY)}"
            )
    return lines


def report(found: dict[str, Any]) -> str:
    """The tables, for people."""
    where = found["environment"]
    lines = [
        f"{where['device']}; torch {where['torch']}, CUDA {where['cuda']}, Triton {where['triton']}, peft {where['peft']}",
        *_kernels(found.get("kernels", {})),
        *_steps(found.get("steps", {}), found.get("profile", {})),
    ]
    for label, own in found.get("switchlora", {}).items():
        lines.append(
            f"{label}: step {own['seconds'] * 1e3:.1f} ms, {own['held'] / 1e9:.2f} GB held, "
            f"{own['peak'] / 1e9:.2f} GB more in a step"
        )
    if many := found.get("adapters"):
        lines.append(
            f"MoS: {many['resident']} adapters resident, {many['bytes_per_adapter'] / 1e6:.2f} MB each; forward "
            f"{many['base_forward_seconds'] * 1e3:.1f} ms without, "
            f"{(many['switched_forward_seconds'] or 0) * 1e3:.1f} ms with another one every time"
        )
    if "tests" in found:
        lines.append("\ntests: " + (found["tests"]["last_lines"] or ["nothing was printed"])[-1])
    lines += ["", *verdicts(found)]
    if found.get("left_out"):
        lines += ["", "not measured:", *(f"  {what}" for what in found["left_out"])]
    return "\n".join(lines)


def _kernels(found: dict[str, Any]) -> Iterator[str]:
    """Each kernel beside torch's products, and the orders of a site's products."""
    if not found:
        return
    yield (
        f"\ncopy {found['copy_bytes_per_second'] / 1e9:.1f} GB/s, bf16 product {found['product_flops'] / 1e12:.2f} Tflop/s"
    )
    yield f"{'kernel':48} {'µs':>9} {'of copy':>8} {'torch µs':>9}"
    for name, case in found["cases"].items():
        beside = _figure(case["torch_seconds"], 1e6)
        yield f"{name:48} {case['seconds'] * 1e6:9.1f} {case['fraction_of_copy']:8.2f} {beside}"
    if orders := found.get("orders"):
        yield f"\n{'base product and an adapter of rank 16':40} {'alone, µs':>9} {'on top':>8} {'beneath':>8}"
        for name, own in orders.items():
            yield f"{name:40} {own['seconds'] * 1e6:9.1f} {own['on top']:8.3f} {own['beneath']:8.3f}"


def _steps(found: dict[str, Any], profiles: dict[str, Any]) -> Iterator[str]:
    """The training steps of each setting."""
    columns = (
        f"{'ratio':>7} {'ms':>9} {'host ms':>9} {'kernels: ratio':>14} {'ms':>9} {'above floor':>12} {'parameters':>12}"
    )
    for setting, runs in found.items():
        yield f"\n{setting:38} {columns}"
        for label, own in runs.items():
            profile = profiles.get(setting, {}).get(label, {})
            yield (
                f"{label:38} {own['ratio']:7.3f} {_figure(own['seconds'], 1e3)} {_figure(own['host_seconds'], 1e3)} "
                f"{_figure(profile.get('device_ratio'), 1, '14.3f')} {_figure(profile.get('device_seconds'), 1e3)} "
                f"{own['peak_above_floor'] / 1e6:9.0f} MB {own['parameters']:12,}"
            )


def _met(met: bool) -> str:
    return "met" if met else "MISSED"


def _figure(value: float | None, scale: float, form: str = "9.1f") -> str:
    """A dash for what was not measured."""
    return f"{'–':>{form.partition('.')[0]}}" if value is None else f"{value * scale:{form}}"
