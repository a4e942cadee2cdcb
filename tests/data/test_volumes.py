"""From a file to the networks' grid and back, and the cache of decoded cases."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from helpers.volumes import decoded_case, noise, write_volume
from sslfast import UserError
from sslfast.data.folder import Case
from sslfast.data.nifti import Volume, read_image
from sslfast.data.patches import PatchDataset
from sslfast.data.volumes import decode, from_grid, image_to_grid, label_to_grid
from sslfast.options import Preprocessing

ORIENTATIONS = ["RAS", "LPS", "LAS", "PIR", "SRA", "ILP"]


def oriented(
    array: np.ndarray, codes: str, spacing: tuple[float, ...] = (1.0, 1.5, 2.0), degrees: float = 0.0
) -> Volume:
    """A RAS array stored with other axes, optionally turned about z."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    affine = nib.affines.from_matvec(np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.diag(spacing), [5, -7, 11])
    moves = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes))
    stored = nib.orientations.apply_orientation(array, moves)
    return Volume(stored, affine @ nib.orientations.inv_ornt_aff(moves, array.shape), nib.Nifti1Header())


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_orientation_is_undone_exactly(codes: str) -> None:
    array = torch.randint(0, 5, (4, 5, 6)).float().numpy()
    volume = oriented(array, codes)
    plain = Preprocessing(intensity="none")
    upright = image_to_grid(volume, plain)[0]
    assert np.array_equal(upright, array)
    back = from_grid(torch.from_numpy(upright)[None], volume, plain)
    assert np.array_equal(back[0].numpy(), volume.array)


@pytest.mark.parametrize("codes", ORIENTATIONS)
@pytest.mark.parametrize("degrees", [0.0, 20.0])
def test_resampling_keeps_places_in_space(codes: str, degrees: float) -> None:
    """A ramp along each world axis is linear, so every voxel that stays inside must come back as it was."""
    size = (17, 13, 11)
    ramp = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), -1) @ np.array([1.0, 10.0, 100.0])
    volume = oriented(ramp.astype(np.float32), codes, degrees=degrees)
    preprocessing = Preprocessing(spacing=1.25, intensity="none")
    grid = image_to_grid(volume, preprocessing)[0]
    expected = [round((n - 1) * s / 1.25) + 1 for n, s in zip(size, (1.0, 1.5, 2.0))]
    assert all(abs(n - m) <= 1 for n, m in zip(grid.shape, expected))
    back = from_grid(torch.from_numpy(grid)[None], volume, preprocessing)[0].numpy()
    assert back.shape == volume.array.shape
    inner = (slice(2, -2),) * 3
    assert np.abs(back[inner] - volume.array[inner]).max() < 0.02


def test_labels_are_resampled_to_labels_on_the_images_grid() -> None:
    label = np.zeros((12, 12, 12), np.int16)
    label[3:9, 3:9, 3:9] = 3
    label[0] = -1
    volume = oriented(label, "LPS")
    preprocessing = Preprocessing(spacing=0.8)
    grid = label_to_grid(volume, preprocessing)
    assert set(np.unique(grid)) == {-1, 0, 3}
    image = Volume(volume.array.astype(np.float32), volume.affine, volume.header)
    assert grid.shape == image_to_grid(image, preprocessing).shape[1:]
    truth = label_to_grid(volume, Preprocessing()).mean() * 12**3 * 3.0
    assert grid.sum() * 0.8**3 == pytest.approx(truth, rel=0.2)


def test_intensities_are_normalised_and_clipped_to_the_window() -> None:
    array = 50 + 200 * noise(8, 8, 8)
    volume = oriented(array, "RAS")
    z = image_to_grid(volume, Preprocessing())
    assert z.mean() == pytest.approx(0, abs=1e-5)
    assert z.std() == pytest.approx(1, abs=1e-5)
    clipped = image_to_grid(volume, Preprocessing(intensity="ct", window=(0, 100)))
    assert np.isclose(clipped, clipped.max()).sum() == (array >= 100).sum()
    constant = image_to_grid(oriented(np.full((4, 4, 4), 7.0, np.float32), "RAS"), Preprocessing())
    assert not constant.any()
    for window, place in (((800, 900), "below"), ((-900, -800), "above")):
        with pytest.raises(UserError, match=f"every voxel is {place} --window {window[0]} {window[1]}; are these Houn"):
            image_to_grid(oriented(array.clip(-700, 700), "RAS"), Preprocessing(intensity="ct", window=window))


