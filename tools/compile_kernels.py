"""Compile every Triton kernel for GPUs that need not be there, and print what each costs a thread.

python tools/compile_kernels.py [--target sm_80] [--target sm_90]

What is compiled is what the `examples()` of each package's `triton_kernels` launch: the same code, the same constants.
Exits with 1 where a kernel does not compile. (A kernel that was imported with TRITON_INTERPRET=1 cannot be compiled.)
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_core.launching import Launch, recorded

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ("sm_80", "sm_90")


def modules() -> list[str]:
    """The modules that hold kernels: `triton_kernels` of any package of this repository that has one."""
    found = (ROOT / "packages").glob("*/src/*/triton_kernels.py")
    return sorted(f"{path.parent.name}.triton_kernels" for path in found)


def launches(module: str) -> Iterator[Launch]:
    """The launches of a module's examples; those that would compile to the same code once."""
    with recorded() as found:
        importlib.import_module(module).examples()
    seen = set()
    for one in found:
        key = (one.kernel.fn.__name__, repr(signature(one)))
        if key not in seen:
            seen.add(key)
            yield one


def signature(one: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], Any], dict[str, Any]]:
    """Types, constants, what is known of arguments (divisible by 16), and options: what Triton makes of a launch."""
    names = one.kernel.arg_names
    types, constants = dict.fromkeys(names, "constexpr"), {}
    known: dict[tuple[int, ...], Any] = {}
    for index, (name, value) in enumerate(zip(names, one.arguments, strict=False)):
        special = isinstance(value, int) and not one.kernel.params[index].do_not_specialize
        if value is None or (special and value == 1):
            constants[name] = value
            continue
        types[name] = _type(value)
        if isinstance(value, Tensor) or (special and value % 16 == 0):
            known[(index,)] = [["tt.divisibility", 16]]
    constants |= {name: value for name, value in one.constants.items() if name in names}
    options = {name: value for name, value in one.constants.items() if name not in names}
    return types, constants, known, options


def _type(value: Any) -> str:
    short = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int32": "i32", "int64": "i64"}
    if isinstance(value, Tensor):
        return f"*{short[str(value.dtype).removeprefix('torch.')]}"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def compiled(one: Launch, target: str) -> bytes:
    """The kernel's machine code for a target such as `sm_90`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types, constants, known, options = signature(one)
    source = ASTSource(fn=one.kernel, signature=types, constexprs=constants, attrs=known)
    made = triton.compile(source, target=GPUTarget("cuda", int(target.removeprefix("sm_")), 32), options=options)
    return bytes(made.asm["cubin"])


def resources(binary: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack, which hold what does not fit into registers."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        found = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", found))
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])


def label(one: Launch) -> str:
    """The kernel, its dtype and its constants."""
    dtype = next(str(a.dtype).removeprefix("torch.") for a in one.arguments if isinstance(a, Tensor))
    constants = ", ".join(f"{name.lower()} {value}" for name, value in one.constants.items())
    return f"{one.kernel.fn.__name__.strip('_')} ({dtype}, {constants})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=TARGETS, help="repeatable; default: all")
    targets = parser.parse_args().target or list(TARGETS)
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET is set: kernels would be interpreted, not compiled; unset it")
    if importlib.util.find_spec("triton") is None:
        raise SystemExit("Triton is not installed: pip install triton")
    failures = 0
    print(f"torch {torch.__version__}; registers of a thread / bytes spilled")
    for module in modules():
        print(module)
        for one in launches(module):
            figures = []
            for target in targets:
                try:
                    registers, spilled = resources(compiled(one, target))
                    figures.append(f"{target} {registers:3} / {spilled}")
                except Exception as error:  # of many kinds, from several stages of the compiler
                    failures += 1
                    figures.append(f"{target} fails: {str(error).strip().splitlines()[-1]}")
            print(f"  {'   '.join(figures)}   {label(one)}", flush=True)
    if failures:
        print(f"{failures} kernels do not compile", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
