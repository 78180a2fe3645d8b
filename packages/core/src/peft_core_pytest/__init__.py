"""pytest's side of the conformance suite: `pytest --pyargs peft_core.testing --method NAME`.

pytest loads this in every run of an environment that has peft-core, so it stands beside the package (importing a part of it
imports torch), imports nothing and acts only on the suite.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("peft-core", "conformance of peft-core methods")
    group.addoption(
        "--method",
        action="append",
        dest="peft_methods",
        default=[],
        metavar="NAME",
        help="run the conformance suite on this method (repeatable; default: every installed one)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "families(*names): model families that a conformance test runs on, instead of the core ones",
    )
