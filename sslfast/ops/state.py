"""The byte map: one uint8 a voxel that says all that the unlabelled losses need to know of it."""

from __future__ import annotations

from torch import Tensor

CLASS = 0b0001_1111  # bits 0-4: the pseudo-label
RELIABLE = 0b0010_0000  # bit 5: its class makes prototypes and plain pseudo-labels
SURE_A = 0b0100_0000  # bit 6: network a's entropy lies below its percentile
SURE_B = 0b1000_0000  # bit 7: network b's


def pseudo_label(state: Tensor) -> Tensor:
    """The pseudo-label of each voxel, int64 of the state's shape."""
    return (state & CLASS).long()


def is_reliable(state: Tensor) -> Tensor:
    """Bool of the state's shape: the voxel makes prototypes and plain pseudo-labels, and is no anchor."""
    return (state & RELIABLE) != 0
