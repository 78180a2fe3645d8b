"""DDP and FSDP2 on two processes give the gradients of one process, and every shared tensor is reduced once."""

from __future__ import annotations

import copy
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import peft_core as pc
from peft_core.testing.families import FAMILIES

IDS = torch.randint(0, 50, (4, 7), generator=torch.Generator().manual_seed(5))
OWNING = [n for n, info in pc.methods().items() if info.can(info.options(**info.trials[0])).owns_base_weight]
SHARDED = [name for name in pc.methods() if name not in OWNING]


def attached(method: str, *in_full: str) -> tuple[nn.Module, pc.Adapter]:
    """A tiny Llama with an adapter whose tensors are not zero, the same in every process; its head is trained in full, or what
    is named.
    """
    model = FAMILIES["llama"].build()
    options = dict(pc.methods()[method].trials[0])
    adapter = pc.attach(model, pc.AdapterSpec(method=method, options=options, train_modules=in_full or ("lm_head",)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.1, generator=generator)
    return model, adapter


def gradients(model: nn.Module, adapter: pc.Adapter, ids: Tensor) -> dict[str, Tensor]:
    """Full gradients by key."""
    model(ids).logits.square().mean().backward()
    found = {key: parameter.grad for key, parameter in adapter.named_parameters() if parameter.grad is not None}
    return {key: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for key, grad in found.items()}


def largest_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(((found[key] - expected[key]).norm() / expected[key].norm()).item() for key in expected)


def worker(rank: int, port: int, out: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    mine = IDS[2 * rank : 2 * rank + 2]
    results: dict[str, Any] = {}
    for method in pc.methods():
        model, adapter = attached(method)
        wrapped = DistributedDataParallel(model)
        reduced: list[int] = []

        def count(reduced, bucket):  # torch refuses annotations that are strings
            reduced.append(sum(parameter.numel() for parameter in bucket.parameters()))
            work = dist.all_reduce(bucket.buffer().div_(2), async_op=True)
            return work.get_future().then(lambda done: done.value()[0])

        wrapped.register_comm_hook(reduced, count)
        results[f"ddp {method}"] = gradients(wrapped, adapter, mine)
        results[f"reduced {method}"] = sum(reduced) / adapter.num_trainable
    mesh = init_device_mesh("cpu", (2,))
    for method in SHARDED:
        model, adapter = attached(method)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
        results[f"fsdp2 {method}"] = gradients(model, adapter, mine)
        optimizer.step()
        adapter.save(f"{out}/{method}")
        results[f"logits {method}"] = model(IDS).logits.detach()
    model, adapter = attached(SHARDED[0], "model.layers.1")
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    results["fsdp2 in full"] = gradients(model, adapter, mine)
    if rank == 0:
        torch.save(results, f"{out}/results.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("distributed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(worker, args=(port, str(out)), nprocs=2)
    return out, torch.load(out / "results.pt", weights_only=True)


@pytest.mark.parametrize("method", list(pc.methods()))
def test_ddp_gives_the_gradients_of_one_process(method: str, run: tuple[Path, dict[str, Any]]) -> None:
    expected = gradients(*attached(method), IDS)
    assert largest_error(run[1][f"ddp {method}"], expected) <= 1e-5


@pytest.mark.parametrize("method", list(pc.methods()))
def test_ddp_reduces_every_tensor_once_per_step(method: str, run: tuple[Path, dict[str, Any]]) -> None:
    assert run[1][f"reduced {method}"] == 1.0


@pytest.mark.parametrize("method", SHARDED)
def test_fsdp2_gives_the_gradients_of_one_process(method: str, run: tuple[Path, dict[str, Any]]) -> None:
    expected = gradients(*attached(method), IDS)
    assert largest_error(run[1][f"fsdp2 {method}"], expected) <= 1e-5


def test_fsdp2_may_shard_a_module_trained_in_full_by_itself(run: tuple[Path, dict[str, Any]]) -> None:
    expected = gradients(*attached(SHARDED[0], "model.layers.1"), IDS)
    assert largest_error(run[1]["fsdp2 in full"], expected) <= 1e-5


@pytest.mark.parametrize("method", SHARDED)
def test_an_adapter_saved_under_fsdp2_is_the_trained_one(method: str, run: tuple[Path, dict[str, Any]]) -> None:
    model = FAMILIES["llama"].build()
    pc.load(model, run[0] / method)
    torch.testing.assert_close(model(IDS).logits, run[1][f"logits {method}"], rtol=0, atol=1e-5)


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """One process: what divides weights does so all the same."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def sharded(model: nn.Module, mesh: DeviceMesh) -> None:
    fully_shard(model, mesh=mesh)


def sharded_and_run(model: nn.Module, mesh: DeviceMesh) -> None:
    """The root's weights stay gathered after a forward."""
    fully_shard(model, mesh=mesh)
    model(torch.randn(2, 63))


def partly_sharded(model: nn.Module, mesh: DeviceMesh) -> None:
    fully_shard(model[1], mesh=mesh)


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    parallelize_module(model, mesh, {"0.up": ColwiseParallel()})


DIVISIONS = {sharded: "the model", sharded_and_run: "the model", partly_sharded: "'1'", tensor_parallel: "'0.up'"}


@pytest.mark.parametrize(("divide", "place"), DIVISIONS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_a_divided_model_takes_no_adapter_and_no_merge(
    divide, place: str, mesh, blocks, spec, tmp_path, refused
) -> None:
    plain, merged = copy.deepcopy(blocks), copy.deepcopy(blocks)
    adapter, other = pc.attach(blocks, spec), pc.attach(merged, spec)
    adapter.save(tmp_path / "saved")
    other.merge()
    for model in (plain, blocks, merged):
        divide(model, mesh)
    for put_on in (lambda: pc.attach(plain, spec), lambda: pc.load(plain, tmp_path / "saved")):
        with refused(pc.AdapterError, place, "divided", "attach or load first"):
            put_on()
    for change in (adapter.merge, adapter.merge_and_detach, other.unmerge, lambda: other.disabled().__enter__()):
        with refused(pc.MergeError, place, "divided", "peft-core merge"):
            change()
    assert adapter.active and other.merged
    if divide is tensor_parallel:
        with refused(pc.AdapterError, place, "tensor parallelism", "exclude it"):
            blocks(torch.randn(2, 63))


@pytest.mark.parametrize("gathered_before", [False, True])
def test_the_base_of_what_is_trained_in_full_stays_its_own_under_fsdp2(gathered_before: bool, mesh: DeviceMesh) -> None:
    """FSDP2 asks modules for their parameters in the first forward, in which the copies that are trained stand in for them."""
    base = FAMILIES["llama"].build()(IDS).logits
    model, adapter = attached(SHARDED[0], "lm_head", "model.layers.1.input_layernorm")
    expected = model(IDS).logits
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if gathered_before:
        model.unshard()
    for _ in range(2):
        torch.testing.assert_close(model(IDS).logits, expected)
        with adapter.disabled():
            torch.testing.assert_close(model(IDS).logits, base)