def test_each_channel_may_have_its_own_normalisation() -> None:
    arrays = [50 + 200 * noise(8, 8, 8) for _ in range(2)]
    both = oriented(np.stack(arrays), "RAS")
    ct, pet = image_to_grid(both, Preprocessing(intensity=("ct", "zscore"), window=(0, 100)))
    alone = [oriented(array, "RAS") for array in arrays]
    assert np.array_equal(ct, image_to_grid(alone[0], Preprocessing(intensity="ct", window=(0, 100)))[0])
    assert np.array_equal(pet, image_to_grid(alone[1], Preprocessing())[0])
    with pytest.raises(UserError, match="--intensity ct zscore: it must be one word, as there is one channel"):
        image_to_grid(alone[0], Preprocessing(intensity=("ct", "zscore")))
    with pytest.raises(UserError, match="one for each of 2 channels"):
        image_to_grid(both, Preprocessing(intensity=("ct", "zscore", "none")))


def test_a_spacing_is_one_number_or_three() -> None:
    assert Preprocessing(spacing=2.0).spacing == Preprocessing(spacing=(2.0, 2.0, 2.0)).spacing == (2.0, 2.0, 2.0)
    with pytest.raises(UserError, match="--spacing 1 2: it must be one number or three"):
        Preprocessing(spacing=(1, 2))


def make_case(folder: Path) -> Case:
    image = noise(6, 7, 8)
    label = (image > 0.5).astype(np.uint8)
    return Case(
        "a", (write_volume(folder / "images/a.nii.gz", image),), write_volume(folder / "labels/a.nii.gz", label)
    )


def test_a_case_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(tmp_path)
    first = decode(case, Preprocessing(), classes=range(2), ignore_label=-1)
    monkeypatch.setattr("sslfast.data.volumes.read_channels", lambda path: pytest.fail("the cache was not used"))
    second = decode(case, Preprocessing(), classes=range(2), ignore_label=-1)
    assert np.array_equal(first.image, second.image)
    assert np.array_equal(first.label, second.label)
    assert len(first.foreground) == (first.label > 0).sum()


@pytest.mark.parametrize("entry", ["image", "label", "foreground"])
@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "text", "header", "archive", "another array"])
def test_a_damaged_entry_of_the_cache_is_made_anew(tmp_path: Path, entry: str, damage: str) -> None:
    case = make_case(tmp_path)
    first = decode(case, Preprocessing(), classes=range(2), ignore_label=-1)
    expected = first.image.copy(), first.label.copy(), first.foreground.copy()
    path = (
        first.label_entry.with_suffix(".foreground.npy") if entry == "foreground" else getattr(first, f"{entry}_entry")
    )
    if damage == "gone":
        path.unlink()
    elif damage == "another array":
        np.save(path, np.zeros((2, 2)))
    elif damage == "archive":
        np.savez(path.with_suffix(".npz"), np.zeros(2))
        path.with_suffix(".npz").replace(path)
    elif damage == "header":
        path.write_bytes(path.read_bytes().replace(b"'descr': ", b"'descr:  "))
    else:
        path.write_bytes({"empty": b"", "cut": path.read_bytes()[:150], "text": b"this is text"}[damage])
    again = decode(case, Preprocessing(), classes=range(2), ignore_label=-1)
    for one, other in zip(expected, (again.image, again.label, again.foreground), strict=True):
        assert np.array_equal(one, other)


