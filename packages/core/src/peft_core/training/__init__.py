"""`peft-core train`: one run from its RUN.yaml to the saved adapter. Each file imports only those above it.

| file | holds |
|---|---|
| `rows` | training data as it is read: files, `datasets`, the columns of each format |
| `config` | RUN.yaml |
| `examples` | rows in tokens, with labels where the loss is taken; cutting to a length, packing |
| `batches` | which examples share a batch, and the collators |
| `losses` | losses, and figures of held-out examples |
| `checks` | whether a model reads a batch as it reads the examples alone |
| `pretrain` | a base model with random weights |
| `tasks` | what is trained on what: a causal language model, a classifier |
| `trainers` | transformers' Trainer for a run |
| `report` | what a run measured |
| `directory` | `output_dir`: what a run leaves there, and whether it can start or resume |
| `run` | the run itself |
"""
