"""The flags of a voxel, one uint8: the teacher's class, and whether the voxel is reliable."""

from __future__ import annotations

import torch
from torch import Tensor

CLASS = 0b0001_1111  # bits 0-4: the predicted class
RELIABLE = 0b0010_0000  # bit 5: the entropy is below the percentile


def pseudo_label(flags: Tensor) -> Tensor:
    """The class of each voxel, int64 of the flags' shape."""
    return (flags & CLASS).long()


def is_reliable(flags: Tensor) -> Tensor:
    """Bool of the flags' shape. Reliable voxels have a pseudo-label and form the prototypes; others can be anchors."""
    return (flags & RELIABLE) != 0


def out_of_range(flags: Tensor, num_classes: int) -> Tensor:
    """Bool of the flags' shape: a reliable voxel with a class that does not exist, or bits that mean nothing."""
    return flags >= RELIABLE + num_classes


def check_flags(loss: Tensor, flags: Tensor, num_classes: int) -> None:
    """On a CPU, raises if flags out of range, which make it NaN, spoiled a loss []."""
    if flags.device.type != "cpu" or torch.compiler.is_compiling() or not loss.isnan():
        return
    wrong = out_of_range(flags, num_classes).nonzero()
    if len(wrong):
        first = tuple(wrong[0].tolist())
        raise ValueError(
            f"flags holds {len(wrong)} values above {RELIABLE + num_classes - 1}, that of a reliable voxel of the last "
            f"of {num_classes} classes; the first, {int(flags[first])}, is at {first}"
        )


def count_reliable(flags: Tensor, num_classes: int) -> Tensor:
    """The number of reliable voxels of each class [C], int64, without synchronisation."""
    return torch.stack([(flags == (RELIABLE | c)).count_nonzero() for c in range(num_classes)])
