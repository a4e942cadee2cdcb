"""A person of the brain atlas."""

from __future__ import annotations

import numpy as np
import torch

from helpers.anatomy import make_person
from sslfast.data.demo.brain_atlas import TISSUES, WHITE_MATTER


def test_a_persons_images_differ_and_their_structures_do_not() -> None:
    atlas = make_person(0)
    assert set(np.unique(atlas.image)) == {0, 1, *range(35, 42), *range(76, 83), WHITE_MATTER}
    assert atlas.structures.shape[1] == 3
    assert sorted(n for tissue in TISSUES for n in tissue.regions) == list(range(WHITE_MATTER + 1))
    first, second = (atlas.appearance(torch.Generator().manual_seed(i)) for i in (0, 1))
    assert first.shape == atlas.image.shape
    thalamus, white_matter = atlas.structures[0, 0] > 0, atlas.image[0, 0] == WHITE_MATTER
    for image in (first, second):
        assert image[0, 0][thalamus].mean() < image[0, 0][white_matter].mean()
    assert (first - second)[0, 0][thalamus].mean().abs() > 1
