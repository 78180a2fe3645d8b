"""Models that Accelerate has put its hooks on: a layer whose weights lie on disk and come for its forward alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model
from torch import nn

import peft_core as pc
from peft_core.testing.checks import Trial, gradients, randomise, relative, run, trials, weighted
from peft_core.testing.families import FAMILIES

LLAMA = FAMILIES["llama"]
TRIALS = pytest.mark.parametrize("trial", trials([]), ids=str)
pytestmark = pytest.mark.filterwarnings("ignore")


def dispatched(model: nn.Module, directory: Path) -> nn.Module:
    """With its first layer on disk."""
    where = {name: "cpu" for name, _ in model.named_parameters() if name.startswith("peft_core")}
    for name in ("model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"):
        where[name] = "cpu"
    where["model.layers.0"] = "disk"
    return dispatch_model(model, where, main_device="cpu", offload_dir=directory)


def expected(trial: Trial) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model = LLAMA.build()
    adapter = randomise(pc.attach(model, trial.spec(LLAMA), seed=3))
    return run(LLAMA, model), gradients(adapter, weighted(LLAMA.forward(model, LLAMA.inputs())))


def check(trial: Trial, model: nn.Module, adapter: pc.Adapter) -> None:
    """It computes and learns as without hooks; what needs the weight is refused; and it can be taken off."""
    output, wanted = expected(trial)
    assert model.get_parameter("model.layers.0.mlp.up_proj.weight").device.type == "meta"
    assert relative(run(LLAMA, model), output) <= 1e-6
    found = gradients(adapter, weighted(LLAMA.forward(model, LLAMA.inputs())))
    for key in wanted:
        assert relative(found[key], wanted[key]) <= 1e-5, key
    with pytest.raises(pc.MergeError, match="offloaded"):
        adapter.merge()
    adapter.detach()
    base = LLAMA.build()
    if not trial.can.owns_base_weight:  # its weight is on disk, moved
        assert relative(run(LLAMA, model), run(LLAMA, base)) <= 1e-6


@TRIALS
def test_dispatched_after_attaching(trial: Trial, tmp_path: Path) -> None:
    model = LLAMA.build()
    adapter = randomise(pc.attach(model, trial.spec(LLAMA), seed=3))
    check(trial, dispatched(model, tmp_path), adapter)


@TRIALS
def test_dispatched_before_attaching(trial: Trial, tmp_path: Path) -> None:
    model = dispatched(LLAMA.build(), tmp_path)
    if trial.can.owns_base_weight:
        with pytest.raises(pc.PeftCoreError, match=r"'model\.layers\.0.*' is on the meta device"):
            pc.attach(model, trial.spec(LLAMA))
        return
    adapter = randomise(pc.attach(model, trial.spec(LLAMA), seed=3))
    if not trial.can.additive:
        with pytest.raises(pc.AdapterError, match="the weight is offloaded"):
            run(LLAMA, model)
        return
    check(trial, model, adapter)


def test_a_module_trained_in_full_whose_weights_lie_on_disk(sound_method, tmp_path: Path) -> None:
    spec = pc.AdapterSpec(
        method="sound", options={"r": 4}, targets=["q_proj"], train_modules=["layers.0.mlp", "input_layernorm"]
    )
    model = LLAMA.build()
    adapter = randomise(pc.attach(model, spec))
    output, wanted = run(LLAMA, model), gradients(adapter, weighted(LLAMA.forward(model, LLAMA.inputs())))
    model = dispatched(model, tmp_path)
    assert relative(run(LLAMA, model), output) <= 1e-6
    found = gradients(adapter, weighted(LLAMA.forward(model, LLAMA.inputs())))
    for key in wanted:
        assert relative(found[key], wanted[key]) <= 1e-5, key
    adapter.detach()
    assert relative(run(LLAMA, model), run(LLAMA, LLAMA.build())) <= 1e-6


def test_a_module_whose_weights_lie_on_disk_cannot_start_to_be_trained_in_full(sound_method, tmp_path, refused) -> None:
    spec = pc.AdapterSpec(method="sound", options={"r": 4}, targets=["q_proj"], train_modules=["input_layernorm"])
    built = LLAMA.build()
    randomise(pc.attach(built, spec)).save(tmp_path / "adapter")
    output = run(LLAMA, built)
    model = dispatched(LLAMA.build(), tmp_path / "disk")
    with refused(pc.AdapterError, "layers.0.input_layernorm.weight", "offloaded", "train_modules"):
        pc.attach(model, spec)
    assert not pc.adapters(model)
    pc.load(model, tmp_path / "adapter")  # has its values from the files
    assert relative(run(LLAMA, model), output) <= 1e-6
