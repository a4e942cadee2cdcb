"""Reading and writing NIfTI: every bad file gets an error that names it, and geometry survives to the bit."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from helpers.volumes import noise, write_volume
from sslfast import UserError
from sslfast.data.nifti import IGNORE, Volume, check_same_grid, nifti_files, read_image, read_label, write_label


def test_what_was_written_is_read(tmp_path: Path) -> None:
    array = noise(5, 7, 3)
    affine = np.diag([0.5, 1.25, 3.0, 1.0])
    volume = read_image(write_volume(tmp_path / "a.nii.gz", array, affine))
    assert np.array_equal(volume.array, array)
    assert volume.array.dtype == np.float32
    assert volume.spacing == (0.5, 1.25, 3.0)


@pytest.mark.parametrize("keep", [10, 400, -20])
def test_a_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    path = write_volume(tmp_path / "cut.nii.gz", noise(20, 20, 20))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"cut\.nii\.gz cannot be read, it is corrupt or truncated.*again"):
        read_image(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"this is text", gzip.compress(b"\0" * 100, mtime=0), b"\x1f\x8b" + b"\xff" * 500],
    ids=["empty", "text", "zeros, compressed", "broken compression"],
)
def test_a_file_that_is_no_nifti_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "not.nii.gz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"not\.nii\.gz cannot be read"):
        read_image(path)


def test_a_missing_file_and_a_wrong_name_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_image(tmp_path / "none.nii.gz")
    (tmp_path / "scan.nrrd").write_bytes(b"x")
    with pytest.raises(UserError, match=r"scan\.nrrd is not a NIfTI file"):
        read_image(tmp_path / "scan.nrrd")


def test_four_dimensions_are_refused_where_three_are_meant(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"series\.nii\.gz has shape \(4, 5, 6, 2\).*Split"):
        read_image(write_volume(tmp_path / "series.nii.gz", noise(4, 5, 6, 2)))
    assert read_image(write_volume(tmp_path / "single.nii.gz", noise(4, 5, 6, 1))).array.shape == (4, 5, 6)
    with pytest.raises(UserError, match=r"shape \(4, 5\)"):
        read_image(write_volume(tmp_path / "slice.nii.gz", noise(4, 5)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinite_voxels_are_named(tmp_path: Path, bad: float) -> None:
    array = noise(4, 5, 6)
    array[1, 2, 3] = bad
    with pytest.raises(UserError, match=r"hole\.nii\.gz: 1 voxels are NaN or infinite, the first at \(1, 2, 3\)"):
        read_image(write_volume(tmp_path / "hole.nii.gz", array))


def test_a_singular_affine_is_named(tmp_path: Path) -> None:
    path = write_volume(tmp_path / "flat.nii", noise(3, 3, 3))
    image = nib.load(path)
    image.header["sform_code"] = 1
    image.header["srow_x"] = image.header["srow_y"] = image.header["srow_z"] = 0
    nib.Nifti1Image(image.get_fdata(), None, image.header).to_filename(tmp_path / "bad.nii")
    with pytest.raises(UserError, match=r"bad\.nii.*affine"):
        read_image(tmp_path / "bad.nii")


def test_labels_out_of_range_are_named(tmp_path: Path) -> None:
    label = np.zeros((4, 4, 4), np.int16)
    label[0, 0, 0] = 7
    path = write_volume(tmp_path / "seg.nii.gz", label)
    with pytest.raises(UserError, match=r"seg\.nii\.gz: labels 7 are outside 0\.\.1.*dataset\.json"):
        read_label(path, num_classes=2)
    assert read_label(path, num_classes=8).array.max() == 7
    label[0, 0, 0] = -2
    with pytest.raises(UserError, match="labels -2"):
        read_label(write_volume(tmp_path / "negative.nii.gz", label))


def test_ignore_label_becomes_minus_one(tmp_path: Path) -> None:
    label = np.zeros((4, 4, 4), np.uint8)
    label[1], label[2] = 1, 255
    array = read_label(write_volume(tmp_path / "part.nii.gz", label), num_classes=2, ignore_label=255).array
    assert (array[2] == IGNORE).all()
    assert sorted(np.unique(array)) == [-1, 0, 1]


def test_an_image_that_is_given_as_a_label_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"whole numbers.*Is it an image"):
        read_label(write_volume(tmp_path / "scan.nii.gz", noise(4, 4, 4)))


def test_image_and_label_on_different_grids_are_refused(tmp_path: Path) -> None:
    image = read_image(write_volume(tmp_path / "i.nii.gz", noise(4, 5, 6)))
    paths = (tmp_path / "i.nii.gz", tmp_path / "l.nii.gz")
    check_same_grid(image, Volume(np.zeros((4, 5, 6)), image.affine + 1e-7, image.header), *paths)
    with pytest.raises(UserError, match=r"shape \(4, 5, 6\).*l\.nii\.gz has \(6, 5, 4\)"):
        check_same_grid(image, Volume(np.zeros((6, 5, 4)), image.affine, image.header), *paths)
    shifted = image.affine.copy()
    shifted[0, 3] += 1
    with pytest.raises(UserError, match=r"l\.nii\.gz lie up to 1 mm apart"):
        check_same_grid(image, Volume(np.zeros((4, 5, 6)), shifted, image.header), *paths)


def test_two_files_of_one_case_are_refused(tmp_path: Path) -> None:
    write_volume(tmp_path / "a.nii", noise(3, 3, 3))
    write_volume(tmp_path / "a.nii.gz", noise(3, 3, 3))
    with pytest.raises(UserError, match="the same case 'a'"):
        nifti_files(tmp_path)


def test_a_written_label_keeps_the_header(tmp_path: Path) -> None:
    affine = nib.affines.from_matvec(np.array([[0, -1.5, 0.1], [0.7, 0, 0], [0, 0.1, -2]]), [10, -20, 30])
    source = nib.Nifti1Image(noise(5, 6, 7), affine)
    source.header.set_xyzt_units("mm")
    source.header.set_sform(affine, 4)
    source.header.set_qform(affine, 1, strip_shears=True)
    nib.save(source, tmp_path / "scan.nii.gz")
    volume = read_image(tmp_path / "scan.nii.gz")
    write_label(tmp_path / "out" / "scan.nii.gz", np.ones((5, 6, 7), np.int64), volume)
    written, scan = nib.load(tmp_path / "out" / "scan.nii.gz"), nib.load(tmp_path / "scan.nii.gz")
    assert np.array_equal(written.affine, scan.affine)
    assert written.header["sform_code"] == 4
    assert written.header["qform_code"] == 1
    assert written.get_data_dtype() == np.uint8
    assert np.asarray(written.dataobj).all()


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = read_image(write_volume(tmp_path / "scan.nii.gz", noise(5, 6, 7)))
    target = tmp_path / "out" / "scan.nii.gz"
    write_label(target, np.zeros((5, 6, 7), np.uint8), volume)
    before = target.read_bytes()

    def full_disk(image: object, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nib, "save", full_disk)
    with pytest.raises(UserError, match=r"cannot write .*scan\.nii\.gz: No space left on device"):
        write_label(target, np.ones((5, 6, 7), np.uint8), volume)
    assert target.read_bytes() == before
    assert list(target.parent.iterdir()) == [target]
