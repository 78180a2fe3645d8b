"""`peft-core quickstart`: fine-tune a real model, save, load into a fresh base, merge, and check all of it.

`docstrings` is its data, `loop` a plain training loop, `report` what it measured, `run` the sequence itself.
"""
