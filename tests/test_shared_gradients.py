"""A tensor that several layers borrow gets one whole gradient per backward; nothing is left behind."""

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import peft_core as pc
from peft_core import gradients as gradients_of_shared
from peft_core.testing.checks import assert_near, gradients, randomise, weighted


@pytest.fixture
def adapter(blocks, spec) -> pc.Adapter:
    return randomise(pc.attach(blocks, spec))


@pytest.fixture
def shared(adapter) -> torch.nn.Parameter:
    """A pool that two layers borrow."""
    return dict(adapter.named_parameters())["pool.up.A"]


def test_hooks_see_the_whole_gradient_once(blocks, adapter, shared) -> None:
    x = torch.randn(4, 63)
    expected = gradients(adapter, weighted(blocks(x)))["pool.up.A"]
    seen: list[torch.Tensor] = []
    shared.register_hook(lambda gradient: seen.append(gradient.clone()))
    shared.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.clone()))
    weighted(blocks(x)).backward()
    assert len(seen) == 2
    for gradient in seen:
        assert_near(gradient, expected, 1e-6, "gradient in a hook")


def test_a_failed_backward_leaves_nothing_to_the_next(blocks, adapter) -> None:
    x = torch.randn(4, 63)
    expected = gradients(adapter, weighted(blocks(x)))

    def fails(gradient: torch.Tensor) -> None:
        raise ZeroDivisionError

    middle = blocks[0](x)
    middle.register_hook(fails)
    with pytest.raises(ZeroDivisionError):
        weighted(blocks[1](middle)).backward()
    for parameter in adapter.parameters():
        parameter.grad = None
    found = gradients(adapter, weighted(blocks(x)))
    for key in expected:
        assert_near(found[key], expected[key], 1e-6, f"gradient of '{key}'")


def test_streams_have_sums_of_their_own(blocks, adapter, monkeypatch) -> None:
    """The engine runs a layer's backward on the stream of its forward, and waits only for gradients that it carries itself."""
    now, took = [0], []
    shared = gradients_of_shared.SharedGradient
    take = shared._take
    monkeypatch.setattr(gradients_of_shared._torch, "stream_number", lambda tensor: now[0])
    monkeypatch.setattr(shared, "_take", lambda self, stream: took.append(stream) or take(self, stream))
    x = torch.randn(4, 63)
    expected = gradients(adapter, weighted(blocks(x)))
    for streams in ((0, 1), (1, 0), (1, 1), (0, 0)):  # of the two blocks, which borrow the same tensors
        took.clear()
        y = x
        for block, stream in zip(blocks, streams, strict=True):
            now[0] = stream
            y = block(y)
            y.register_hook(lambda gradient, stream=stream: now.__setitem__(0, stream))  # as the engine does
        found = gradients(adapter, weighted(y))
        assert set(took) == set(streams)
        for key in expected:
            assert_near(found[key], expected[key], 1e-6, f"gradient of '{key}'")


def test_another_thread_leaves_a_running_backward_alone(blocks, adapter) -> None:
    x = torch.randn(4, 63)
    expected = gradients(adapter, weighted(blocks(x)))
    with ThreadPoolExecutor(1) as other:

        def meanwhile(gradient: torch.Tensor) -> None:
            other.submit(lambda: weighted(blocks(x)).backward()).result()

        middle = blocks[0](x)
        middle.register_hook(meanwhile)
        for parameter in adapter.parameters():
            parameter.grad = None
        weighted(blocks[1](middle)).backward()
    for key, parameter in adapter.named_parameters():
        assert_near(parameter.grad, 2 * expected[key], 1e-6, f"gradient of '{key}'")


def test_second_derivatives_are_refused_and_right_in_the_reference(blocks, adapter, shared, refused) -> None:
    x = torch.randn(4, 63)

    def penalty() -> torch.Tensor:
        (gradient,) = torch.autograd.grad(weighted(blocks(x)), [shared], create_graph=True)
        return gradient.square().sum()

    with refused(pc.AdapterError, "create_graph=True", "pc.kernels('naive')"):
        penalty()
    with pc.kernels("naive"):
        (curvature,) = torch.autograd.grad(penalty(), [dict(adapter.named_parameters())["0.up.B"]])
    assert curvature.abs().max() > 0


def test_several_gradients_at_once_are_refused_and_right_in_the_reference(blocks, adapter, shared, refused) -> None:
    x = torch.randn(4, 63)

    def rows() -> torch.Tensor:
        y = blocks(x).sum(0)
        (gradients,) = torch.autograd.grad(y, [shared], torch.eye(len(y))[:2], is_grads_batched=True)
        return gradients

    with refused(pc.AdapterError, "is_grads_batched=True", "pc.kernels('naive')"):
        rows()
    with refused(pc.AdapterError, "vmap", "pc.kernels('naive')"):
        y = blocks(x)
        torch.vmap(lambda dy: torch.autograd.grad(y, [shared], dy, retain_graph=True))(torch.ones(2, *y.shape))
    (first,) = torch.autograd.grad(blocks(x).sum(0)[0], [shared])
    with pc.kernels("naive"):
        assert_near(rows()[0], first, 1e-5, "the first of two gradients")


def test_gradients_in_parts_are_noticed_among_several_processes(blocks, adapter, monkeypatch) -> None:
    """Reentrant checkpointing runs a backward for each segment; DDP reduces after the first one."""

    def run(reentrant: bool) -> None:
        x = torch.randn(4, 63, requires_grad=True)
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=reentrant)
        weighted(x).backward()

    run(reentrant=True)
    monkeypatch.setattr(gradients_of_shared, "_distributed", lambda: True)
    run(reentrant=False)
    with pytest.warns(UserWarning, match="use_reentrant=False, or static_graph=True"):
        run(reentrant=True)


def test_backwards_that_do_not_reach_the_tensor_keep_no_memory(blocks, adapter, shared) -> None:
    x = torch.randn(4, 63, requires_grad=True)

    def tensors_alive() -> int:
        gc.collect()
        return sum(type(thing) is torch.Tensor and thing.shape == shared.shape for thing in gc.get_objects())

    def fails() -> None:
        middle = blocks[0](x)
        middle.register_hook(lambda gradient: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            weighted(blocks[1](middle)).backward()

    torch.autograd.grad(weighted(blocks(x)), [x])
    before = tensors_alive()
    for _ in range(5):
        torch.autograd.grad(weighted(blocks(x)), [x])
        fails()
    assert tensors_alive() == before


def test_a_graph_that_is_dropped_frees_what_it_saved(blocks, adapter) -> None:
    x = torch.randn(4, 63)
    gc.collect()
    before = sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
    for _ in range(5):
        weighted(blocks(x))
    gc.collect()
    assert sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()) <= before + 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_tensor_in_another_dtype_gets_its_gradient_in_that(blocks, adapter, shared, dtype) -> None:
    weighted(blocks(torch.randn(4, 63))).backward()
    adapter.parameters()
    for parameter in adapter.parameters():
        parameter.grad = None
    blocks.to(dtype)
    weighted(blocks(torch.randn(4, 63, dtype=dtype))).backward()
    assert shared.dtype == shared.grad.dtype == dtype
    torch.optim.AdamW(adapter.parameters()).step()
