"""pytest's side of the conformance suite: `pytest --pyargs peft_core.testing --method NAME`.

The options are --peft-method and --peft-support; the short ones exist where the suite is named, so that no other project's
options can clash with them.

pytest loads this in every run of an environment that has peft-core, so it stands beside the package (importing a part of it
imports torch), imports next to nothing and acts only on the suite.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

_SUITE = "PEFT_CORE_CONFORMANCE"
BEGIN, END = "<!-- support: written by pytest --support -->", "<!-- /support -->"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("peft-core", "conformance of peft-core methods")
    short = _SUITE in os.environ or any("peft_core.testing" in argument for argument in sys.argv)
    if short:
        os.environ[_SUITE] = "1"  # for xdist's workers, which are told the arguments, but not in sys.argv
    group.addoption(
        "--peft-method",
        *(["--method"] if short else []),
        action="append",
        dest="peft_methods",
        default=[],
        metavar="NAME",
        help="run the conformance suite on this method (repeatable; default: every installed one)",
    )
    group.addoption(
        "--peft-support",
        *(["--support"] if short else []),
        dest="peft_support",
        type=Path,
        metavar="FILE",
        help=f"write what passed, by model, topic and method, into FILE between '{BEGIN}' and '{END}'",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "families(*names): model families that a conformance test runs on, instead of the core ones",
    )
    config.addinivalue_line(
        "markers",
        "methods(**capabilities): a conformance test for methods with these capabilities only",
    )
    path = config.getoption("peft_support")
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Support(path))


def pytest_sessionstart(session: pytest.Session) -> None:
    """A misspelt `--method` is one line, not an error in every module."""
    names = session.config.getoption("peft_methods")
    if names:
        import pytest

        from peft_core import PluginError, plugins

        try:
            for name in names:
                plugins.method(name)
        except PluginError as error:
            raise pytest.UsageError(f"--method: {error}") from None


class Support:
    """Collects what passed and failed, and writes it as tables.

    Attributes:
        path: the file with the two marks. seen: (kind of row, row, method) → whether all of its tests passed.
        declared: (capability, method) → what its trials declare.
    """

    def __init__(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if BEGIN not in text or END not in text:
            import pytest

            raise pytest.UsageError(
                f"--support: '{path}' needs the lines {BEGIN} and {END}, between which the tables go"
            )
        self.path = path
        self.seen: dict[tuple[str, str, str], bool] = {}
        self.declared: dict[tuple[str, str], set[bool]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, shown in report.user_properties:
            if name == "peft-core" and isinstance(shown, dict) and (report.when == "call" or report.failed):
                method = shown["method"]
                for kind in ("model", "topic"):
                    key = (kind, shown[kind], method)
                    self.seen[key] = self.seen.get(key, True) and report.passed
                for capability, declared in shown["can"].items():
                    self.declared.setdefault((capability, method), set()).add(declared)

    def pytest_sessionfinish(self) -> None:
        before, _, rest = self.path.read_text(encoding="utf-8").partition(BEGIN)
        mark = {True: "✓", False: "✗"}
        passed = {key: mark[value] for key, value in self.seen.items()}
        can = {key: "some options" if len(of) > 1 else "✓" if True in of else "–" for key, of in self.declared.items()}
        tables = (
            _table("what a method declares", can),
            _table("model", {(row, method): cell for (kind, row, method), cell in passed.items() if kind == "model"}),
            _table(
                "what the suite shows",
                {(row, method): cell for (kind, row, method), cell in passed.items() if kind == "topic"},
            ),
        )
        after = rest.partition(END)[2]
        text = "\n\n".join((BEGIN, *tables, END))
        self.path.write_text(f"{before}{text}{after}", encoding="utf-8")


def _table(title: str, cells: dict[tuple[str, str], str]) -> str:
    """Markdown: (row, method) → cell; a test that concerns no model has no row."""
    methods = sorted({method for _, method in cells})
    lines = [f"| {title} | " + " | ".join(methods) + " |", "|---" * (len(methods) + 1) + "|"]
    for row in sorted({row for row, _ in cells if row}):
        lines.append(f"| {row} | " + " | ".join(cells.get((row, method), "–") for method in methods) + " |")
    return "\n".join(lines)
