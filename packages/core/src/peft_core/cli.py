"""The program `peft-core`. Plugins add commands of their own through the hook `peft_cli`.

What takes long to import (transformers, and what is built on it) is imported by the command that needs it.
"""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import files, models, plugins, prompts, scaffold, system
from .adapter_file import AdapterFile, read_header
from .attach import load
from .checkpoint import TENSORS
from .errors import CheckpointError, DataError, ModelError, PeftCoreError, SpecError, listed, reason, size, suggestion
from .plan import plan as make_plan
from .spec import DTYPE_OF_NAME, AdapterSpec
from .training.config import RunConfig

_USER_ERROR, _INTERRUPTED = 2, 130
_UsageError: Any = typer.BadParameter.__bases__[0]  # click's, which some versions of typer bring along

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Base = Annotated[
    str, typer.Option(help="The base: a directory, smollm2-135m, package:NAME/FOLDER, or a name on the hub.")
]
Device = Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1, mps, ...")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: what is fast on the device.")]


class _Interrupted(Exception):
    """Ctrl-C, where more can be said of it."""


def main() -> None:
    """Run the program. A user's mistake is one line on standard error and exit status 2; so is Ctrl-C, with 130."""
    said = ""
    system.show_all_text()
    try:
        status = program()(standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()  # what cannot be written is said here, not by Python's end
    except PeftCoreError as error:
        status, said = _USER_ERROR, str(error)
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            sys.exit(_USER_ERROR)
        command = error.ctx.command_path if error.ctx else "peft-core"
        status, said = _USER_ERROR, f"{error.format_message().rstrip('.')}; see {command} --help"
        if said.startswith("No such command"):
            said += "; merge, export and verify are commands of peft-export"
    except (KeyboardInterrupt, _Interrupted) as stop:
        status, said = _INTERRUPTED, str(stop)
    except typer.Abort as stop:  # some versions of typer make it of a KeyboardInterrupt, others status 130
        status = _INTERRUPTED if isinstance(stop.__cause__, KeyboardInterrupt) else 1
    except OSError as error:
        if error.filename is not None:  # opening a file names it, writing does not
            raise
        _give_up_output()
        status = 1
        # Whoever read a pipe has seen enough; Windows says EINVAL of one that is closed.
        if not isinstance(error, BrokenPipeError) and not (system.WINDOWS and error.errno == errno.EINVAL):
            status, said = _USER_ERROR, f"the output could not be written: {reason(error)}"
    if status == _INTERRUPTED:
        said = f"interrupted; {said}".rstrip("; ")
    if said:
        print(f"peft-core: {' '.join(said.split())}", file=sys.stderr)
    sys.exit(status)


def _give_up_output() -> None:
    """What standard output still holds and cannot write (a full disk, a pipe that nobody reads) is not tried again at the end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def program() -> typer.Typer:
    """The program with every command, those of plugins included."""
    app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
    app.callback()(_program)
    for command in (methods, plan, train, inspect, quickstart, generate, new_method):
        app.command()(command)
    plugins.add_commands(app)
    return app


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"peft-core {importlib.metadata.version('peft-core')}")
        raise typer.Exit


def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and end.")
    ] = False,
) -> None:
    """Parameter-efficient fine-tuning of PyTorch models."""


def methods(json_: Json = False) -> None:
    """List the installed methods, their options and what they can do."""
    found = plugins.methods()
    if json_:
        print_json(
            {
                name: {
                    "version": info.version,
                    "distribution": info.distribution,
                    "summary": info.summary,
                    "paper": info.paper,
                    "options": info.options.model_json_schema(),
                }
                for name, info in sorted(found.items())
            }
        )
        return
    if not found:
        typer.echo("No methods are installed. They are distributions named peft-method-NAME.")
        return
    table = Table(title="Installed methods", title_justify="left")
    for heading in ("method", "what it is", "options and defaults", "distribution", "paper"):
        table.add_column(heading)
    for name, info in sorted(found.items()):
        options = info.options().model_dump(mode="json")
        defaults = ", ".join(f"{option}={json.dumps(value)}" for option, value in options.items())
        package = f"{info.distribution} {info.version}".strip()
        table.add_row(*map(escape, (name, info.summary, defaults, package, info.paper)))
    console().print(table)


def plan(
    model: Base,
    spec: Annotated[Path, typer.Option(help="The adapter's spec, YAML or JSON, or a RUN.yaml that has one.")],
    json_: Json = False,
) -> None:
    """Show what a spec does to a model: sites, tensors, parameters, memory. No weights are read."""
    made = make_plan(models.base_path(model), _spec_in(spec))
    if json_:
        print_json(made.to_json())
    else:
        console().print(made)


def train(
    run: Annotated[Path, typer.Argument(help="RUN.yaml: model, data, adapter, training, output_dir.")],
    resume: Annotated[bool, typer.Option(help="Continue from the last checkpoint in output_dir.")] = False,
    pretrain: Annotated[
        bool,
        typer.Option("--pretrain", help="Start from random weights, as configured in the file's section `pretrain`."),
    ] = False,
    json_: Json = False,
) -> None:
    """Train an adapter on your data, as configured in a file."""
    config = RunConfig.from_file(run, pretrain)
    try:
        from .training.run import train as train_run

        report = train_run(config, resume, Console(stderr=True, quiet=_silent()) if json_ else console())
    except KeyboardInterrupt:
        raise _Interrupted(config.go_on) from None
    if not json_:
        console().print(report)
    elif not _silent():
        print(report.to_json())


def inspect(
    directory: Annotated[Path, typer.Argument(help="An adapter directory.")],
    json_: Json = False,
) -> None:
    """Show a saved adapter: method, base model, options, tensors, and whether its files are those that were saved.

    Its method need not be installed.
    """
    header = read_header(directory)
    file = directory / TENSORS
    if not file.is_file():
        raise CheckpointError(f"'{directory}': {TENSORS} is missing")
    file_bytes = file.stat().st_size
    damaged: dict[str, CheckpointError] = {}
    for name, recorded in header.checksums.items():
        try:
            files.check_saved(directory / name, recorded)
        except CheckpointError as error:
            damaged[name] = error
    if json_:
        print_json({**header.model_dump(mode="json"), "file_bytes": file_bytes, "damaged": list(damaged)})
    else:
        _show_header(directory, header, file_bytes, list(damaged))
    for found in damaged.values():
        raise found


def quickstart(
    method: Annotated[str, typer.Option(help="An installed method; see `peft-core methods`.")],
    model: Base = "smollm2-135m",
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 40,
    out: Annotated[Path, typer.Option(help="Folder for the adapter, the loss curve and the metrics.")] = Path("out"),
    data: Annotated[
        Path | None,
        typer.Option(help="JSON Lines with prompt and completion; default: Python's standard library."),
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option("--options", "-o", metavar="NAME=VALUE", help="An option of the method; repeatable."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Same seed, same numbers.")] = 0,
    lr: Annotated[float, typer.Option(min=0.0, help="Highest learning rate.")] = 1e-3,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples per step.")] = 8,
    held_out: Annotated[int, typer.Option(min=1, help="Held-out examples to measure the loss on.")] = 64,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    json_: Json = False,
) -> None:
    """Fine-tune a real model, save, load, merge, and check all of it."""
    parsed = parse_options(options or [])
    plugins.method(method)  # a misspelt name is an error before transformers is imported
    from .quickstart.run import Settings, run

    settings = Settings(
        method,
        model,
        steps,
        out,
        data,
        parsed,
        seed=seed,
        lr=lr,
        batch_size=batch_size,
        held_out=held_out,
        dtype=_dtype(dtype, device),
        device=device,
    )
    report = run(settings, Console(stderr=True) if json_ else console())
    if json_:
        print(report.to_json())
    else:
        console().print(report)
    for failure in report.failures:
        print(f"peft-core: {failure}", file=sys.stderr)
    if report.failures:
        raise typer.Exit(1)


def generate(
    base: Base,
    adapter: Annotated[Path, typer.Option(help="An adapter directory.")],
    prompt: Annotated[str, typer.Option(help="What the model continues; `-` reads standard input.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Write at most this many tokens.")] = 64,
    chat: Annotated[bool, typer.Option(help="Format the prompt with the model's chat template.")] = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    json_: Json = False,
) -> None:
    """Continue a prompt with a base model and a saved adapter, always taking the likeliest token."""
    architecture = read_header(adapter).base.architecture  # what is wrong with it is said before the base is loaded
    import transformers

    can_generate = getattr(getattr(transformers, architecture, None), "can_generate", None)
    if can_generate is not None and not can_generate():
        raise ModelError(
            f"'{adapter}' was trained on a {architecture}, which writes no text; in Python, peft_core.load puts it on its base"
        )
    text = _from_stdin() if prompt == "-" else prompts.whole_text(prompt, "--prompt")
    model, tokenizer = models.load_base(base, _dtype(dtype, device), device)
    load(model, adapter)
    if chat:
        if not tokenizer.chat_template:
            raise ModelError(f"{base} has no chat template; leave out --chat")
        message = [{"role": "user", "content": text}]
        text = prompts.rendered_chat(message, tokenizer, prompt=True)
    written = prompts.complete(model, tokenizer, text, max_new_tokens, rendered=chat)
    if json_:
        print_json({"prompt": text, "completion": written})
    else:
        print(written)


def new_method(
    name: Annotated[str, typer.Argument(help="Name of the method: lower-case letters, digits and '_'.")],
    directory: Annotated[Path, typer.Option("--directory", "-d", help="Where to create the package.")] = Path("."),
) -> None:
    """Create a package for a method of your own; it passes the conformance suite as it is."""
    root = scaffold.new_method(name, directory)
    typer.echo(
        f'created {root}; next:\n  pip install -e "{root}[testing]"\n  pytest --pyargs peft_core.testing --method {name}'
    )


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """`["r=16", "share=AB"]` as `{"r": 16, "share": "AB"}`; values are read as YAML.

    Raises:
        SpecError: a pair is not NAME=VALUE, or its value is not YAML.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator or not name:
            raise SpecError(f"--options {pair}: expected NAME=VALUE, such as r=16")
        try:
            options[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise SpecError(f"--options {pair}: the value is not YAML") from error
    return options


def _spec_in(file: Path) -> AdapterSpec:
    """The spec in a file of its own, or in a RUN.yaml's section `adapter`."""
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):  # said by `from_file`
        data = None
    section = data.get("adapter") if isinstance(data, dict) else None
    if isinstance(section, dict):
        return AdapterSpec.model_validate(section)
    return AdapterSpec.from_file(file.parent / section if isinstance(section, str) else file)


def _from_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"the prompt from standard input is not UTF-8: {error}") from None


