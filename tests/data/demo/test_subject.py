"""Demo subjects: of seed and index alone, warped without folds, with the structure and its contrast."""

from __future__ import annotations

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch

from helpers.anatomy import SMALL, make_ball
from sslfast.data.demo.subject import SourceAnatomy, jacobian, make_subject, warp


@pytest.fixture(scope="module")
def ball() -> SourceAnatomy:
    return make_ball()


def test_a_subject_depends_on_seed_and_index_alone(ball: SourceAnatomy) -> None:
    before = torch.random.get_rng_state()
    first = make_subject(ball, 2, SMALL)
    make_subject(ball, 0, SMALL)
    for one, again in zip(first, make_subject(ball, 2, SMALL)):
        assert np.array_equal(one, again)
    assert torch.equal(torch.random.get_rng_state(), before), "the global generator is left alone"
    others = [make_subject(ball, 1, SMALL), make_subject(ball, 2, replace(SMALL, seed=6))]
    assert all(other[0].shape != first[0].shape or not np.array_equal(other[0], first[0]) for other in others)


def test_subjects_keep_the_structure_and_its_contrast(ball: SourceAnatomy) -> None:
    truth = float(ball.structures.sum()) * 27
    for i in range(8):
        image, label, affine = make_subject(ball, i, SMALL)
        assert image.shape == label.shape
        assert image.dtype == np.int16
        assert label.dtype == np.uint8
        assert np.allclose(nib.affines.voxel_sizes(affine), 4)
        assert 0.3 * truth < label.sum() * 64 < 3 * truth
        assert image[label == 1].mean() > image[label == 0].mean()


def test_orientations_vary_between_subjects(ball: SourceAnatomy) -> None:
    codes = {nib.aff2axcodes(make_subject(ball, i, SMALL)[2]) for i in range(12)}
    assert {("R", "A", "S"), ("L", "P", "S")} <= codes


def test_the_warp_is_a_diffeomorphism_and_a_folding_one_is_refused() -> None:
    line = torch.linspace(-90, 90, 12)
    position = torch.stack(torch.meshgrid(line, line, line, indexing="ij"), -1)
    moved = warp(position, SMALL.warp, torch.Generator().manual_seed(1))
    assert (moved - position).norm(dim=-1).max() > 2
    assert jacobian((moved / 90).movedim(-1, 0)).min() > 0
    with pytest.raises(ValueError, match="folds"):
        warp(position, ((10, 400.0),), torch.Generator().manual_seed(1))


def test_the_jacobian_of_a_linear_mapping_is_its_determinant() -> None:
    line = torch.linspace(-1, 1, 7)
    x, y, z = torch.meshgrid(line, line, line, indexing="ij")
    assert torch.allclose(jacobian(torch.stack([2 * x, 3 * y + x, -z])), torch.tensor(-6.0), rtol=1e-4)


def test_a_structure_too_small_for_the_grid_gets_no_lesion() -> None:
    image, label = np.full((36, 36, 36), -1000), np.zeros((36, 36, 36), np.uint8)
    label[18, 18, 18] = 1
    parameters = replace(SMALL, lesions=1.0, spacing=8.0, size=(12, 11, 10))
    _, drawn, _ = make_subject(SourceAnatomy(image, label, np.diag([0.5, 0.5, 0.5, 1.0])), 0, parameters)
    assert not drawn.any()
