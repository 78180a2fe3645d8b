"""Time and memory of merging checkpoint files: ours, a plain read/write loop (the floor), cp -r, and Hugging Face PEFT.

    tox run -e bench -- merge.py                        # 2, 4 and 8 GB, every installed method: some 45 GB of disk
    tox run -e bench -- merge.py --sizes 0.3 --hidden 1024     # the short form
    tox run -e bench -- merge.py --sizes 2 --methods NAME --no-peft
    tox run -e bench -- merge.py --lowering             # 8B-shaped adapters to LoRA; the target is 10 s

Checkpoints are LLaMA-shaped (4096, 11008, vocabulary 32 000) with as many layers as the size asks for, in bfloat16; with
`--hidden` they are smaller. Every run is a process of its own, reports seconds after its imports and peak resident memory
above what the interpreter has with its imports, finds its inputs out of the page cache, and ends when its output is on
disk (fsync); the floor is also shown without that.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from figures import Figure
from shapes import LLAMA_3_1_8B

RATIO, MEMORY, IMPORTS = 1.5, 1e9, 2.0
BUFFER = 1 << 24
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="+", default=[2.0, 4.0, 8.0], help="GB of the checkpoints")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--methods", nargs="*", help="default: all that are installed")
    parser.add_argument("--no-peft", action="store_true", help="leave Hugging Face PEFT out")
    parser.add_argument("--directory", type=Path, help="where the temporary files go")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each; the fastest counts")
    parser.add_argument("--lowering", action="store_true", help="time lowering 8B-shaped adapters to LoRA instead")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--run", nargs="+", help=argparse.SUPPRESS)  # in the subprocess: what, and its arguments
    options = parser.parse_args()
    if options.run:
        print(json.dumps(RUNS[options.run[0]](*options.run[1:])))
        return
    results: list[dict[str, Any]] = []
    if options.lowering:
        with tempfile.TemporaryDirectory(prefix="peft-lower-", dir=options.directory) as folder:
            results.append(lowering(Path(folder), options.methods))
        options.sizes = []
    for size in options.sizes:
        with tempfile.TemporaryDirectory(prefix="peft-merge-", dir=options.directory) as folder:
            found = measure(Path(folder), size, options)
            results.append(found)
            if not options.json:
                show(found)
    if options.json:
        print(json.dumps(results, indent=2))


def short() -> list[Figure]:
    """A checkpoint of 0.3 GB, every installed method."""
    options = argparse.Namespace(hidden=1024, methods=None, no_peft=False, repeat=3)
    with tempfile.TemporaryDirectory(prefix="peft-merge-") as folder:
        found = measure(Path(folder), 0.3, options)
    out = []
    for name, run in found["methods"].items():
        out.append(Figure(f"merging 0.3 GB, {name}", run["seconds"] / run["floor"], RATIO))
        out.append(Figure(f"its peak memory, {name}", run["peak"] / 1e6, MEMORY / 1e6, "MB"))
        out.append(Figure(f"its imports, {name}", run["imports"], IMPORTS, "s"))
    if peft := found.get("peft"):
        out.append(Figure("merging 0.3 GB, peft", peft["seconds"] / found["floor"]["seconds"]))
        out.append(Figure("its peak memory, peft", peft["peak"] / 1e6, unit="MB"))
    return out


def alone(what: str, *arguments: Path) -> dict[str, float]:
    """What one of `RUNS` found, in a process of its own."""
    command = [sys.executable, __file__, "--run", what, *arguments]
    finished = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, float] = json.loads(finished.stdout.splitlines()[-1])
    return found


def measure(folder: Path, size: float, options: argparse.Namespace) -> dict[str, Any]:
    """One checkpoint size: every run on it."""
    base, out = folder / "base", folder / "out"
    made = make_base(base, size, options.hidden)
    import peft_core as pc

    def timed(what: str, *arguments: Path, inputs: tuple[Path, ...] = (base,)) -> dict[str, float]:
        runs = []
        for _ in range(options.repeat):
            shutil.rmtree(out, ignore_errors=True)
            forget(*inputs)
            runs.append(alone(what, *arguments))
        shutil.rmtree(out, ignore_errors=True)
        return min(runs, key=lambda run: run["seconds"])

    found: dict[str, Any] = {"bytes": made, "methods": {}}
    found["floor"] = timed("loop", base, out)
    found["cp"] = timed("cp", base, out)
    lowered = folder / "lora"
    for name in options.methods or sorted(pc.methods()):
        adapter = folder / "adapter"
        label = make_adapter(adapter, base, name)
        nbytes = sum(path.stat().st_size for path in adapter.iterdir())
        floor = found["floor"]
        # A method that owns its base weight brings an adapter as large as the base: the loop reads it, too.
        if nbytes > made / 10:
            floor = timed("loop", base, out, adapter, inputs=(base, adapter))
        run = timed("ours", base, adapter, out, inputs=(base, adapter))
        found["methods"][name] = {**run, "options": label, "adapter_bytes": nbytes, "floor": floor["seconds"]}
        if not lowered.exists() and not options.no_peft and pc.AdapterSpec(method=name).capabilities.lowrank:
            import peft_export

            peft_export.export_lora(base, adapter, lowered)
        shutil.rmtree(adapter)
    if lowered.exists():
        found["peft"] = timed("peft", base, lowered, out)
    return found


def lowering(folder: Path, methods: list[str] | None) -> dict[str, Any]:
    """Seconds to lower an adapter for a Llama-3-8B, from its files and the base's configuration, for each method."""
    import peft_core as pc

    base = folder / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({**CONFIG, **LLAMA_3_1_8B}))
    found: dict[str, Any] = {}
    for name in methods or sorted(pc.methods()):
        if pc.AdapterSpec(method=name).capabilities.lowrank:
            make_adapter(folder / "adapter", base, name)
            run = found[name] = alone("lower", base, folder / "adapter", folder / "out")
            for written in ("adapter", "out"):
                shutil.rmtree(folder / written)
            figures = f"rank {run['rank']}, {run['bytes'] / 1e6:.0f} MB in {run['seconds']:.1f} s"
            print(f"{name}: {figures}, peak {run['peak'] / 1e6:.0f} MB", file=sys.stderr)
    return found