def test_decoded_cases_hold_no_file_open_and_are_sent_as_paths(tmp_path: Path) -> None:
    cases = [decoded_case(tmp_path, f"c{i}", noise(9, 9, 9), np.ones((9, 9, 9), np.int16)) for i in range(20)]
    dataset = PatchDataset(cases, (4, 4, 4), augment="none", foreground=1.0)
    dataset[(0, 0)]
    before = len([*Path("/proc/self/fd").iterdir()])
    for i in range(20):
        dataset[(i, i)]
    assert len([*Path("/proc/self/fd").iterdir()]) <= before
    assert len(pickle.dumps(cases)) < 20 * 500


def test_what_was_decoded_for_many_classes_serves_a_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(tmp_path)
    decode(case, Preprocessing(), classes=range(32), ignore_label=-1)
    with monkeypatch.context() as patch:
        patch.setattr("sslfast.data.volumes.read_label", lambda path, **_: pytest.fail("the cache was not used"))
        decode(case, Preprocessing(), classes=range(2), ignore_label=-1)
    with pytest.raises(UserError, match=r"labels/a\.nii\.gz"):
        decode(case, Preprocessing(), classes=range(1), ignore_label=-1)


def test_a_changed_file_or_setting_is_decoded_anew(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    before = decode(case, Preprocessing(), classes=range(2), ignore_label=-1)
    coarse = decode(case, Preprocessing(spacing=4.0), classes=range(2), ignore_label=-1)
    assert coarse.image.shape != before.image.shape
    write_volume(case.image, np.arange(6 * 7 * 9, dtype=np.float32).reshape(6, 7, 9))
    with pytest.raises(UserError, match="shape"):
        decode(case, Preprocessing(), classes=range(2), ignore_label=-1)


@pytest.mark.parametrize("changed", ["image", "label"])
def test_a_file_of_the_same_size_with_new_content_is_decoded_anew(tmp_path: Path, changed: str) -> None:
    label = (noise(6, 7, 8) > 0.5).astype(np.uint8)
    case = Case("a", (write_volume(tmp_path / "a.nii", noise(6, 7, 8)),), write_volume(tmp_path / "b.nii", label))
    before = decode(case, Preprocessing(), num_classes=2, ignore_label=-1)
    path = case.image if changed == "image" else case.label
    status = path.stat()
    write_volume(path, noise(6, 7, 8) if changed == "image" else 1 - label)
    assert path.stat().st_size == status.st_size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    after = decode(case, Preprocessing(), num_classes=2, ignore_label=-1)
    assert np.array_equal(after.image, before.image) == (changed == "label")
    assert np.array_equal(after.label, before.label) == (changed == "image")


def test_unlabelled_cases_never_open_a_label(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    expected = decode(case.unlabelled, Preprocessing(), classes=range(2), ignore_label=-1)
    case.label.write_bytes(b"corrupt")
    again = decode(case.unlabelled, Preprocessing(), classes=range(2), ignore_label=-1)
    assert again.label is None
    assert np.array_equal(expected.image, again.image)
    with pytest.raises(UserError, match="corrupt"):
        decode(case, Preprocessing(), classes=range(2), ignore_label=-1)


def test_read_image_gives_the_stored_axes(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    path = write_volume(tmp_path / "x.nii.gz", array, np.diag([-1.0, -1.0, 2.0, 1.0]))
    assert np.array_equal(read_image(path).array, array)


@pytest.mark.parametrize(("own", "wanted"), [(1.0, 1e-6), (1e30, 1.0)])
def test_a_grid_that_no_memory_holds_is_named(tmp_path: Path, own: float, wanted: float) -> None:
    path = tmp_path / "scan.nii.gz"
    nib.save(nib.Nifti1Image(np.arange(64, dtype=np.float32).reshape(4, 4, 4), np.diag([own, own, own, 1])), path)
    with pytest.raises(
        UserError, match=rf"^{path}: with --spacing {wanted:g} it would have \S+ voxels.*Choose a larger"
    ):
        decode(Case("scan", (path,)), Preprocessing(spacing=wanted), classes=range(2), ignore_label=-1)
