"""Reading NRRD, MetaImage and DICOM series: the geometry of each, and an error for what is no volume."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset

from helpers.dicom import oblique_image, write_image, write_series
from helpers.volumes import noise, write_volume
from sslfast import UserError
from sslfast.data.files import parts_of, volume_files
from sslfast.data.folder import Case, open_dataset
from sslfast.data.nifti import digest_of, on_grid_of, read_header, read_image, read_label, write_label
from sslfast.data.volumes import decode
from sslfast.options import Preprocessing
from sslfast.training.run_folder import _fingerprint

FILES = ["a.nrrd", "a.nhdr", "a.seg.nrrd", "a.mha", "a.mhd"]


def hounsfield(*size: int) -> np.ndarray:
    return np.round(100 * noise(*size)).astype(np.int16)


def write_any(folder: Path, name: str, image: sitk.Image) -> Path:
    return write_image(folder / name, image) if "." in name else write_series(folder / name, image)


@pytest.mark.parametrize("name", [*FILES, "series"])
def test_an_oblique_volume_is_that_of_its_nifti_file(tmp_path: Path, name: str) -> None:
    array = hounsfield(9, 11, 7)
    image = oblique_image(array)
    volume = read_image(write_any(tmp_path, name, image))
    same = read_image(write_image(tmp_path / "same.nii.gz", image))
    assert volume.array.dtype == np.float32
    assert np.array_equal(volume.array, array)
    assert np.array_equal(same.array, array)
    assert np.allclose(volume.affine, same.affine, atol=1e-4)
    header = read_header([tmp_path / name])
    assert (header.array.shape, header.affine.tolist()) == ((1, *array.shape), volume.affine.tolist())
    label = np.zeros(array.shape, np.uint8)
    label[2:5, 3:4, 1:6] = 1
    write_label(tmp_path / "out.nii.gz", label, volume)
    written = read_label(tmp_path / "out.nii.gz")
    assert np.array_equal(on_grid_of(same, written, tmp_path, tmp_path).array, label)
    assert np.allclose(written.affine, same.affine, atol=1e-4)
    file = nib.load(tmp_path / "out.nii.gz")
    assert np.allclose(file.get_qform(), same.affine, atol=1e-3)
    assert (int(file.header["sform_code"]), file.header.get_xyzt_units()[0]) == (1, "mm")
    assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out.nii.gz"))).T, label)


def test_scales_of_slices_are_applied_one_by_one(tmp_path: Path) -> None:
    def change(one: Dataset, number: int) -> None:
        one.RescaleSlope, one.RescaleIntercept = 0.5 + number, -1000

    array = hounsfield(5, 6, 4)
    volume = read_image(write_series(tmp_path / "pet", oblique_image(array), change=change))
    assert np.allclose(volume.array, array * (0.5 + np.arange(4)) - 1000)


def test_a_sheared_nrrd_keeps_its_affine(tmp_path: Path) -> None:
    write_image(tmp_path / "a.nhdr", oblique_image(hounsfield(4, 5, 6)))
    header = (tmp_path / "a.nhdr").read_text()
    before = next(line for line in header.splitlines() if line.startswith("space directions"))
    (tmp_path / "a.nhdr").write_text(header.replace(before, "space directions: (1,0,0) (0,2,0) (0,1,3)"))
    expected = np.array([[-1, 0, 0, -5], [0, -2, -1, 7], [0, 0, 3, 11], [0, 0, 0, 1]])
    assert np.allclose(read_image(tmp_path / "a.nhdr").affine, expected, atol=1e-5)


@pytest.mark.parametrize("name", FILES)
def test_label_maps_pass_the_checks_of_others(tmp_path: Path, name: str) -> None:
    array = np.zeros((4, 5, 6), np.uint8)
    array[1], array[2] = 7, 255
    path = write_image(tmp_path / name, oblique_image(array))
    label = read_label(path, classes=[0, 7], ignore_label=255).array
    assert (label.dtype, label[:, 0, 0].tolist()) == (np.int16, [0, 1, -1, 0])
    with pytest.raises(UserError, match="labels 255 are not among the classes 0, 7"):
        read_label(path, classes=[0, 7])
    with pytest.raises(UserError, match="must hold whole numbers"):
        read_label(write_image(tmp_path / name, oblique_image(noise(4, 5, 6))))


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha"])
@pytest.mark.parametrize("compressed", [False, True])
def test_a_damaged_file_is_named(
    tmp_path: Path, name: str, compressed: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    sitk.WriteImage(oblique_image(hounsfield(20, 20, 20)), str(path), useCompression=compressed)
    whole = path.read_bytes()
    for keep in (0, 10, 200, len(whole) // 2, len(whole) - 5):
        path.write_bytes(whole[:keep])
        with pytest.raises(UserError, match=rf"{name} cannot be read, it is corrupt or truncated \([^0].*again"):
            read_image(path)
    for place in range(len(whole) // 2, len(whole), 499) if compressed else ():
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(UserError, match=rf"{name} cannot be read, it is corrupt or truncated"):
            read_image(path)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["a.nhdr", "a.mhd"])
def test_a_header_without_its_voxels_is_named(tmp_path: Path, name: str) -> None:
    path = write_image(tmp_path / name, oblique_image(hounsfield(20, 20, 20)))
    header, voxels = parts_of(path)
    assert header == path
    assert voxels.name in {"a.raw.gz", "a.zraw"}
    voxels.write_bytes(voxels.read_bytes()[:-200])
    with pytest.raises(UserError, match=f"{name} cannot be read"):
        read_image(path)
    voxels.unlink()
    with pytest.raises(UserError, match=f"{name} cannot be read"):
        read_image(path)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_what_is_no_grey_volume_is_refused(tmp_path: Path, suffix: str) -> None:
    vector = sitk.GetImageFromArray(noise(4, 5, 6, 2), isVector=True)
    with pytest.raises(UserError, match=r"vector.* holds 2 components .*Export"):
        read_image(write_image(tmp_path / f"vector{suffix}", vector))
    with pytest.raises(UserError, match=r"flat.* has shape \(5, 4\).*3D"):
        read_image(write_image(tmp_path / f"flat{suffix}", sitk.GetImageFromArray(noise(4, 5))))
    with pytest.raises(UserError, match=r"series.* has shape \(6, 5, 4, 3\).*Split"):
        read_image(write_image(tmp_path / f"series{suffix}", sitk.GetImageFromArray(noise(3, 4, 5, 6), isVector=False)))


@pytest.mark.parametrize("name", ["a.nrrd", "series"])
def test_a_volume_that_does_not_fit_into_memory_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = write_any(tmp_path, name, oblique_image(hounsfield(5, 5, 5)))
    monkeypatch.setattr("sslfast.data.itk.free_memory", lambda: 400)
    with pytest.raises(UserError, match=rf"{name} does not fit into memory: it takes .* GB, and .* GB are free"):
        read_image(path)


@pytest.mark.parametrize("name", ["a.nrrd", "series"])
def test_without_simpleitk_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = write_any(tmp_path, name, oblique_image(hounsfield(5, 5, 5)))
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(UserError, match=rf"{name}.*pip install 'sslfast\[dicom\]'"):
        read_image(path)
    read_image(write_volume(tmp_path / "b.nii.gz", noise(3, 3, 3)))


def test_files_without_a_suffix_and_beside_texts_make_a_series(tmp_path: Path) -> None:
    array = hounsfield(5, 6, 4)
    folder = write_series(tmp_path / "Jürgen", oblique_image(array), name=lambda number: f"IM{3 - number}")
    for name in ("DICOMDIR", "notes.txt", ".hidden"):
        (folder / name).write_text("x")
    assert volume_files(tmp_path) == {"Jürgen": folder}
    assert np.array_equal(read_image(folder).array, array)


def series(tmp_path: Path, **settings: object) -> Path:
    return write_series(tmp_path / "case", oblique_image(hounsfield(5, 6, 8)), **settings)  # type: ignore[arg-type]


def test_several_series_in_a_folder_are_listed(tmp_path: Path) -> None:
    series(tmp_path)
    write_series(
        tmp_path / "case",
        oblique_image(hounsfield(5, 6, 3)),
        name=lambda number: f"other{number}",
        SeriesDescription="lung",
    )
    with pytest.raises(UserError, match=r"case holds 2 DICOM series: 'Sch.*del' with 8 slices, .*'lung' with 3"):
        read_image(tmp_path / "case")


def test_a_missing_slice_is_noticed(tmp_path: Path) -> None:
    folder = series(tmp_path, name=lambda number: f"{number}.dcm")
    (folder / "4.dcm").unlink()
    with pytest.raises(UserError, match=r"case/3\.dcm and 5\.dcm are 5 mm apart, most others 2\.5 mm: slices are"):
        read_image(folder)


def shift(number: int, offset: list[float]) -> object:
    def change(one: Dataset, index: int) -> None:
        if index >= number:
            before = np.array(one.ImagePositionPatient, float)
            one.ImagePositionPatient = [*np.round(before + (index - number + 1) * np.array(offset), 6)]

    return change


def test_uneven_and_shifted_slices_are_refused(tmp_path: Path) -> None:
    normal, down = np.array([0, -0.28, 0.96]), np.array([-0.28, 0.9216, 0.2688])
    assert read_image(series(tmp_path / "a", change=shift(4, 0.02 * normal))).array.shape == (5, 6, 8)  # rounded
    with pytest.raises(UserError, match="missing, or unevenly spaced"):
        read_image(series(tmp_path / "b", change=shift(4, 0.5 * normal)))
    with pytest.raises(UserError, match=r"c/case: the slices are shifted .* tilted gantry.*dcm2niix"):
        read_image(series(tmp_path / "c", change=shift(1, 0.3 * down)))


def test_slices_of_several_times_are_refused(tmp_path: Path) -> None:
    def change(one: Dataset, number: int) -> None:
        one.ImagePositionPatient = [0, 0, number // 2]

    with pytest.raises(UserError, match=r"\.dcm and .*\.dcm lie at the same position.*over time"):
        read_image(series(tmp_path, change=change))


def without(keyword: str) -> object:
    return lambda one, number: number == 3 and delattr(one, keyword)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda one, n: n == 3 and setattr(one, "ImageOrientationPatient", [1, 0, 0, 0, 0, -1]),
            "another size, pixel sp",
        ),
        (lambda one, n: n == 3 and setattr(one, "PixelSpacing", [1, 1]), "another size, pixel spacing"),
        (lambda one, n: n == 3 and setattr(one, "NumberOfFrames", 1), None),
        (without("ImagePositionPatient"), "does not say where"),
        (without("PixelData"), "is damaged, or no DICOM image"),
    ],
)
def test_what_is_no_slice_of_the_volume_is_named(tmp_path: Path, change: object, reason: str | None) -> None:
    folder = series(tmp_path, change=change)
    if reason is None:
        read_image(folder)
        return
    with pytest.raises(UserError, match=rf"case/\d+\.dcm.*{reason}"):
        read_image(folder)


def test_frames_colours_and_single_slices_are_refused(tmp_path: Path) -> None:
    def frames(one: Dataset, number: int) -> None:
        one.NumberOfFrames, one.PixelData = 2, one.PixelData * 2

    def colours(one: Dataset, number: int) -> None:
        one.SamplesPerPixel, one.PhotometricInterpretation, one.PlanarConfiguration = 3, "RGB", 0
        one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 8, 8, 7, 0
        one.PixelData = bytes(3 * one.Rows * one.Columns)

    with pytest.raises(UserError, match=r"holds several frames.*dcm2niix"):
        read_image(series(tmp_path / "frames", change=frames))
    with pytest.raises(UserError, match="holds 3 components"):
        read_image(series(tmp_path / "colours", change=colours))
    with pytest.raises(UserError, match="case holds a DICOM series of one slice"):
        read_image(write_series(tmp_path / "case", oblique_image(hounsfield(5, 6, 1))))


@pytest.mark.parametrize("keep", [0, 100, 140, 700, -2])
def test_a_truncated_slice_is_named(tmp_path: Path, keep: int, capfd: pytest.CaptureFixture[str]) -> None:
    folder = series(tmp_path, name=lambda number: f"{number}.dcm")
    path = folder / "4.dcm"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"case/4\.dcm is damaged, or no DICOM image \(.*Copy it again"):
        read_image(folder)
    assert capfd.readouterr().err == ""


def test_the_cache_and_digests_notice_a_change_in_any_file(tmp_path: Path) -> None:
    for name, part in (("a.mhd", "a.zraw"), ("series", "series/2.dcm")):
        image = oblique_image(hounsfield(5, 6, 4))
        path = (
            write_any(tmp_path, name, image)
            if "." in name
            else write_series(tmp_path / name, image, name=lambda number: f"{number}.dcm")
        )
        case = Case("a", (path,))
        before = digest_of(path, "settings"), decode(case, Preprocessing(), ignore_label=-1).image_entry
        content = bytearray((tmp_path / part).read_bytes())
        content[-1] ^= 1
        (tmp_path / part).write_bytes(content)
        if name == "series":
            after = digest_of(path, "settings"), decode(case, Preprocessing(), ignore_label=-1).image_entry
            assert not set(before) & set(after)
        assert digest_of(path, "settings") != before[0]


def test_a_suffix_may_be_in_capitals(tmp_path: Path) -> None:
    array = hounsfield(4, 5, 6)
    for name in ("a.mha", "b.nrrd"):
        path = write_image(tmp_path / name, oblique_image(array))
        path.rename(tmp_path / name.upper())
    for path in volume_files(tmp_path).values():
        assert np.array_equal(read_image(path).array, array)


def test_two_formats_of_one_case_are_refused(tmp_path: Path) -> None:
    image = oblique_image(hounsfield(4, 5, 6))
    write_image(tmp_path / "a.nii.gz", image)
    write_image(tmp_path / "a.mha", image)
    with pytest.raises(UserError, match="the same case 'a'"):
        volume_files(tmp_path)
    (tmp_path / "a.mha").unlink()
    write_series(tmp_path / "a", image)
    with pytest.raises(UserError, match="the same case 'a'"):
        volume_files(tmp_path)


def test_a_dataset_may_mix_formats(tmp_path: Path) -> None:
    images, labels = tmp_path / "images", tmp_path / "labels"
    drawn = oblique_image((noise(5, 6, 8) > 0).astype(np.uint8))
    for name in ("a.nii.gz", "b.nrrd", "c.mhd", "d.nhdr"):
        write_image(images / name, oblique_image(hounsfield(5, 6, 8)))
    write_series(images / "e", oblique_image(hounsfield(5, 6, 8)))
    for name in ("a.mha", "b.seg.nrrd", "c.nii.gz", "d.mhd", "e.nrrd"):
        write_image(labels / name, drawn)
    dataset = open_dataset(tmp_path)
    assert [(case.name, case.label is not None) for case in dataset.training] == [(name, True) for name in "abcde"]
    for case in dataset.training:
        decoded = decode(case, Preprocessing(), num_classes=2, ignore_label=-1)
        assert decoded.label is not None
        assert decoded.label.sum() == sitk.GetArrayFromImage(drawn).sum()
    (images / "f.raw").write_bytes(b"x")
    with pytest.raises(UserError, match=r"^f\.raw in .*images: only"):
        open_dataset(tmp_path)


def test_a_resumed_run_notices_another_slice(tmp_path: Path) -> None:
    folder = series(tmp_path, name=lambda number: f"{number}.dcm")
    before = _fingerprint(folder)
    assert _fingerprint(folder) == before
    content = bytearray((folder / "4.dcm").read_bytes())
    content[-1] ^= 1
    (folder / "4.dcm").write_bytes(content)
    assert _fingerprint(folder) != before


def test_a_process_without_stderr_reads_as_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(descriptor: int) -> int:
        raise OSError(9, "Bad file descriptor")

    array = hounsfield(4, 5, 6)
    path = write_image(tmp_path / "a.nrrd", oblique_image(array))
    monkeypatch.setattr(os, "dup", fails)
    assert np.array_equal(read_image(path).array, array)


def test_a_header_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.mhd").symlink_to(tmp_path / "gone.mhd")
    (case,) = open_dataset(tmp_path).training
    with pytest.raises(UserError, match=r"a\.mhd is a symbolic link to a file that does not exist"):
        read_image(case.image)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="there is no file here that fails when it is read")
def test_a_file_that_cannot_be_read_makes_no_series(tmp_path: Path) -> None:
    (tmp_path / "case").mkdir()
    (tmp_path / "case/IM1").symlink_to("/proc/self/mem")
    assert volume_files(tmp_path) == {}
