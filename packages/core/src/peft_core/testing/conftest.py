"""What the conformance tests are run over: each trial of each chosen method, and the model families."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from . import checks
from .checks import Trial, trials
from .families import CORE, FAMILIES

_INSTALLED = pytest.StashKey[list[Trial]]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "trial" in metafunc.fixturenames:
        if _INSTALLED not in metafunc.config.stash:
            metafunc.config.stash[_INSTALLED] = trials([])
        found = trials(metafunc.config.getoption("peft_methods"))
        if not found:
            raise pytest.UsageError("no method is installed; conformance needs one: pip install peft-method-NAME")
        metafunc.parametrize("trial", found, ids=str)
    if "family" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("families")
        names = marker.args if marker else CORE
        metafunc.parametrize("family", [FAMILIES[name] for name in names], ids=names)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what does not concern a method (`methods(exclusive=False)` is for those whose capabilities say so), and kernels
    of Triton on other layers than the odd-sized ones: interpreted, they take seconds a model, and learn nothing new.
    """
    concerned: list[pytest.Item] = []
    others: list[pytest.Item] = []
    for item in items:
        marker, params = item.get_closest_marker("methods"), _parameters(item)
        can = params["trial"].can if marker and params else None
        fits = all(getattr(can, name) == value for name, value in marker.kwargs.items()) if marker else True
        slow = params.get("kernels") == "triton" and params["family"].name != "odd"
        (concerned if fits and not slow else others).append(item)
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = concerned


def pytest_itemcollected(item: pytest.Item) -> None:
    """Say of each test what it shows, for the table of `--support`."""
    params = _parameters(item)
    if item.config.getoption("peft_support") is None or "trial" not in params:
        return
    family, module = params.get("family"), item.getparent(pytest.Module)
    trial = params["trial"]
    shown = {
        "method": trial.method,
        "can": {
            "several adapters on one layer": not trial.can.exclusive,
            "exact low-rank factors": trial.can.lowrank,
            "dropout": trial.can.dropout,
            "acts on optimizer steps": trial.can.optimizer_step,
            "moves weight into the base": trial.can.owns_base_weight,
        },
        "model": _class_name(family.name) if family else "",
        "topic": (getattr(module, "obj", None).__doc__ or "").partition("\n")[0],
    }
    item.user_properties.append(("peft-core", shown))


def _parameters(item: pytest.Item) -> dict[str, Any]:
    return getattr(getattr(item, "callspec", None), "params", {})


@functools.cache
def _class_name(family: str) -> str:
    return type(FAMILIES[family].build_meta()).__name__


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


@pytest.fixture
def partner(trial: Trial, pytestconfig: pytest.Config) -> Trial:
    """Another trial that may stand on the same sites: of another method if there is one."""
    installed = pytestconfig.stash[_INSTALLED]
    possible = [other for other in installed if not other.can.exclusive and other != trial] or [trial]
    return next((other for other in possible if other.method != trial.method), possible[0])


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` gives NaN, so that reading what nobody wrote is seen."""
    with checks.poisoned_memory():
        yield
