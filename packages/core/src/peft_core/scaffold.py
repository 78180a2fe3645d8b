"""`peft-core new-method`: a package for a method of your own that passes the conformance suite from the start."""

from __future__ import annotations

import keyword
import re
from pathlib import Path
from string import Template

from . import __version__, plugins
from .errors import PluginError

_PROJECT = Template("""\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "peft-method-$name"
version = "0.1.0"
description = "$name: an adapter method for peft-core."
readme = "README.md"
requires-python = ">=3.10"
dependencies = ["peft-core$versions"]

[project.optional-dependencies]
testing = ["peft-core[testing]$versions"]

[project.entry-points."peft_core.plugins"]
$name = "$module"

[tool.hatch.build.targets.wheel]
packages = ["src/$module"]
""")

_README = Template("""\
# peft-method-$name

An adapter method for peft-core. Describe here what it computes, what it is good for, and where it comes from.

    pip install -e ".[testing]"
    pytest --pyargs peft_core.testing --method $name
""")

_METHOD = Template('''\
"""$name: an adapter method for peft-core. It starts as a low-rank update ΔW = B·A; make it yours."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

import peft_core as pc


class Options(BaseModel):
    """The method's own options; every one has a default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    r: int = Field(default=8, ge=1, description="Rank of the update.")


@pc.hookimpl
def peft_method() -> pc.MethodInfo:
    """The method's name, its options, and small ones for the conformance suite to try."""
    return pc.MethodInfo(name="$name", options=Options, summary="a method of your own", trials=({"r": 4},))


@pc.hookimpl
def peft_init(sites: Sequence[pc.Site]) -> pc.Layout:
    """The tensors, and which layers borrow them: here each layer has its own."""
    return pc.Layout(tuple(_group(site) for site in sites))


def _group(site: pc.Site) -> pc.SharingGroup:
    tensors = {
        "A": pc.TensorSpec((site.options.r, site.in_features), pc.kaiming_uniform(site.in_features)),
        "B": pc.TensorSpec((site.out_features, site.options.r), pc.Zeros()),
    }
    return pc.SharingGroup.private(site, tensors)


@pc.hookimpl
def peft_forward(site: pc.Site) -> pc.Forward:
    """What is added to the layer's output. Fill in `add_` and `grad_` to make it fast."""
    return _FORWARD


def _naive(x: Tensor, tensors: pc.Tensors, binding: pc.Tensors) -> Tensor:
    return x @ tensors["A"].to(x.dtype).T @ tensors["B"].to(x.dtype).T  # [..., in] -> [..., out]


_FORWARD = pc.Forward(_naive)


@pc.hookimpl
def peft_merge(site: pc.Site, weight: Tensor, tensors: pc.Tensors, binding: pc.Tensors) -> Tensor:
    """The weight (out × in) that computes what base and adapter compute together."""
    return weight + tensors["B"].to(weight) @ tensors["A"].to(weight)
''')


def new_method(name: str, directory: str | Path) -> Path:
    """Write the package `peft-method-{name}` below `directory`.

    Returns:
        The directory of the package.

    Raises:
        PluginError: the name is not a Python name or is taken by an installed method, or the directory exists or cannot be
            written.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise PluginError(f"'{name}' cannot name a method: use lower-case letters, digits and '_'")
    if keyword.iskeyword(name):
        raise PluginError(f"'{name}' cannot name a method: it is a keyword of Python; choose another name")
    if name in plugins.methods():
        raise PluginError(f"a method '{name}' is already installed; choose another name")
    root, module = Path(directory) / f"peft-method-{name}", f"peft_method_{name}"
    if root.exists():
        raise PluginError(f"'{root}' exists already; choose another name or directory")
    source = root / "src" / module
    try:
        source.mkdir(parents=True)
        for path, template in (
            (root / "pyproject.toml", _PROJECT),
            (root / "README.md", _README),
            (source / "__init__.py", _METHOD),
        ):
            path.write_text(template.substitute(name=name, module=module, versions=_versions()), encoding="utf-8")
        (source / "py.typed").touch()
    except OSError as error:
        raise PluginError(f"cannot write '{root}': {error}") from None
    return root


def _versions() -> str:
    """From this version on, up to the next that may break a plugin."""
    major, minor = map(int, __version__.split(".")[:2])
    return f">={major}.{minor},<{major}.{minor + 1}"
