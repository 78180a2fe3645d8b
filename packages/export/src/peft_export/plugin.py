"""The commands that peft-export adds to `peft-core`."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

import peft_export
from peft_core import MergeError, ModelError, hookimpl
from peft_core.cli import console, print_json
from peft_core.models import base_path

from . import tables
from .reports import VerifyReport

_FAILED = 1

Base = Annotated[str, typer.Option(help="Checkpoint directory of the base model, or a known name: smollm2-135m.")]
Adapters = Annotated[
    list[str], typer.Option(metavar="DIR[=WEIGHT]", help="An adapter directory, with a weight; may be repeated.")
]
Out = Annotated[Path, typer.Option(help="Directory to write. It appears whole or not at all.")]
Untie = Annotated[bool, typer.Option("--untie", help="Untie embedding and head where only one of the two was trained.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")]
Verify = Annotated[
    bool, typer.Option("--verify", help="Then run the model: compare, and keep golden logits in the export.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


@hookimpl
def peft_cli(app: typer.Typer) -> None:
    """Add `merge`, `export` and `verify`."""
    app.command()(merge)
    app.command()(verify)
    export = typer.Typer(help="Write an adapter in the form that a serving runtime loads.", no_args_is_help=True)
    export.command()(lora)
    export.command()(onnx)
    app.add_typer(export, name="export")


def merge(
    base: Base,
    adapter: Adapters,
    out: Out,
    dtype: Annotated[str | None, typer.Option(help="Cast all weights: float32, bfloat16, float16, float64.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    untie: Untie = False,
    overwrite: Overwrite = False,
    verify: Verify = False,
    json_: Json = False,
) -> None:
    """Merge adapters into a checkpoint's files: a plain model. Memory stays small, whatever the model's size."""
    # Torch asks for huge pages then: the merge's large tensors come and go, and small pages cost a third of its time.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    directory, adapters = _local(base), parse_adapters(adapter)
    with _progress("merging", json_) as progress:
        report = peft_export.merge(
            directory,
            adapters,
            out,
            dtype=dtype,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            untie=untie,
            progress=progress,
        )
    _finish(report.to_json(), tables.merge_table(report), out, directory, adapters, verify, json_)


def lora(
    base: Base,
    adapter: Annotated[Path, typer.Option(help="An adapter directory.")],
    out: Out,
    fit: Annotated[
        str | None,
        typer.Option(help="Make it fit a runtime, and say how to start it: vllm, sglang, llama.cpp."),
    ] = None,
    pad_rank: Annotated[
        bool | None,
        typer.Option("--pad-rank/--no-pad-rank", help="Fill all layers up to one rank. On where --fit needs it."),
    ] = None,
    svd_rank: Annotated[
        int | None,
        typer.Option(min=1, help="Approximate, by this rank, what has no exact factors of it or a smaller one."),
    ] = None,
    svd_energy: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Approximate by the rank that keeps this share of ‖ΔW‖², such as 0.99."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="dtype of the factors: float32 (exact), bfloat16, float16, float64.")
    ] = None,
    overwrite: Overwrite = False,
    verify: Verify = False,
    json_: Json = False,
) -> None:
    """Write an adapter as a standard LoRA adapter in Hugging Face PEFT's format, exactly where the method allows it."""
    directory = _local(base)
    with _progress("lowering", json_) as progress:
        report = peft_export.export_lora(
            directory,
            adapter,
            out,
            fit=fit,
            pad_rank=pad_rank,
            svd_rank=svd_rank,
            svd_energy=svd_energy,
            dtype=dtype,
            overwrite=overwrite,
            progress=progress,
        )
    start = "" if report.problems or not report.runtime else f"to start {report.runtime}:\n{report.command}"
    _finish(report.to_json(), tables.lora_table(report), out, directory, {str(adapter): 1.0}, verify, json_, start)
    if report.problems:
        raise typer.Exit(_FAILED)


