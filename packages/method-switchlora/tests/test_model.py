"""SwitchLoRA on a model: nobody calls anything by hand."""

from __future__ import annotations

import copy
import hashlib
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

import peft_core as pc
from peft_method_switchlora import RowAdamW

OPTIONS = {"r": 4, "interval": 4, "freeze_steps": 2, "total_steps": 10**6, "alpha": 2}


class Tiny(nn.Module):
    """A linear layer, one that stores its weight transposed, one too small to switch, and a head."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(20, 24)
        self.second = Conv1D(18, 24)
        self.small = nn.Linear(18, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.small(torch.tanh(self.second(torch.tanh(self.first(x))))))


def make(dtype=torch.float32):
    torch.manual_seed(0)
    model = Tiny().to(dtype)
    nn.init.normal_(model.second.weight, std=0.2)
    return model


def adapt(model, train_modules=(), **options):
    targets = ["first", "second", "small"]
    spec = pc.AdapterSpec(
        method="switchlora", targets=targets, options={**OPTIONS, **options}, train_modules=train_modules
    )
    return pc.attach(model, spec, seed=3)


def batch(index, dtype=torch.float32):
    return torch.randn(8, 20, generator=torch.Generator().manual_seed(index)).to(dtype)


def train(model, optimizer, steps, clip=None):
    for index in steps:
        optimizer.zero_grad()
        model(batch(index, model.head.weight.dtype)).float().pow(2).mean().backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()


def everything(model, adapter, optimizer=None):
    """Every tensor that training changes, by name."""
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    tensors.update({f"state/{name}": value for name, value in adapter.bank.state.items()})
    tensors.update(
        {f"master/{path}": owned.master for path, owned in adapter.bank.owned.items() if owned.master is not None}
    )
    if optimizer is not None:
        for index, state in optimizer.state_dict()["state"].items():
            tensors.update({f"optimizer/{index}/{name}": value for name, value in state.items()})
    return {name: value.detach().clone() for name, value in tensors.items()}


def digest(tensors):
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_attaching_and_switching_leave_the_function(dtype, tolerance):
    model = make(dtype)
    x = batch(0, dtype)
    before = model(x)
    spec = pc.AdapterSpec(
        method="switchlora",
        targets=["first", "second", "small"],
        options=OPTIONS,
        dtype="float64" if dtype == torch.float64 else "float32",
    )
    adapter = pc.attach(model, spec)
    torch.testing.assert_close(model(x), before, rtol=0, atol=tolerance)
    weights = model.first.weight.clone(), model.second.weight.clone(), model.small.weight.clone()
    train(model, torch.optim.SGD(adapter.parameters(), lr=0.0), range(50))
    assert not torch.equal(model.first.weight, weights[0])
    assert not torch.equal(model.second.weight, weights[1])
    assert torch.equal(model.small.weight, weights[2])
    torch.testing.assert_close(model(x), before, rtol=0, atol=tolerance)
    with adapter.disabled():
        assert torch.equal(model(x), before)
    adapter.detach()
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_holds_the_rounded_master(dtype):
    model = make(dtype)
    adapter = adapt(model)
    train(model, RowAdamW(adapter.parameters(), lr=0.01), range(12))
    for path, owned in adapter.bank.owned.items():
        if dtype == torch.float32:
            assert owned.master is None
            continue
        assert owned.master.dtype == torch.float32
        weight = model.get_submodule(path).weight
        weight = weight.T if path == "second" else weight
        assert torch.equal(weight, owned.master.to(dtype))


@pytest.mark.parametrize("optimizer", [RowAdamW, torch.optim.AdamW])
def test_training_lowers_the_loss_and_merging_keeps_the_function(optimizer):
    model = make()
    adapter = adapt(model, train_modules=["head"])
    first = model(batch(0)).pow(2).mean()
    train(model, optimizer(adapter.parameters(), lr=0.01, weight_decay=0.1), range(60), clip=1.0)
    trained = model(batch(0))
    assert trained.pow(2).mean() < first / 2
    assert adapter.steps == 60
    adapter.merge()
    torch.testing.assert_close(model(batch(0)), trained, rtol=0, atol=1e-5)
    adapter.unmerge()
    assert torch.equal(model(batch(0)), trained)
    with torch.no_grad():  # the moved weight is part of the adapter
        adapter.merge_and_detach()
    torch.testing.assert_close(model(batch(0)), trained, rtol=0, atol=1e-5)


def test_the_plan_shows_the_bytes_of_the_candidates():
    model = make(torch.bfloat16)
    plan = pc.plan(model, pc.AdapterSpec(method="switchlora", targets=["first"], options=OPTIONS))
    books = 8 * (2 * 4 + 2 * 4 + 2)
    assert plan.state_bytes == 4 * 20 * (20 + 24) + books
    assert "training keeps 3.7 kB of state" in str(plan)
    assert "training keeps float32 masters of 1 base weights: 1.9 kB" in str(plan)


def test_candidates_are_no_parameters_and_stay_on_the_cpu():
    model = make()
    adapter = adapt(model)
    assert not [name for name in model.state_dict() if "candidates" in name]
    assert adapter.num_trainable == sum(parameter.numel() for parameter in adapter.parameters())
    assert adapter.num_trainable == 4 * (20 + 24 + 24 + 18 + 18 + 4)
    assert all(tensor.device.type == "cpu" for tensor in adapter.bank.state.values())
    assert {key.partition(".")[0] for key in adapter.bank.state} == {"first", "second"}


RESUME = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import peft_core as pc, test_model as t
model = t.make(getattr(torch, sys.argv[4]))
adapter = pc.load(model, sys.argv[2], trainable=True)
optimizer = getattr(t, sys.argv[5], None) or getattr(torch.optim, sys.argv[5])
optimizer = optimizer(adapter.parameters(), lr=0.01, weight_decay=0.1)
optimizer.load_state_dict(torch.load(sys.argv[3], weights_only=True))
t.train(model, optimizer, range(15, 30))
print(adapter.steps, t.digest(t.everything(model, adapter, optimizer)))
"""


