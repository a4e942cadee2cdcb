"""The gate of each class: it counts on unlabelled voxels as far as the networks have learned it from labels.

Soft Dice with a teacher that knows no structure yet divides by next to nothing. Its gradient would outweigh the
cross-entropy, and keep both networks at background.
"""

from __future__ import annotations

import torch
from torch import Tensor

EMA_WEIGHT = 0.1  # of this step in the running Dice


def update_running_dice(running_dice: Tensor | None, class_dice: Tensor) -> Tensor:
    """The running average [C] of `class_dice`; -1 for a class that no label has had yet.

    A step whose Dice is NaN, from logits that are not finite, changes nothing.
    """
    if running_dice is None:
        running_dice = torch.full_like(class_dice, -1)
    class_dice = class_dice.to(running_dice.dtype)
    average = torch.where(running_dice < 0, class_dice, running_dice.lerp(class_dice, EMA_WEIGHT))
    return torch.where(class_dice >= 0, average, running_dice)


def class_gate(running_dice: Tensor, low: float, high: float) -> Tensor:
    """The factor [C] of each class: 0 below the Dice `low`, 1 from `high` on, linear in between; 1 if `high` is 0."""
    if high == 0:
        return torch.ones_like(running_dice)
    between = (running_dice - low) / (high - low if high > low else 1)
    return torch.where(running_dice >= high, 1, between.clamp(0, 1))


def mean_gate(gate: Tensor, running_dice: Tensor) -> Tensor:
    """The factor [] of losses over all classes: the mean of the gates [C] of the classes that labels have had."""
    counted = ((running_dice >= 0) | (gate == 1)).to(gate.dtype)  # 1 for any class: there is no gate
    return (gate * counted).sum() / counted.sum().clamp_min(1)
