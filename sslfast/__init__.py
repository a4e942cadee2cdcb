"""Dual-network semi-supervised segmentation of 3D medical volumes: fused losses and a trainer.

The names below are imported at first use, so that `--help` of the commands does not wait for torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from os import path
from typing import TYPE_CHECKING, Any

from sslfast.renamed import OldModules, old_names

if TYPE_CHECKING:
    from sslfast.apart import forward_apart
    from sslfast.errors import UserError
    from sslfast.losses import DualContrastiveHead, DualContrastiveLoss, DualLoss
    from sslfast.networks import ResVNet, VNet, WithFeatures
    from sslfast.ops.backend import backend
    from sslfast.ops.linear_logits import LinearLogits
    from sslfast.segmenter import Segmentation, Segmenter, load
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
    "Segmentation": "sslfast.segmenter",
    "Segmenter": "sslfast.segmenter",
    "TeacherView": "sslfast.views",
    "UserError": "sslfast.errors",
    "VNet": "sslfast.networks",
    "WithFeatures": "sslfast.networks",
    "backend": "sslfast.ops.backend",
    "forward_apart": "sslfast.apart",
    "load": "sslfast.segmenter",
    "teacher_view": "sslfast.views",
}

__all__ = [
    "DualContrastiveHead",
    "DualContrastiveLoss",
    "DualLoss",
    "LinearLogits",
    "ResVNet",
    "Segmentation",
    "Segmenter",
    "TeacherView",
    "UserError",
    "VNet",
    "WithFeatures",
    "__version__",
    "backend",
    "forward_apart",
    "load",
    "teacher_view",
]


sys.meta_path.append(OldModules)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        old_names("sslfast")(name)
    return getattr(import_module(_HOME[name]), name)
