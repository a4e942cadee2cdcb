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


def count_reliable(flags: Tensor, num_classes: int) -> Tensor:
    """The number of reliable voxels of each class [C], int64, without synchronisation."""
    return torch.stack([(flags == (RELIABLE | c)).count_nonzero() for c in range(num_classes)])
