"""The distributions of this repository, found by looking: whatever is under packages/ and has sources.

python tools/packages.py list
python tools/packages.py install [--editable] [NAME[EXTRA,...] ...]     # all; the names add extras
python tools/packages.py wheels OUT [DIRECTORY ...]                     # all, and those directories
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def packages() -> dict[str, Path]:
    """Directory name under packages/ → its path, core first so that the others find it installed."""
    found = [p.parent for p in (ROOT / "packages").glob("*/pyproject.toml") if (p.parent / "src").is_dir()]
    return {path.name: path for path in sorted(found, key=lambda p: (p.name != "core", p.name))}


def pip(*arguments: str) -> None:
    """Run this interpreter's pip under the constraints that it is given, else the repository's."""
    environment = {"PIP_CONSTRAINT": str(ROOT / "constraints.txt"), **os.environ}
    command = [sys.executable, "-m", "pip", *arguments, "--quiet"]
    status = subprocess.run(command, check=False, env=environment).returncode
    if status:
        raise SystemExit(status)  # pip has said why


def install(wanted_extras: list[str], editable: bool) -> None:
    """Install every package; `core[quickstart]` in `wanted_extras` adds that extra to core."""
    extras = {item.partition("[")[0]: item[item.index("[") :] for item in wanted_extras if "[" in item}
    unknown = sorted(extras.keys() - packages().keys())
    if unknown:
        raise SystemExit(f"no package {', '.join(unknown)} under packages/; there are: {', '.join(packages())}")
    arguments = ["install", "--no-build-isolation"]
    for name, path in packages().items():
        arguments += ["--editable"] if editable else []
        arguments.append(f"{path}{extras.get(name, '')}")
    pip(*arguments)


def wheels(out: Path, more: list[Path]) -> None:
    """Build one wheel per package, and per directory in `more`, into `out`."""
    paths = [str(path) for path in [*packages().values(), *more]]
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), *paths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list")
    installer = commands.add_parser("install")
    installer.add_argument("--editable", action="store_true")
    installer.add_argument("extras", nargs="*", metavar="NAME[EXTRA,...]")
    builder = commands.add_parser("wheels")
    builder.add_argument("out", type=Path)
    builder.add_argument("more", type=Path, nargs="*", metavar="DIRECTORY")
    options = parser.parse_args()

    if options.command == "list":
        print("\n".join(packages()))
    elif options.command == "install":
        install(options.extras, options.editable)
    else:
        wheels(options.out, options.more)


if __name__ == "__main__":
    main()
