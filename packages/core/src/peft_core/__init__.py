"""peft-core: a plugin-based framework for parameter-efficient fine-tuning of PyTorch models."""

from typing import TYPE_CHECKING, Any

from . import lowrank
from .activation import activate
from .adapter import Adapter, adapters
from .attach import attach, load
from .errors import (
    AdapterError,
    CheckpointError,
    DataError,
    MergeError,
    ModelError,
    OptimizerStepError,
    PeftCoreError,
    PlanError,
    PluginError,
    SpecError,
    TargetError,
)
from .hookspecs import hookimpl
from .kernels import kernels
from .method import Capabilities, Forward, LowRank, MethodInfo, OptimizerStep, Rows, StepMember, Tensors
from .plan import Plan, plan
from .plugins import methods
from .sharing import (
    Constant,
    FromWeight,
    Initializer,
    Layout,
    Normal,
    SharingGroup,
    TensorSpec,
    Uniform,
    Zeros,
    alike,
    kaiming_uniform,
)
from .sites import Site
from .spec import AdapterSpec

if TYPE_CHECKING:
    from .trainer import AdapterTrainer, AdapterTrainerMixin

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "AdapterError",
    "AdapterSpec",
    "AdapterTrainer",
    "AdapterTrainerMixin",
    "Capabilities",
    "CheckpointError",
    "Constant",
    "DataError",
    "Forward",
    "FromWeight",
    "Initializer",
    "Layout",
    "LowRank",
    "MergeError",
    "MethodInfo",
    "ModelError",
    "Normal",
    "OptimizerStep",
    "OptimizerStepError",
    "PeftCoreError",
    "Plan",
    "PlanError",
    "PluginError",
    "Rows",
    "SharingGroup",
    "Site",
    "SpecError",
    "StepMember",
    "TargetError",
    "TensorSpec",
    "Tensors",
    "Uniform",
    "Zeros",
    "activate",
    "adapters",
    "alike",
    "attach",
    "hookimpl",
    "kaiming_uniform",
    "kernels",
    "load",
    "lowrank",
    "methods",
    "plan",
]


def __getattr__(name: str) -> Any:
    """The trainers, which need transformers' (seconds to import) and are imported when asked for."""
    if name not in ("AdapterTrainer", "AdapterTrainerMixin"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import trainer

    return getattr(trainer, name)
