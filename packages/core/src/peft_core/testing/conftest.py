"""What the conformance tests are run over: each trial of each chosen method, and the model families."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from .checks import trials
from .families import CORE, FAMILIES


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "trial" in metafunc.fixturenames:
        found = trials(metafunc.config.getoption("peft_methods"))
        if not found:
            raise pytest.UsageError("no method is installed; conformance needs one: pip install peft-method-NAME")
        metafunc.parametrize("trial", found, ids=str)
    if "family" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("families")
        names = marker.args if marker else CORE
        metafunc.parametrize("family", [FAMILIES[name] for name in names], ids=names)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Tiny products are faster on one thread, the more so beside xdist's other workers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Each test starts from the same global random state and leaves none behind."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
