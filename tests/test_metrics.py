"""Every metric against medpy's and MONAI's, by the definition that its name stands for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from medpy.metric import binary as medpy
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance
from scipy.ndimage import gaussian_filter

from sslfast.metrics import DISTANCES, OVERLAPS, case_metrics, dice, jaccard, summarise, surface_distances

SPACINGS = [(1.0, 1.0, 1.0), (0.7, 1.3, 2.5)]


def blob(size: tuple[int, int, int], fraction: float = 0.2) -> np.ndarray:
    """A smooth random mask that often touches the volume's edge."""
    noise = gaussian_filter(np.random.default_rng().normal(size=size), 1.2)
    return noise > np.quantile(noise, 1 - fraction)


@pytest.mark.parametrize("size", [(12, 9, 7), (20, 21, 5), (1, 6, 8), (16, 16, 16)])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_metrics_are_medpys(size: tuple[int, int, int], spacing: tuple[float, float, float]) -> None:
    p, r = blob(size), blob(size, 0.3)
    ours = surface_distances(p, r, spacing)
    assert ours["hd95_pooled"] == pytest.approx(medpy.hd95(p, r, spacing), rel=1e-9)
    assert ours["asd_pred2gt"] == pytest.approx(medpy.asd(p, r, spacing), rel=1e-9)
    assert ours["assd"] == pytest.approx(medpy.assd(p, r, spacing), rel=1e-9)
    assert dice(p, r) == pytest.approx(medpy.dc(p, r))
    assert jaccard(p, r) == pytest.approx(medpy.jc(p, r))


@pytest.mark.parametrize("spacing", SPACINGS)
def test_distances_are_monais(spacing: tuple[float, float, float]) -> None:
    p, r = blob((14, 15, 9)), blob((14, 15, 9))
    tensors = [torch.from_numpy(mask)[None, None] for mask in (p, r)]
    ours = surface_distances(p, r, spacing)
    hd95 = compute_hausdorff_distance(*tensors, include_background=True, percentile=95, spacing=list(spacing))
    asd, assd = (
        compute_average_surface_distance(*tensors, include_background=True, symmetric=symmetric, spacing=list(spacing))
        for symmetric in (False, True)
    )
    assert ours["hd95_max"] == pytest.approx(float(hd95), rel=1e-5)
    assert ours["asd_pred2gt"] == pytest.approx(float(asd), rel=1e-5)
    assert ours["assd"] == pytest.approx(float(assd), rel=1e-5)


@pytest.mark.parametrize("voxel", [(0, 0, 0), (5, 5, 5), (9, 9, 9)])
def test_distances_of_single_voxels_are_the_distance_between_them(voxel: tuple[int, int, int]) -> None:
    p, r = np.zeros((10, 10, 10), bool), np.zeros((10, 10, 10), bool)
    p[0, 0, 0] = r[voxel] = True
    assert surface_distances(p, r) == dict.fromkeys(DISTANCES, pytest.approx(math.dist((0, 0, 0), voxel)))


def test_a_cube_with_a_spur_tells_the_definitions_apart() -> None:
    cube = np.zeros((60, 40, 40), bool)
    cube[10:30, 10:30, 10:30] = True
    spur = cube.copy()
    spur[30:50, 19:22, 19:22] = True
    ours = surface_distances(spur, cube)
    assert ours["hd95_pooled"] == pytest.approx(medpy.hd95(spur, cube))
    tensors = [torch.from_numpy(mask)[None, None] for mask in (spur, cube)]
    assert ours["hd95_max"] == pytest.approx(
        float(compute_hausdorff_distance(*tensors, include_background=True, percentile=95))
    )
    assert ours["hd95_max"] > 4 * ours["hd95_pooled"]


def test_asd_has_a_direction() -> None:
    small, large = np.zeros((20, 20, 20), bool), np.zeros((20, 20, 20), bool)
    small[4:8, 4:8, 4:8], large[4:8, 4:8, 4:16] = True, True
    there, back = surface_distances(small, large), surface_distances(large, small)
    assert there["asd_pred2gt"] < back["asd_pred2gt"]
    assert there["assd"] == pytest.approx(back["assd"])
    assert there["asd_pred2gt"] < there["assd"] < back["asd_pred2gt"]


