"""Anatomy to make demo subjects from, in the place of what is downloaded."""

from __future__ import annotations

import nibabel as nib
import numpy as np

from sslfast.data.demo.brain_atlas import BrainAtlas
from sslfast.data.demo.subject import DemoParameters, SourceAnatomy
from sslfast.data.nifti import Volume

SMALL = DemoParameters(
    seed=5, training=3, validation=1, test=2, first_test=7, spacing=4.0, size=(24, 22, 20), size_jitter=2
)


def make_ball() -> SourceAnatomy:
    """A bright ball in soft tissue in air, stored LPS at 3 mm."""
    offset = np.stack(np.meshgrid(*[np.arange(36)] * 3, indexing="ij")) - 17.5
    radius = np.linalg.norm(offset, axis=0)
    image = np.where(radius < 9, 400, np.where(radius < 15, 40, -1000))
    return SourceAnatomy(image, (radius < 9).astype(np.uint8), np.diag([-3.0, -3.0, 3.0, 1.0]))


def make_person(shift: int) -> BrainAtlas:
    """The subjects' source of `make_atlas`."""
    return BrainAtlas(make_atlas(shift))


def make_atlas(shift: int) -> Volume:
    """A block of cortex around white matter in which each structure is a box; stored LIP at 1 mm."""
    regions = np.zeros((52, 56, 60), np.int16)
    regions[4:-4, 4:-4, 4:-4] = 1
    regions[6:-6, 6:-6, 6:-6] = 0
    for i, number in enumerate((*range(35, 42), *range(76, 83))):
        x, y = 9 + 9 * (i % 4) + shift, 9 + 9 * (i // 4)
        regions[x : x + 6, y : y + 6, 20:40] = number
    affine = np.array([[-1.0, 0, 0, 26], [0, 0, 1, -30], [0, -1, 0, 28], [0, 0, 0, 1]])
    return Volume(regions, affine, nib.Nifti1Header())