def _dtype(name: str, device: str) -> torch.dtype:
    if name == "auto":
        return models.fast_dtype(models.checked_device(device))
    if name not in DTYPE_OF_NAME:
        known = ["auto", *DTYPE_OF_NAME]
        raise SpecError(f"unknown dtype {name!r}{suggestion(name, known)}; expected one of {listed(known)}")
    return DTYPE_OF_NAME[name]


def _show_header(directory: Path, header: AdapterFile, file_bytes: int, damaged: list[str]) -> None:
    summary = Table(title=f"Adapter: {escape(str(directory))}", title_justify="left", show_header=False)
    share = 100 * header.num_trainable / max(1, header.base.num_parameters)
    rows = {
        "method": f"{header.method.name} ({header.method.distribution} {header.method.version})",
        "base model": f"{header.base.architecture} {header.base.name}".strip(),
        "fingerprint": header.base.fingerprint,
        "options": ", ".join(f"{k}={json.dumps(v)}" for k, v in header.spec.get("options", {}).items()),
        "adapted layers": str(len(header.sites)),
        "trained in full": ", ".join(header.trained) or "none",
        "parameters": f"{header.num_trainable:,} ({share:.3f} % of the base)",
        "tensors": f"{len(header.tensors)} in {size(file_bytes)}",
        "damaged files": ", ".join(damaged) or "none",
        "seed": str(header.seed),
        "optimizer steps": str(header.steps) if header.steps else "",
        "format version": str(header.format_version),
    }
    for label, value in rows.items():
        if value:
            summary.add_row(label, escape(value))
    groups = Table(title="Sharing groups", title_justify="left")
    for heading in ("group", "borrowers", "tensors"):
        groups.add_column(heading, justify="right" if heading == "borrowers" else "left")
    for group in header.groups:
        held = [*group.tensors.items(), *((f"{name} (fixed)", shape) for name, shape in group.fixed.items())]
        shapes = ", ".join(f"{name} {' × '.join(map(str, shape))}" for name, shape in held)
        groups.add_row(escape(group.name), str(len(group.members)), escape(shapes))
    console().print(summary, groups)


def console() -> Console:
    """Standard output; wide enough for tables where no terminal says how wide it is."""
    made = Console(quiet=_silent())
    if not made.is_terminal:
        made.width = max(made.width, 120)
    return made


def _silent() -> bool:
    """Whether this is one of several processes of a run (torchrun's) but not the first, which alone prints."""
    return os.environ.get("RANK", "0") != "0"


def print_json(value: Any) -> None:
    """Plain data on standard output, for programs."""
    print(json.dumps(value, indent=2))


if __name__ == "__main__":
    main()
