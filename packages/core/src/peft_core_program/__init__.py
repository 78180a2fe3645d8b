"""The program `peft-core`, from its first moment.

It stands beside the package, whose import takes a second or more (torch): Ctrl-C is one line then, too.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the program; see `peft_core.cli.main`."""
    try:
        from peft_core import cli
    except KeyboardInterrupt:
        print("peft-core: interrupted", file=sys.stderr)
        sys.exit(130)
    cli.main()