@pytest.mark.parametrize(
    "optimizer, order, dtype",
    [
        ("RowAdamW", "consecutive", "float32"),
        ("RowAdamW", "random", "bfloat16"),
        ("AdamW", "random", "float32"),
    ],
)
def test_resuming_in_a_new_process_is_bit_identical(tmp_path, optimizer, order, dtype):
    model = make(getattr(torch, dtype))
    adapter = adapt(model, order=order)
    made = {"RowAdamW": RowAdamW, "AdamW": torch.optim.AdamW}[optimizer]
    stepped = made(adapter.parameters(), lr=0.01, weight_decay=0.1)
    train(model, stepped, range(15))
    adapter.save(tmp_path / "adapter")
    torch.save(stepped.state_dict(), tmp_path / "optimizer.pt")
    train(model, stepped, range(15, 30))
    here = __file__.rpartition("/")[0]
    arguments = [here, str(tmp_path / "adapter"), str(tmp_path / "optimizer.pt"), dtype, optimizer]
    answer = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(RESUME), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.split() == ["30", digest(everything(model, adapter, stepped))]


def test_gradient_accumulation_counts_real_steps():
    """Two halves of a batch accumulated are the whole batch: the same switches at the same steps."""

    def run(parts):
        model = make(torch.float64)
        spec = pc.AdapterSpec(method="switchlora", targets=["first", "second"], options=OPTIONS, dtype="float64")
        adapter = pc.attach(model, spec, seed=3)
        optimizer = RowAdamW(adapter.parameters(), lr=0.01)
        for index in range(10):
            optimizer.zero_grad()
            for part in batch(index, torch.float64).chunk(parts):
                (model(part).pow(2).mean() / parts).backward()
            nn.utils.clip_grad_norm_(adapter.parameters(), 0.1)
            optimizer.step()
        assert adapter.steps == 10
        return everything(model, adapter)

    whole, halves = run(1), run(2)
    for name, tensor in whole.items():
        torch.testing.assert_close(halves[name], tensor, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_gradient_scaler_skips_do_not_count(fused):
    model = make()
    adapter = adapt(model)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for index in range(8):
        optimizer.zero_grad()
        before = everything(model, adapter)
        loss = model(batch(index)).pow(2).mean()
        skipped = index in (2, 5)
        scaler.scale(loss * torch.inf if skipped else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        after = everything(model, adapter)
        assert skipped == all(torch.equal(value, before[name]) for name, value in after.items())
    assert adapter.steps == 6


def test_scaled_and_plain_training_switch_alike():
    digests = set()
    for scaled in (False, True):
        model = make()
        adapter = adapt(model)
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        for index in range(10):
            optimizer.zero_grad()
            scaler.scale(model(batch(index)).pow(2).mean()).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(adapter.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
        digests.add(digest({name: value for name, value in adapter.bank.state.items() if "candidates" not in name}))
    assert len(digests) == 1


def test_accelerate_needs_nothing():
    accelerate = pytest.importorskip("accelerate")
    digests = set()
    for accelerated in (False, True):
        model = make()
        adapter = adapt(model)
        optimizer = RowAdamW(adapter.parameters(), lr=0.01)
        if accelerated:
            accelerator = accelerate.Accelerator(gradient_accumulation_steps=2, cpu=True)
            model, optimizer = accelerator.prepare(model, optimizer)
            for index in range(10):
                for part in (0, 1):
                    with accelerator.accumulate(model):
                        loss = model(batch(index).chunk(2)[part]).pow(2).mean()
                        accelerator.backward(loss)
                        optimizer.step()
                        optimizer.zero_grad()
        else:
            for index in range(10):
                for part in (0, 1):
                    (model(batch(index).chunk(2)[part]).pow(2).mean() / 2).backward()
                optimizer.step()
                optimizer.zero_grad()
        assert adapter.steps == 10
        digests.add(digest(everything(adapter.model, adapter)))
    assert len(digests) == 1


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        return {"x": batch(index)[0]}


class WithLoss(Tiny):
    def forward(self, x):
        return {"loss": super().forward(x).pow(2).mean()}


DEFAULT = transformers.TrainingArguments.__dataclass_fields__["optim"].default  # torch's version decides
ANOTHER = "adamw_torch_fused" if DEFAULT == "adamw_torch" else "adamw_torch"


@pytest.mark.parametrize("optimizer", [None, ANOTHER])
def test_the_trainer_tells_the_length_and_resumes(tmp_path, optimizer):
    """Nothing but the trainer is called; its own checkpoint, half way, leads to the same end."""

    def run(name, resume=None):
        torch.manual_seed(0)
        model = WithLoss()
        adapter = adapt(model, total_steps=None)
        chosen = {} if optimizer is None else {"optim": optimizer}
        arguments = transformers.TrainingArguments(
            str(tmp_path / name),
            max_steps=12,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            save_steps=6,
            learning_rate=0.01,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            **chosen,
        )
        trainer = pc.AdapterTrainer(model=model, args=arguments, train_dataset=Rows())
        trainer.train(resume_from_checkpoint=resume)
        assert (adapter.steps, adapter.total_steps) == (12, 12)
        assert isinstance(trainer.optimizer.optimizer, RowAdamW) == (optimizer is None)
        assert adapter.bank.state["first.next"].tolist() != [0, 2]
        return digest(everything(model, adapter))

    once = run("once")
    assert run("again", resume=str(tmp_path / "once" / "checkpoint-6")) == once


def test_an_unknown_optimizer_is_refused_before_anything_moved():
    model = make()
    adapter = adapt(model)
    optimizer = torch.optim.Adagrad(adapter.parameters(), lr=0.01)
    before = everything(model, adapter)
    with pytest.raises(pc.OptimizerStepError, match=r"torch\.optim\.adagrad\.Adagrad"):
        train(model, optimizer, range(1))
    assert digest(everything(model, adapter)) == digest(before)


def test_the_length_of_the_run_can_be_told_to_the_adapter():
    model = make()
    adapter = adapt(model, total_steps=None)
    optimizer = RowAdamW(adapter.parameters())
    with pytest.raises(pc.OptimizerStepError, match="total_steps"):
        train(model, optimizer, range(1))
    adapter.total_steps = 100
    train(model, optimizer, range(2))
    assert adapter.steps == 2


def switched(model, adapter, optimizer, steps):
    """By how many places switching went on in these steps."""
    places = 0
    for index in steps:
        before = adapter.bank.state["first.next"].clone()
        train(model, optimizer, [index])
        places += ((adapter.bank.state["first.next"] - before) % 4)[0].item()
    return places


def test_a_second_training_switches_as_the_first_did(tmp_path):
    """Its schedule begins anew, and goes on where it was when it is resumed."""
    model = make()
    adapter = adapt(model, total_steps=None, ratio=0.3)
    adapter.begin_run(40)
    first = switched(model, adapter, RowAdamW(adapter.parameters(), lr=0.01), range(40))
    with pytest.warns(UserWarning, match=r"run of 40 steps is over.*begin_run") as caught:
        assert switched(model, adapter, RowAdamW(adapter.parameters(), lr=0.01), range(20)) <= 1
    assert len(caught) == 1
    adapter.begin_run(40)
    optimizer = RowAdamW(adapter.parameters(), lr=0.01)
    second = switched(model, adapter, optimizer, range(3))
    adapter.save(tmp_path)
    moments = copy.deepcopy(optimizer.state_dict())
    second += switched(model, adapter, optimizer, range(3, 40))
    assert min(first, second) >= 6
    assert (adapter.steps, adapter.total_steps) == (100, 40)

    other = make()
    resumed = pc.load(other, tmp_path, trainable=True)
    resumed.total_steps = 40
    again = RowAdamW(resumed.parameters(), lr=0.01)
    again.load_state_dict(moments)
    train(other, again, range(3, 40))
    assert digest(everything(other, resumed, again)) == digest(everything(model, adapter, optimizer))


@pytest.mark.parametrize("length", [0, -5, 10.5, float("nan"), "ten"])
def test_the_length_of_a_run_is_a_positive_number(length):
    adapter = adapt(make(), total_steps=None)
    for tell in (lambda: setattr(adapter, "total_steps", length), lambda: adapter.begin_run(length)):
        with pytest.raises(pc.AdapterError, match=f"positive whole number of optimizer steps, got {length!r}"):
            tell()


def test_saving_says_so_if_the_optimizer_never_stepped(tmp_path):
    model = make()
    adapter = adapt(model)
    model(batch(0)).sum().backward()
    with pytest.raises(pc.OptimizerStepError, match="no optimizer stepped"):
        adapter.save(tmp_path / "out")


def test_a_saved_adapter_is_the_trained_function_whatever_the_base(tmp_path):
    """W₀' is stored, not a difference."""
    model = make()
    adapter = adapt(model)
    train(model, RowAdamW(adapter.parameters(), lr=0.01), range(10))
    trained = model(batch(0))
    adapter.save(tmp_path / "out")
    other = make()
    with torch.no_grad():
        other.first.weight.add_(1)
    pc.load(other, tmp_path / "out")
    assert torch.equal(other(batch(0)), trained)


RANK = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import torch.distributed as dist
import peft_core as pc, test_model as t
rank, world = int(sys.argv[2]), 2
dist.init_process_group("gloo", init_method="file://" + sys.argv[3], rank=rank, world_size=world)
model = t.make(torch.float64)
spec = pc.AdapterSpec(method="switchlora", targets=["first", "second"], options=t.OPTIONS, dtype="float64")
adapter = pc.attach(model, spec, seed=3)
wrapped = torch.nn.parallel.DistributedDataParallel(model)
optimizer = t.RowAdamW(adapter.parameters(), lr=0.01)
for index in range(10):
    optimizer.zero_grad()
    wrapped(t.batch(index, torch.float64).chunk(world)[rank]).pow(2).mean().backward()
    optimizer.step()
torch.save(t.everything(model, adapter), sys.argv[4])
dist.destroy_process_group()
"""


def test_two_processes_switch_as_one(tmp_path):
    here = __file__.rpartition("/")[0]
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                RANK,
                here,
                str(rank),
                str(tmp_path / "store"),
                str(tmp_path / f"{rank}.pt"),
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert digest(ranks[0]) == digest(ranks[1])
    model = make(torch.float64)
    spec = pc.AdapterSpec(method="switchlora", targets=["first", "second"], options=OPTIONS, dtype="float64")
    adapter = pc.attach(model, spec, seed=3)
    optimizer = RowAdamW(adapter.parameters(), lr=0.01)
    for index in range(10):
        optimizer.zero_grad()
        model(batch(index, torch.float64)).pow(2).mean().backward()
        optimizer.step()
    for name, tensor in everything(model, adapter).items():
        torch.testing.assert_close(ranks[0][name], tensor, rtol=1e-9, atol=1e-9)
        if not tensor.is_floating_point():
            assert torch.equal(ranks[0][name], tensor)


@pytest.mark.parametrize("keep", ["host", "directory", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_while_merged_is_refused(dtype, keep, tmp_path):
    model = make(dtype)
    adapter = pc.attach(model, pc.AdapterSpec(method="switchlora", targets=["first", "second"], options=OPTIONS))
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    model(batch(0, dtype)).square().sum().backward()
    adapter.merge(tmp_path if keep == "directory" else keep)
    before = everything(model, adapter)
    with pytest.raises(pc.OptimizerStepError, match=r"is merged.*unmerge it"):
        optimizer.step()
    after = everything(model, adapter)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    if keep != "none":
        adapter.unmerge()
        optimizer.step()
