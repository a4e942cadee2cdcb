"""The gate of each class: it counts on unlabelled voxels as far as it was learned from labels and is found there.

Soft Dice with a teacher that knows no structure yet divides by next to nothing. Its gradient would outweigh the
cross-entropy, and keep both networks at background. The same happens with a structure that the teacher knows from
labels but only suspects in the unlabelled volumes, because they are of another kind or do not have it.
"""

from __future__ import annotations

import torch
from torch import Tensor

EMA_WEIGHT = 0.1  # of this step in the running averages
DICE, CHOSEN, SQUARE, VOXELS = range(4)  # rows of the running averages; VOXELS is a sum over all steps


def first_running(like: Tensor) -> Tensor:
    """The running averages [4, C] before the first step, from a tensor [C]: Dice -1, and no voxels."""
    return torch.stack((torch.full_like(like, -1), *(torch.zeros_like(like) for _ in range(3))))


def update_running(
    running: Tensor | None, class_dice: Tensor, chosen: Tensor, square: Tensor, voxels: Tensor
) -> Tensor:
    """The running averages [4, C] after a step.

    A step in which a number is NaN or infinite changes nothing.

    Args:
        running: those before; None: there was no step.
        class_dice: [C] Dice on the labelled voxels; -1 for a class that is not in the labels.
        chosen: [C] unlabelled voxels whose class it is, by the teacher.
        square: [C] sum of the teacher's squared probabilities over the unlabelled voxels.
        voxels: [C] labelled voxels.
    """
    if running is None:
        running = first_running(class_dice)
    now = torch.stack([value.to(running.dtype) for value in (class_dice, chosen, square)])  # [3, C]
    average = running[:VOXELS].lerp(now, EMA_WEIGHT)
    dice = torch.where(running[DICE] < 0, now[DICE], average[DICE])
    dice = torch.where(now[DICE] >= 0, dice, running[DICE])
    total = running[VOXELS] + voxels.to(running.dtype)
    after = torch.cat((dice.unsqueeze(0), average[CHOSEN:], total.unsqueeze(0)))
    return torch.where(now.isfinite().all(), after, running)


def found_share(running: Tensor) -> Tensor:
    """How far the teacher decides for a class [C] where it considers it, 0 to 1: voxels of its class over the sum of
    its squared probabilities. Near 1 for a structure that is found, near 0 for a haze of small probabilities.
    """
    square = running[SQUARE]
    return torch.where(square > 0, running[CHOSEN] / square.clamp_min(1e-6), 1).clamp_max(1)


def class_gate(running: Tensor, low: float, high: float) -> Tensor:
    """The factor [C] of each class; 1 if `high` is 0.

    It is the `found_share`, times 0 below the running Dice `low`, 1 from `high` on, linear in between.
    """
    if high == 0:
        return torch.ones_like(running[DICE])
    between = (running[DICE] - low) / (high - low if high > low else 1)
    return torch.where(running[DICE] >= high, 1, between.clamp(0, 1)) * found_share(running)


def mean_gate(gate: Tensor, running: Tensor) -> Tensor:
    """The factor [] of losses over all classes: the mean of the gates [C] of the classes that labels have had."""
    counted = ((running[DICE] >= 0) | (gate == 1)).to(gate.dtype)  # 1 for any class: there is no gate
    return (gate * counted).sum() / counted.sum().clamp_min(1)