def make_base(base: Path, size: float, hidden: int) -> int:
    """A LLaMA-shaped bfloat16 checkpoint of about this many GB, in shards of 5 GB. Returns its bytes."""
    import torch

    from peft_export.shards import Item, Writer

    inner, vocabulary = hidden * 43 // 16, 32000 * hidden // 4096
    layer = {
        **{f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"},
        **{f"mlp.{name}_proj": (inner, hidden) for name in ("gate", "up")},
        "mlp.down_proj": (hidden, inner),
    }
    ends = 4 * vocabulary * hidden
    per_layer = 2 * sum(out * inside for out, inside in layer.values())
    layers = max(1, round((size * 1e9 - ends) / per_layer))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for number in range(layers):
        shapes.update({f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()})
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{number}.{norm}.weight"] = (hidden,)
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    base.mkdir()
    items = [Item(key, "BF16", shape, 2 * torch.Size(shape).numel()) for key, shape in shapes.items()]
    noise = (
        torch.randn(max(item.nbytes for item in items) // 2, generator=torch.Generator().manual_seed(0))
        .mul_(0.02)
        .bfloat16()
    )
    with Writer(base, items, {}, 5 * 10**9) as writer:
        for key in writer.order:
            shape = torch.Size(shapes[key])
            writer.write(key, noise[: shape.numel()].view(shape))
        writer.write_index()
    config = {
        **CONFIG,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 128,
        "num_key_value_heads": hidden // 128,
        "vocab_size": vocabulary,
    }
    (base / "config.json").write_text(json.dumps(config))
    return sum(item.nbytes for item in items)


def make_adapter(adapter: Path, base: Path, method: str) -> str:
    """An adapter with random values, made without the base's weights. Returns its options where they are not default."""
    import torch

    import peft_core as pc
    from peft_core import files
    from peft_core.adapter_file import HEADER, describe, owned_key
    from peft_core.base_model import meta_model
    from peft_core.checkpoint import TENSORS
    from peft_core.sharing import draw
    from peft_export.checkpoint_files import CODES
    from peft_export.shards import Item, Writer

    model = meta_model(base)
    # Defaults may need more layers than a small checkpoint has; what a method offers for tiny models then serves.
    for chosen in ({}, *pc.methods()[method].trials):
        with contextlib.suppress(pc.PlanError):
            plan = pc.plan(model, pc.AdapterSpec(method=method, options=dict(chosen)))
            break
    noise = torch.Generator().manual_seed(0)
    values: dict[str, Callable[[], torch.Tensor]] = {}
    shapes: dict[str, torch.Tensor] = {}
    for key, tensor in plan.tensors():
        shapes[key] = torch.empty(tensor.shape, dtype=tensor.dtype or plan.spec.torch_dtype, device="meta")
        values[key] = lambda meta=shapes[key]: torch.randn(meta.shape, generator=noise).mul_(0.01).to(meta.dtype)
    for key, tensor in plan.fixed():
        drawn = draw(tensor, plan.spec.torch_dtype, 0, key)
        shapes[key] = drawn.to("meta")
        values[key] = lambda drawn=drawn: drawn
    if plan.spec.capabilities.owns_base_weight:
        block = torch.randn(1 << 24, generator=noise).mul_(0.02)
        for site in plan.sites:
            shape = (site.out_features, site.in_features)
            shapes[owned_key(site.path)] = torch.empty(shape, device="meta")
            values[owned_key(site.path)] = lambda shape=shape: block.repeat(-(-shape[0] * shape[1] // len(block)))[
                : shape[0] * shape[1]
            ].view(shape)
    adapter.mkdir()
    items = [Item(key, CODES[t.dtype], tuple(t.shape), t.numel() * t.element_size()) for key, t in shapes.items()]
    with Writer(adapter, items, {}, name=TENSORS) as writer:
        for key in writer.order:
            writer.write(key, values[key]())
    checksums = {TENSORS: files.checksum(adapter / TENSORS)}
    header = describe(plan, plan.base, shapes, checksums, seed=0, steps=0)
    (adapter / HEADER).write_text(header.model_dump_json())
    return ", ".join(f"{name} {value}" for name, value in chosen.items())


def forget(*folders: Path) -> None:
    """Take files out of the page cache."""
    for folder in folders:
        for path in folder.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Seconds, and peak resident memory above that at the start, of a block."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
    found: dict[str, float] = {}
    before, started = memory("VmRSS"), time.perf_counter()
    yield found
    found["seconds"] = time.perf_counter() - started
    found["peak"] = memory("VmHWM") - before


def memory(what: str) -> int:
    """A figure of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{what}:"))


def run_loop(base: str, out: str, also: str = "") -> dict[str, float]:
    """Read and write the files of `base`; read those of `also`."""
    with watched() as found:
        os.mkdir(out)
        for path in sorted(Path(base).iterdir()):
            with (
                path.open("rb", buffering=0) as source,
                (Path(out) / path.name).open("wb", buffering=0) as target,
            ):
                while block := source.read(BUFFER):
                    target.write(block)
        for path in sorted(Path(also).iterdir()) if also else ():
            with path.open("rb", buffering=0) as source:
                while source.read(BUFFER):
                    pass
        written = time.perf_counter()
        sync(out)
        found["fsync"] = time.perf_counter() - written
    return found


def run_cp(base: str, out: str) -> dict[str, float]:
    with watched() as found:
        subprocess.run(["cp", "-r", base, out], check=True)
        sync(out)
    return {"seconds": found["seconds"]}


def run_ours(base: str, adapter: str, out: str) -> dict[str, float]:
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command does
    started = time.perf_counter()
    import peft_core as pc
    import peft_export

    pc.methods()
    imports = time.perf_counter() - started
    with watched() as found:
        peft_export.merge(base, adapter, out)
    return {**found, "imports": imports}


def run_lower(base: str, adapter: str, out: str) -> dict[str, float]:
    import peft_export

    with watched() as found:
        report = peft_export.export_lora(base, adapter, out)
    return {**found, "rank": report.rank, "bytes": report.bytes}


def run_peft(base: str, adapter: str, out: str) -> dict[str, float]:
    started = time.perf_counter()
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from transformers.models.llama import modeling_llama  # noqa: F401

    imports = time.perf_counter() - started
    with watched() as found:
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
        PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
        sync(out)
    return {**found, "imports": imports}


def sync(folder: str) -> None:
    for path in Path(folder).iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


RUNS: dict[str, Callable[..., dict[str, float]]] = {
    "loop": run_loop,
    "cp": run_cp,
    "ours": run_ours,
    "lower": run_lower,
    "peft": run_peft,
}


def show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    floor = found["floor"]
    table = Table(title=f"Merging {found['bytes'] / 1e9:.2f} GB", title_justify="left")
    limits = f"≤ {RATIO}", f"≤ {MEMORY / 1e6:.0f}", f"≤ {IMPORTS:g}"
    for heading in ("", "seconds", "× floor", limits[0], "peak MB", limits[1], "imports s", limits[2]):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row("read/write loop (floor)", f"{floor['seconds']:.2f}", "1.00")
    unsynced = floor["seconds"] - floor["fsync"]
    table.add_row("  the same without fsync", f"{unsynced:.2f}", f"{unsynced / floor['seconds']:.2f}")
    table.add_row("cp -r", f"{found['cp']['seconds']:.2f}", f"{found['cp']['seconds'] / floor['seconds']:.2f}")
    for name, run in found["methods"].items():
        ratio = run["seconds"] / run["floor"]
        large = f", adapter {run['adapter_bytes'] / 1e9:.1f} GB" if run["floor"] != floor["seconds"] else ""
        verdicts = (ratio <= RATIO, run["peak"] <= MEMORY, run["imports"] <= IMPORTS)
        ok = ["yes" if verdict else "NO" for verdict in verdicts]
        row = (
            f"{run['seconds']:.2f}",
            f"{ratio:.2f}",
            ok[0],
            f"{run['peak'] / 1e6:.0f}",
            ok[1],
            f"{run['imports']:.2f}",
            ok[2],
        )
        table.add_row(f"peft-export, {name}{large}" + (f" ({run['options']})" if run["options"] else ""), *row)
    if peft := found.get("peft"):
        ratio = peft["seconds"] / floor["seconds"]
        table.add_row(
            "Hugging Face PEFT",
            f"{peft['seconds']:.2f}",
            f"{ratio:.2f}",
            "",
            f"{peft['peak'] / 1e6:.0f}",
            "",
            f"{peft['imports']:.2f}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
