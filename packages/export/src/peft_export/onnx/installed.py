"""What ONNX takes beside this package, imported only by what uses it."""

from __future__ import annotations

import importlib.util

from peft_core import ModelError
from peft_core.errors import listed

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def require_packages() -> None:
    """See that what ONNX takes is installed.

    Raises:
        ModelError: it is not.
    """
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        raise ModelError(f'ONNX needs {listed(missing)}: python -m pip install "peft-export[onnx]"')
