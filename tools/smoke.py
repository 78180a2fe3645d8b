"""What a user of the wheels does first: attach, train, save, load, merge, on a tiny random Llama.

python tools/smoke.py METHOD
"""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import peft_core as pc


def main(method: str) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    base = copy.deepcopy(model)
    tokens = torch.randint(0, config.vocab_size, (4, 16))
    options = {"r": 8} if "r" in pc.methods()[method].options.model_fields else {}

    adapter = pc.attach(model, pc.AdapterSpec(method=method, targets="all-linear", options=options), seed=0)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0], f"the loss did not fall: {losses}"

    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        trained = model(input_ids=tokens).logits
        adapter.save(Path(folder) / "adapter")
        loaded = pc.load(base, Path(folder) / "adapter")
        assert torch.equal(base(input_ids=tokens).logits, trained), "loading changed the output"
        loaded.merge_and_detach()
        assert type(base) is LlamaForCausalLM
        torch.testing.assert_close(base(input_ids=tokens).logits, trained, rtol=1e-4, atol=1e-5)

    program = Path(sys.executable).with_name("peft-core")
    listed = subprocess.run([program, "methods"], check=True, capture_output=True, text=True).stdout
    assert method in listed, listed
    print(f"{method}: loss {losses[0]:.3f} to {losses[-1]:.3f}; saved, loaded and merged")


if __name__ == "__main__":
    main(sys.argv[1])
