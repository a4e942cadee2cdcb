"""Mirroring that knows left from right: classes that are named by their side change places."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.transforms import RandFlipd, Transform

from sslfast.options import MirrorAxis

AXES: dict[MirrorAxis, int] = {"left-right": 0, "front-back": 1, "head-foot": 2}  # of volumes in R, A, S
SIDE = re.compile(r"(?<![A-Za-z])(?i:left|right)(?![a-z])|(?<=[a-z])(?:Left|Right)(?![a-z])")  # left_x, LeftX, xLeft
PAIRED = re.compile(r"(?i:left|right)|(?<![A-Za-z])(?i:lh|rh|lt|rt|l|r)(?![A-Za-z])|(?<=[a-z])[LR](?![A-Za-z])")
OTHER = {"left": "right", "lh": "rh", "lt": "rt", "l": "r"}
OTHER |= {other: one for one, other in OTHER.items()}


def other_sides(names: Sequence[str]) -> list[int] | None:
    """The class of the other side by class; a class without a side is its own.

    A word left or right is a side. Within a word, or as L, R, lh, rh, lt, rt, it is if another class has the other.

    Args:
        names: class names, in the order of the networks' classes.

    Returns:
        None if a class has a side, and no other class is the same structure on the other side.
    """
    places = {name.lower(): c for c, name in enumerate(names)}
    found = []
    for c, name in enumerate(names):
        other = PAIRED.sub(lambda side: OTHER[side[0].lower()], name).lower()
        if other not in places and SIDE.search(name):
            return None
        found.append(places.get(other, c))
    return found


def mirrors(axes: Sequence[MirrorAxis], names: Sequence[str]) -> list[Transform]:
    """The random flips along these axes of patches {"image", "label"}, each with a probability of one half.

    Left and right classes are exchanged. If one of them has no counterpart, nothing is mirrored from left to right.
    """
    both: Mapping[str, Any] = {"keys": ("image", "label"), "prob": 0.5, "allow_missing_keys": True}
    others = other_sides(names)
    flips: list[Transform] = []
    for axis in safe_axes(axes, names):
        if axis != "left-right" or others is None or others == [*range(len(names))]:
            flips.append(RandFlipd(spatial_axis=AXES[axis], **both))
        else:
            flips.append(_RandMirrord(others, spatial_axis=AXES[axis], **both))
    return flips


def safe_axes(axes: Sequence[MirrorAxis], names: Sequence[str]) -> tuple[MirrorAxis, ...]:
    """Those of the axes along which volumes with these classes can be mirrored."""
    return tuple(axis for axis in axes if axis != "left-right" or other_sides(names) is not None)


class _RandMirrord(RandFlipd):
    """A flip that gives each voxel of the label the class of the other side."""

    def __init__(self, others: Sequence[int], **settings: Any) -> None:
        super().__init__(**settings)
        self.others = torch.tensor([*others, -1])  # the last is that of voxels that are not annotated, -1

    def __call__(self, data: Mapping[Any, torch.Tensor], lazy: bool | None = None) -> dict[Any, torch.Tensor]:
        flipped: dict[Any, torch.Tensor] = super().__call__(data, lazy)
        if self._do_transform and "label" in flipped:
            flipped["label"] = self.others[flipped["label"].long()].to(flipped["label"].dtype)
        return flipped
