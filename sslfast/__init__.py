"""Dual-network semi-supervised segmentation of 3D medical volumes: fused losses and a trainer.

The names below are imported at first use, so that `--help` of the commands does not wait for torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from os import path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sslfast.errors import UserError
    from sslfast.losses import DualContrastiveHead, DualContrastiveLoss, DualLoss
    from sslfast.networks import ResVNet, VNet, WithFeatures
    from sslfast.ops.backend import backend
    from sslfast.ops.linear_logits import LinearLogits
    from sslfast.views import TeacherView, teacher_view

__version__ = "0.2.0"

if not path.isdir(path.join(path.dirname(__file__), "kernels")):
    # In a checkout, `csrc/` and `kernels/` lie beside this folder; setup.py installs them inside it.
    __path__.append(path.dirname(path.dirname(path.abspath(__file__))))

_HOME = {
    "DualContrastiveHead": "sslfast.losses",
    "DualContrastiveLoss": "sslfast.losses",
    "DualLoss": "sslfast.losses",
    "LinearLogits": "sslfast.ops.linear_logits",
    "ResVNet": "sslfast.networks",
    "TeacherView": "sslfast.views",
    "UserError": "sslfast.errors",
    "VNet": "sslfast.networks",
    "WithFeatures": "sslfast.networks",
    "backend": "sslfast.ops.backend",
    "teacher_view": "sslfast.views",
}

__all__ = [
    "DualContrastiveHead",
    "DualContrastiveLoss",
    "DualLoss",
    "LinearLogits",
    "ResVNet",
    "TeacherView",
    "UserError",
    "VNet",
    "WithFeatures",
    "__version__",
    "backend",
    "teacher_view",
]


# Names and modules of version 0.1, and today's
_RENAMED = {"taught_view": "teacher_view", "TaughtView": "TeacherView"}
_MOVED = {
    "checkpoint": "training.checkpoint",
    "distributed": "training.distributed",
    "files": "atomic_io",
    "log": "training.training_log",
    "memory": "training.memory_budget",
    "pictures": "training.plots",
    "streams": "training.streams",
    "ops.ranks": "ops.reduce",
    "data.conversion": "data.public.conversion",
    "data.donor": "data.demo.brain_atlas",
    "data.download": "data.demo.download",
    "data.splits": "data.public.splits",
    "data.subject": "data.demo.subject",
}


class _Moved:
    """Answers the import of a module's old name, which no other finder knows, with the new one."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        package, _, module = name.partition(".")
        if package == "sslfast" and module in _MOVED:
            raise ModuleNotFoundError(f"{name} is called sslfast.{_MOVED[module]} since 0.2.0", name=name)


sys.meta_path.append(_Moved)


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        raise AttributeError(f"sslfast.{name} is called sslfast.{_RENAMED[name]} since 0.2.0")
    if name not in _HOME:
        raise AttributeError(f"module 'sslfast' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
