"""Mirrors that know left from right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from helpers.volumes import decoded_case
from sslfast.data.mirror import mirrors, other_sides
from sslfast.data.patches import PatchDataset
from sslfast.options import Augment, MirrorAxis


@pytest.mark.parametrize(
    ("names", "others"),
    [
        (["background", "heart"], [0, 1]),
        (["background", "left kidney", "right kidney"], [0, 2, 1]),
        (["background", "Kidney_Right", "spine", "Kidney_Left"], [0, 3, 2, 1]),
        (["background", "left ventricle"], None),
        (["background", "LeftLung", "RightLung"], [0, 2, 1]),
        (["background", "LungLeft", "LungRight"], [0, 2, 1]),
        (["background", "LungLeft"], None),
        (["background", "leftkidney", "rightkidney"], [0, 2, 1]),
        (["background", "kidney_L", "kidney_R", "lh cortex", "rh cortex"], [0, 2, 1, 4, 3]),
        (["background", "Hippocampus (R)", "Hippocampus (L)", "vertebra L1"], [0, 2, 1, 3]),
        (["background", "ThalamusL", "ThalamusR", "rt"], [0, 2, 1, 3]),
        (["background", "cleft", "bright"], [0, 1, 2]),
        (["background", "hippocampus (left)", "hippocampus (right)", "left-out"], None),
    ],
)
def test_sides_are_found_by_name(names: list[str], others: list[int] | None) -> None:
    assert other_sides(names) == others


def dataset(folder: Path, names: list[str], mirror: tuple[MirrorAxis, ...], augment: Augment = "flip") -> PatchDataset:
    """A bright structure of class 1 at one end of each axis, and of class 2 at the other end of the first."""
    label = np.zeros((12, 12, 12), np.int16)
    label[1:3, 1:3, 1:3] = 1
    label[9:11, 1:3, 1:3] = 2
    label[5, 5, 5] = -1
    case = decoded_case(folder, "a", label.astype(np.float32), label)
    return PatchDataset([case], (12, 12, 12), augment=augment, foreground=0, mirror=mirror, names=names)


def seen(patches: PatchDataset) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(s["image"][0].numpy(), s["label"][0].numpy()) for s in (patches[(0, seed)] for seed in range(40))]


def test_left_stays_left_in_a_mirror(tmp_path: Path) -> None:
    views = seen(dataset(tmp_path, ["background", "left lung", "right lung"], ("left-right",)))
    assert all((label[1:3, 1:3, 1:3] == 1).all() and (label[9:11, 1:3, 1:3] == 2).all() for _, label in views)
    assert {float(image[1, 1, 1]) for image, _ in views} == {1, 2}  # the image is mirrored
    assert all((label == -1).sum() == 1 for _, label in views)


def test_without_a_counterpart_nothing_is_mirrored_from_left_to_right(tmp_path: Path) -> None:
    views = seen(dataset(tmp_path, ["background", "left atrium", "aorta"], ("left-right", "head-foot")))
    assert {int(label[1, 1, 1]) + int(label[1, 1, 10]) for _, label in views} == {1}
    assert {int(label[1, 1, 1]) for _, label in views} == {0, 1}  # from head to foot
    assert all(not (label[1:3] == 2).any() for _, label in views)


@pytest.mark.parametrize(
    ("axis", "place"), [("left-right", (10, 1, 1)), ("front-back", (1, 10, 1)), ("head-foot", (1, 1, 10))]
)
def test_an_axis_is_mirrored_if_it_is_chosen(tmp_path: Path, axis: MirrorAxis, place: tuple[int, int, int]) -> None:
    names = ["background", "one", "two"]
    assert len(mirrors((axis,), names)) == 1
    moved = {bool(label[place] > 0 and label[1, 1, 1] != 1) for _, label in seen(dataset(tmp_path, names, (axis,)))}
    assert moved == {False, True}
    assert not mirrors((), names)