@given(st.integers(0, 2**32 - 1), st.floats(0.1, 10))
@settings(max_examples=30, deadline=None)
def test_distances_are_symmetric_and_scale_with_the_spacing(seed: int, scale: float) -> None:
    random = np.random.default_rng(seed)
    p, r = random.random((2, 7, 6, 5)) < 0.2
    p[0, 0, 0] = r[-1, -1, -1] = True
    one, other, scaled = surface_distances(p, r), surface_distances(r, p), surface_distances(p, r, (scale,) * 3)
    for name in ("hd95_pooled", "hd95_max", "assd"):
        assert one[name] == pytest.approx(other[name])
    for name in DISTANCES:
        assert scaled[name] == pytest.approx(scale * one[name])
    assert dice(p, r) == pytest.approx(2 * jaccard(p, r) / (1 + jaccard(p, r)))


def test_distances_to_an_empty_mask_are_refused() -> None:
    empty, full = np.zeros((3, 3, 3), bool), np.ones((3, 3, 3), bool)
    for pair in ((empty, full), (full, empty), (empty, empty)):
        with pytest.raises(ValueError, match="must hold a voxel"):
            surface_distances(*pair)


def labels(*classes: int) -> np.ndarray:
    """A label map of 3x4 columns, each class in a row of its own."""
    array = np.zeros((6, 8, 10), np.int16)
    for c in classes:
        array[1:3, c, 2:8] = c
    return array


def test_each_outcome_scores_as_it_says() -> None:
    rows = case_metrics(labels(1, 3), labels(1, 2), 5, (1.0, 1.0, 2.0))
    assert [row["outcome"] for row in rows] == ["found", "missed", "spurious", "absent"]
    assert [row["dice"] for row in rows[:3]] == [1, 0, 0]
    assert math.isnan(rows[3]["dice"])
    assert rows[0]["hd95_pooled_mm"] == 0
    assert rows[1]["hd95_pooled_vox"] == rows[2]["assd_mm"] == math.inf
    assert math.isnan(rows[3]["hd95_max_mm"])
    assert rows[0]["diagonal_mm"] == pytest.approx(math.dist((0, 0, 0), (6, 8, 20)))


def test_ignored_voxels_count_nowhere() -> None:
    reference, prediction = labels(1), labels(1)
    reference[4:] = -1
    prediction[4:] = 1
    reference[1, 1, 4] = -1  # between the voxels of the class
    row = case_metrics(prediction, reference, 2, (1.0, 1.0, 1.0))[0]
    assert [row[name] for name in OVERLAPS] == [1, 1, 1, 1]
    assert row["hd95_pooled_vox"] == row["volume_error_ml"] == 0


def test_an_empty_prediction_is_neither_perfect_nor_dropped() -> None:
    size, spacing = (1.0, 1.0, 1.0), (1.0, 1.0, 1.0)
    rows = case_metrics(labels(1), labels(1), 2, size) + case_metrics(labels(), labels(1), 2, spacing)
    summary = summarise(rows)
    assert (summary["cases"], summary["n_found"], summary["n_missed"]) == (2, 1, 1)
    assert summary["dice"] == 0.5
    assert summary["hd95_pooled_vox_found"] == 0
    assert summary["hd95_pooled_vox_penalised"] == pytest.approx(math.dist((0, 0, 0), (6, 8, 10)) / 2)
    lost = summarise(rows[1:])
    assert lost["dice"] == 0
    assert math.isnan(lost["hd95_pooled_vox_found"])
    assert lost["hd95_pooled_vox_penalised"] > 10


def test_the_tolerance_is_in_mm_and_a_volume_too_large_is_an_error_above_0() -> None:
    prediction, reference = np.zeros((2, 5, 5, 5), np.int16)
    prediction[1, 1, 1:4] = 1
    reference[1, 1, 1] = 1  # the ends are 0, 2 and 4 mm away
    spacing = (1.0, 1.0, 2.0)
    shares = [case_metrics(prediction, reference, 2, spacing, tolerance=t)[0]["nsd"] for t in (1.9, 2.0, 4.0)]
    assert shares == [2 / 4, 3 / 4, 1]  # of three voxels there and one back
    assert case_metrics(prediction, reference, 2, spacing)[0]["volume_error_ml"] == pytest.approx(0.004)


def test_masks_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"prediction has shape \(2, 3\), reference \(3, 2\); they must be the same"):
        case_metrics(np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8), 2, (1.0, 1.0, 1.0))
