"""The conformance suite that every method must pass, run by its declared capabilities.

    pip install "peft-core[testing]"
    pytest --pyargs peft_core.testing --method NAME

A method's own tests may use the suite's tiny models (`peft_core.testing.families`) and helpers
(`peft_core.testing.checks`).
"""
