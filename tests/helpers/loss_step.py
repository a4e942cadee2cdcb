"""The loss of one step, as a function of the maps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import sslfast
from helpers.compare import Compute
from helpers.maps import random_map

TERMS = (
    *("ce", "dice", "discrepancy", "mask_voxels", "winner", "thresholds", "pseudo", "pseudo_dice", "contrast"),
    *("kept_fraction", "reliable", "anchors"),
)
PRESETS = ("recommended", "paper")


def whole_step(labels: Tensor, step: int | Tensor = 900, teacher: Tensor | None = None, **options: Any) -> Compute:
    """The losses [2] and `TERMS`."""

    def compute(logits_a: Tensor, logits_b: Tensor, features_a: Tensor, features_b: Tensor) -> list[Tensor]:
        options_here = {"ramp_steps": 1000, "anchors": 20, "negatives": 30, "gate": (0, 0), "contrast_weight": 0.1}
        options_here |= options
        criterion = sslfast.DualContrastiveLoss(logits_a.shape[1], **options_here)
        result = criterion(logits_a, logits_b, features_a, features_b, labels, step=step, teacher=teacher)
        known = [name for name in TERMS if name in result.terms]  # two are of the contrast
        new = [name for name in result.terms if name not in TERMS]  # of whoever adds a term
        return [torch.stack((result.loss_a, result.loss_b)), *(result.terms[name] for name in (*known, *new))]

    return compute


def step_inputs(
    classes: int, size: tuple[int, ...], dtype: torch.dtype = torch.float32, unlabelled: int = 2, width: int = 6
) -> tuple[list[Tensor], Tensor]:
    """Logits and features of both networks, and labels of the first two volumes."""
    volumes = 2 + unlabelled
    maps = [random_map(volumes, c, size, dtype) for c in (classes, classes, width, width)]
    return maps, torch.randint(-1, classes, (2, *size))


def gradients_of(compute: Compute, maps: list[Tensor]) -> list[Tensor]:
    """The values, and the gradients of the losses."""
    leaves = [m.detach().requires_grad_() for m in maps]
    values = compute(*leaves)
    (values[0] * torch.tensor([1.0, 0.7], dtype=values[0].dtype)).sum().backward()
    return [v.detach() for v in values] + [torch.zeros_like(m) if m.grad is None else m.grad for m in leaves]
