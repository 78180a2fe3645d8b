"""The program `peft-core`, from its first moment.

It stands beside the package, whose import takes a second or more (torch): Ctrl-C is one line then, too.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any


def main() -> None:
    """Run the program; see `peft_core.cli.main`."""
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a shell may have it ignored
    if usual:
        signal.signal(signal.SIGINT, _stop)
    from peft_core import cli

    if usual:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.main()


def _stop(*_: Any) -> None:
    """End at once: what is imported may catch a KeyboardInterrupt, and go on without a part of itself."""
    print("peft-core: interrupted", file=sys.stderr, flush=True)
    os._exit(130)
