"""The flags: one uint8 a voxel that says all that the unlabelled losses need to know of a teacher's prediction there."""

from __future__ import annotations

from torch import Tensor

CLASS = 0b0001_1111  # bits 0-4: the predicted class
RELIABLE = 0b0010_0000  # bit 5: its entropy lies below the percentile


def pseudo_label(flags: Tensor) -> Tensor:
    """The class of each voxel, int64 of the flags' shape."""
    return (flags & CLASS).long()


def is_reliable(flags: Tensor) -> Tensor:
    """Bool of the flags' shape: the voxel's class teaches and makes prototypes, and the voxel is no anchor."""
    return (flags & RELIABLE) != 0
