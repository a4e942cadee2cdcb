"""Subjects made from the brain regions of a person: the anatomy is real, the image is synthesised from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from sslfast.data.demo.subject import SourceAnatomy, normal, smooth_field
from sslfast.data.nifti import Volume

CLASSES = ("background", "thalamus", "striatum and pallidum", "hippocampus and amygdala")
WHITE_MATTER = 83
BETWEEN_SUBJECTS, BETWEEN_REGIONS, TEXTURE = 35.0, 12.0, 20.0  # standard deviations


class Tissue(NamedTuple):
    """Regions with the same mean intensity and class."""

    value: float  # mean in a T1-weighted image, where white matter is 710
    regions: tuple[int, ...]  # Desikan-Killiany numbers, both hemispheres
    label: int = 0  # class


TISSUES = (
    Tissue(150, (0,)),  # outside
    Tissue(480, (*range(1, 35), *range(42, 76))),  # cortex
    Tissue(600, (35, 76), label=1),  # thalamus
    Tissue(520, (36, 77), label=2),  # caudate
    Tissue(545, (37, 78), label=2),  # putamen
    Tissue(640, (38, 79), label=2),  # pallidum
    Tissue(510, (39, 80), label=2),  # accumbens
    Tissue(490, (40, 81), label=3),  # hippocampus
    Tissue(490, (41, 82), label=3),  # amygdala
    Tissue(710, (WHITE_MATTER,)),
)


class BrainAtlas(SourceAnatomy):
    """The brain regions of one person. Each subject gets a new image of them: one value per region, and texture.

    Args:
        atlas: Desikan-Killiany numbers, 0 elsewhere; voxels enclosed by the regions count as white matter.
        tissues: the regions, and the class of each.
    """

    def __init__(self, atlas: Volume, tissues: Sequence[Tissue] = TISSUES) -> None:
        box = tuple(slice(int(index.min()), int(index.max()) + 1) for index in atlas.array.nonzero())
        closing = 8  # voxels of 1 mm: half of the widest gap between two gyri that counts as inside
        regions = np.pad(atlas.array[box].astype(np.uint8), closing)
        enclosed = ndimage.binary_closing(regions, iterations=closing)
        for axis in range(3):  # by slices: in 3D the regions are open at the brain stem, which is not one of them
            slices = np.moveaxis(enclosed, axis, 0)
            slices |= np.stack([ndimage.binary_fill_holes(piece) for piece in slices])
        regions[enclosed & (regions == 0)] = WHITE_MATTER
        classes = np.zeros(WHITE_MATTER + 1, np.uint8)
        for tissue in tissues:
            classes[list(tissue.regions)] = tissue.label
        super().__init__(regions, classes[regions], atlas.affine)
        self.tissues = tissues

    def appearance(self, random: torch.Generator) -> Tensor:
        value = torch.empty(WHITE_MATTER + 1)
        for tissue in self.tissues:
            mean = tissue.value + BETWEEN_SUBJECTS * normal(1, random)
            value[list(tissue.regions)] = mean + BETWEEN_REGIONS * normal(len(tissue.regions), random)
        image = value[self.image.long()]  # [1, 1, X, Y, Z]
        return image + TEXTURE * smooth_field(24, image.shape[2:], random)
