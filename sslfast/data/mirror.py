"""Mirroring that knows left from right: classes that are named by their side change places."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.transforms import RandFlipd, Transform

from sslfast.options import MirrorAxis

AXES: dict[MirrorAxis, int] = {"left-right": 0, "front-back": 1, "head-foot": 2}  # of volumes in R, A, S
SIDE = re.compile(r"(?i)(?<![a-z])(left|right)(?![a-z])")


def other_sides(names: Sequence[str]) -> list[int] | None:
    """The class of the other side by class; a class without a side is its own.

    Args:
        names: class names, in the order of the networks' classes.

    Returns:
        None if a class has a side, and no other class is the same structure on the other side.
    """
    places = {name.lower(): c for c, name in enumerate(names)}
    others = [SIDE.sub(lambda side: "right" if side[0].lower() == "left" else "left", name).lower() for name in names]
    if any(other not in places for other in others):
        return None
    return [places[other] for other in others]


def mirrors(axes: Sequence[MirrorAxis], names: Sequence[str]) -> list[Transform]:
    """The random flips along these axes of patches {"image", "label"}, each with a probability of one half.

    Left and right classes are exchanged. If one of them has no counterpart, nothing is mirrored from left to right.
    """
    both: Mapping[str, Any] = {"keys": ("image", "label"), "prob": 0.5, "allow_missing_keys": True}
    others = other_sides(names)
    flips: list[Transform] = []
    for axis in axes:
        if axis != "left-right" or others == [*range(len(names))]:
            flips.append(RandFlipd(spatial_axis=AXES[axis], **both))
        elif others is not None:
            flips.append(_RandMirrord(others, spatial_axis=AXES[axis], **both))
    return flips


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
