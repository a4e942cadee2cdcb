"""A label map lies where its image lies: headers that are rounded, reordered or flipped, and those that differ."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from helpers.volumes import noise, write_volume
from sslfast import UserError
from sslfast.data.folder import Case
from sslfast.data.nifti import Volume, on_grid_of, read_image, read_label
from sslfast.data.volumes import decode, image_to_grid, label_to_grid
from sslfast.options import Preprocessing

PATHS = (Path("i.nii.gz"), Path("l.nii.gz"))
SIZE = (9, 12, 7)


def turned(degrees: tuple[float, float, float], spacing: tuple[float, float, float] = (0.8, 0.9, 2.5)) -> np.ndarray:
    """The affine of a grid that is turned about x, y and z."""
    rotation = nib.eulerangles.euler2mat(*np.radians(degrees[::-1]))
    return nib.affines.from_matvec(rotation @ np.diag(spacing), [-61.7, 33.1, 12.9])


def volume(array: np.ndarray, affine: np.ndarray) -> Volume:
    return Volume(array, affine, nib.Nifti1Header())


@pytest.mark.parametrize("scale", [1 + 2e-7, 1 - 2e-7, 1 + 1e-5])
@pytest.mark.parametrize("spacing", [0.8, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("size", [32, 40, 48])
def test_a_rounded_header_moves_no_voxel(tmp_path: Path, scale: float, spacing: float, size: int) -> None:
    """A label whose header differs from its image's by rounding is resampled as if it did not."""
    label = np.random.default_rng(1).integers(0, 2, (size, size, size)).astype(np.int16)
    case = Case("a", (tmp_path / "images/a.nii.gz",), tmp_path / "labels/a.nii.gz")
    write_volume(case.image, noise(size, size, size), np.eye(4))
    write_volume(case.label, label.astype(np.uint8), np.diag([scale] * 3 + [1]))
    preprocessing = Preprocessing(spacing=spacing)
    decoded = decode(case, preprocessing, num_classes=2, ignore_label=-1)
    assert decoded.image.shape[1:] == decoded.label.shape
    assert np.array_equal(decoded.label, label_to_grid(volume(label, np.eye(4)), preprocessing))


@pytest.mark.parametrize("degrees", [(45, 0, 0), (0, 45, 0), (0, 0, 45), (45, 45, 45), (44.9999999, 0, 45.0000001)])
def test_axes_between_two_directions_are_turned_alike(degrees: tuple[float, float, float]) -> None:
    """At 45 degrees rounding decides which axis counts as left to right."""
    label = np.random.default_rng(1).integers(0, 3, SIZE).astype(np.int16)
    image = volume(label.astype(np.float32), turned(degrees))
    for seed in range(20):
        jitter = 1 + 1e-7 * np.random.default_rng(seed).normal(size=(4, 4))
        for spacing in (None, 1.1):
            preprocessing = Preprocessing(spacing=spacing, intensity="none")
            placed = on_grid_of(image, volume(label, image.affine * jitter), *PATHS)
            array = label_to_grid(placed, preprocessing)
            assert array.shape == image_to_grid(image, preprocessing).shape[1:]
            if spacing is None:
                assert np.array_equal(array, image_to_grid(image, preprocessing)[0])


def test_a_label_whose_header_holds_the_qform_alone_fits(tmp_path: Path) -> None:
    """The quaternion is stored in float32: corners of a large grid move by up to some hundredths of a voxel."""
    for seed in range(30):
        random = np.random.default_rng(seed)
        affine = turned(tuple(random.uniform(-40, 40, 3)), tuple(random.uniform(0.3, 3, 3)))
        affine[:3, 3] = random.uniform(-300, 300, 3)
        size = (40, 3, 512)
        image = read_image(write_volume(tmp_path / "i.nii", random.normal(size=size).astype(np.float32), affine))
        label = nib.Nifti1Image(np.ones(size, np.uint8), None)
        label.set_qform(affine, 1)
        label.set_sform(None, 0)
        nib.save(label, tmp_path / "l.nii")
        assert np.array_equal(on_grid_of(image, read_label(tmp_path / "l.nii"), *PATHS).affine, image.affine)


@pytest.mark.parametrize("codes", ["LPS", "PIR", "SRA", "ILP", "RAI"])
def test_a_label_with_other_axes_on_the_same_grid_is_reordered(codes: str) -> None:
    label = np.random.default_rng(1).integers(0, 3, SIZE).astype(np.int16)
    affine = turned((3, -5, 8))
    moves = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes))
    other = volume(
        nib.orientations.apply_orientation(label, moves), affine @ nib.orientations.inv_ornt_aff(moves, SIZE)
    )
    placed = on_grid_of(volume(noise(*SIZE), affine), other, *PATHS)
    assert np.array_equal(placed.array, label)
    assert np.array_equal(placed.affine, affine)


@pytest.mark.parametrize(
    ("change", "apart"),
    [
        (lambda a: a + np.array([[0, 0, 0, 0.4]] + [[0] * 4] * 3), "0.4 mm"),  # half a voxel
        (lambda a: a @ nib.affines.from_matvec(np.eye(3), [0, 0, 1]), "2.5 mm"),  # one slice
        (lambda a: a @ np.diag([1, 1, 1.1, 1]), "1.5 mm"),  # the same origin, another zoom
        (lambda a: nib.affines.from_matvec(nib.eulerangles.euler2mat(0.1) @ a[:3, :3], a[:3, 3]), "mm"),
    ],
    ids=["half a voxel", "a slice", "zoom", "rotation"],
)
def test_another_grid_is_refused(change: object, apart: str) -> None:
    affine = turned((0, 0, 0))
    with pytest.raises(UserError, match=rf"l\.nii\.gz lie up to .*{apart} apart"):
        on_grid_of(volume(noise(*SIZE), affine), volume(np.ones(SIZE, np.int16), change(affine)), *PATHS)


def test_another_shape_is_refused() -> None:
    image = volume(noise(*SIZE), np.eye(4))
    with pytest.raises(UserError, match=r"i\.nii\.gz has shape \(9, 12, 7\), l\.nii\.gz has \(9, 12, 8\)"):
        on_grid_of(image, volume(np.ones((9, 12, 8), np.int16), np.eye(4)), *PATHS)
