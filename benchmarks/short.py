"""The short form of every benchmark, and one table with the targets beside the figures.

    tox run -e bench                                 # this
    tox run -e bench -- train_step.py --rounds 14    # one of them, at length

A few minutes with nothing beside it. Short forms are noisy; what counts stands in docs/performance.md.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

from figures import Figure, show

BENCHMARKS = ("train_step", "generate", "attach", "merge", "optimizer_step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", choices=[*BENCHMARKS, []], help="these alone")
    figures: list[Figure] = []
    for name in parser.parse_args().only or BENCHMARKS:
        print(name, "...", file=sys.stderr, flush=True)
        figures += import_module(name).short()
    show("Short forms of the benchmarks", figures)


if __name__ == "__main__":
    main()
