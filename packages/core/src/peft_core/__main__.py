"""`python -m peft_core`, and so `torchrun -m peft_core`: the program `peft-core`."""

from .cli import main

main()