def onnx(
    base: Base,
    adapter: Adapters,
    out: Out,
    precision: Annotated[str, typer.Option(help="Of the weights: fp32, fp16, int8, int4.")] = "fp32",
    block_size: Annotated[int, typer.Option(help="How many int8 or int4 weights share a scale: 16, 32, 64, 128.")] = 32,
    untie: Untie = False,
    overwrite: Overwrite = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Run it, compare it, and keep golden logits in it.")
    ] = True,
    json_: Json = False,
) -> None:
    """Write the merged model as ONNX, with a cache of keys and values where it generates, and compare it."""
    directory, adapters = _local(base), parse_adapters(adapter)
    with _status(json_) as status:
        report = peft_export.export_onnx(
            directory,
            adapters,
            out,
            precision=precision,
            block_size=block_size,
            untie=untie,
            overwrite=overwrite,
            status=status,
        )
    _finish(report.to_json(), tables.onnx_table(report), out, directory, adapters, verify, json_)


def verify(
    export: Annotated[Path, typer.Argument(help="What `merge` or `export` wrote.")],
    base: Annotated[str | None, typer.Option(help="The base model; needed with --adapter, and for a LoRA.")] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="DIR[=WEIGHT]", help="What it was made from. Without: the golden logits that it carries."),
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be repeated. Default: built-in ones.")] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="Largest mean KL divergence allowed, in nats per token. Default: by the export's precision."
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="What both models are run in: float32, bfloat16, ..., or auto: the files' own.")
    ] = "float32",
    record: Annotated[
        bool, typer.Option("--record/--no-record", help="Keep golden logits and the result in the export.")
    ] = True,
    json_: Json = False,
) -> None:
    """Compare an export with the adapted model. Exit status 1 where they differ by more than --max-kl."""
    adapters = parse_adapters(adapter) if adapter else None
    directory = None if base is None else _local(base)
    report = peft_export.verify(
        export, directory, adapters, prompts=prompt or (), max_kl=max_kl, dtype=dtype, record=record
    )
    if json_:
        print_json(report.to_json())
    else:
        console().print(tables.verify_table(report))
    if not report.ok:
        raise typer.Exit(_FAILED)


def parse_adapters(given: list[str]) -> dict[str, float]:
    """`["A=0.7", "B"]` as `{"A": 0.7, "B": 1.0}`. A directory whose own name ends like a weight is taken as it is.

    Raises:
        MergeError: a weight is not a number, or a directory is given twice.
    """
    found: dict[str, float] = {}
    for text in given:
        directory, sign, number = text.rpartition("=")
        if not sign or Path(text).exists():
            directory, number = text, "1"
        try:
            weight = float(number)
        except ValueError:
            raise MergeError(f"--adapter {text}: '{number}' is not a weight; write DIR=0.7") from None
        if not abs(weight) < float("inf"):
            raise MergeError(f"--adapter {text}: the weight must be finite")
        if directory in found:
            raise MergeError(f"--adapter {directory} is given twice")
        found[directory] = weight
    return found


def _local(base: str) -> Path:
    path = Path(base_path(base)) if not Path(base).exists() else Path(base)
    if not path.exists():
        raise ModelError(
            f"'{base}' is not on this machine; download it first: hf download {base} --local-dir DIR, then give DIR"
        )
    return path


def _finish(
    data: dict[str, Any],
    table: Table,
    out: Path,
    base: Path,
    adapters: dict[str, float],
    verified: bool,
    json_: bool,
    then: str = "",
) -> None:
    """Print the report; run the comparison, if it was asked for. `then`: how to go on, not wrapped, for copying."""
    checked: VerifyReport | None = None
    if verified:
        checked = peft_export.verify(out, base, adapters)
    if json_:
        print_json({**data, **({"verification": checked.to_json()} if checked else {})})
    else:
        console().print(table)
        if checked:
            console().print(tables.verify_table(checked))
        if then:
            typer.echo(then)
    if checked and not checked.ok:
        raise typer.Exit(_FAILED)


@contextmanager
def _tidy_when_terminated() -> Iterator[None]:
    """SIGTERM ends the command as an exception does, so that what was half written is removed."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # only there can a signal be handled
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _progress(what: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar with bytes and rate, on standard error."""
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)  # where it is no terminal, an unseen bar would end with an empty line
    bar = Progress(*columns, console=console, disable=quiet or not console.is_terminal, transient=True)
    with _tidy_when_terminated(), bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def _status(quiet: bool) -> Iterator[Callable[[str], None]]:
    """A line on standard error that says what is being done, also while tracing redirects `sys.stderr`."""
    with _tidy_when_terminated(), Console(file=sys.stderr, quiet=quiet).status("") as line:
        yield line.update
