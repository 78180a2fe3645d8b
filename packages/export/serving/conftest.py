"""What the serving tests share.

These tests need vLLM: `tox run -e vllm`. They are outside `tests`, which run without it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before vLLM is imported. In this process the engine starts in seconds; the server's is a process of its own.
os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_NO_USAGE_STATS="1",
)

import pytest

from packages.export.serving.reference import Reference
from peft_core.testing.checks import trials


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    found = trials([])
    # A method can differ in kind with its options: one of each kind is merged.
    kinds = {(trial.method, trial.can): trial for trial in reversed(found)}
    wanted = {"exact": [trial for trial in found if trial.can.lowrank], "kind": list(reversed(kinds.values()))}
    for name, values in wanted.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values, ids=str)


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    yield Reference(tmp_path_factory.mktemp("adapters"))
