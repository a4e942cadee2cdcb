"""Reading and writing NIfTI: every bad file gets an error that names it, and geometry survives to the bit."""

from __future__ import annotations

import gzip
import math
import tracemalloc
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from helpers.volumes import noise, write_volume
from sslfast import UserError
from sslfast.data.files import free_memory, volume_files
from sslfast.data.folder import Case
from sslfast.data.nifti import IGNORE, description_of, read_image, read_label, write_label
from sslfast.data.volumes import decode
from sslfast.options import Preprocessing


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
    (tmp_path / "scan.png").write_bytes(b"x")
    with pytest.raises(UserError, match=r"scan\.png is no volume that can be read: its name must end in \.nii\.gz, "):
        read_image(tmp_path / "scan.png")


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
    with pytest.raises(UserError, match=r"hole\.nii\.gz: 1 voxel is NaN or infinite, the first at \(1, 2, 3\)"):
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
    with pytest.raises(
        UserError, match=r"seg\.nii\.gz: labels 7 are not among the classes 0, 1, .*dataset\.json.*--classes name_7=7"
    ):
        read_label(path, num_classes=2)
    assert read_label(path, classes=range(8)).array.max() == 7
    label[0, 0, 0] = -2
    with pytest.raises(UserError, match="labels -2"):
        read_label(write_volume(tmp_path / "negative.nii.gz", label))


def test_ignore_label_becomes_minus_one(tmp_path: Path) -> None:
    label = np.zeros((4, 4, 4), np.uint8)
    label[1], label[2] = 1, 255
    array = read_label(write_volume(tmp_path / "part.nii.gz", label), classes=range(2), ignore_label=255).array
    assert (array[2] == IGNORE).all()
    assert sorted(np.unique(array)) == [-1, 0, 1]


def test_an_image_that_is_given_as_a_label_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"whole numbers.*Is it an image"):
        read_label(write_volume(tmp_path / "scan.nii.gz", noise(4, 4, 4)))


@pytest.mark.parametrize("values", [[0, 0.9995, 2.0004], [1e-4, 1, 2]])
def test_a_scaled_label_is_rounded(tmp_path: Path, values: list[float]) -> None:
    label = np.repeat(np.array(values, np.float32), 9).reshape(3, 3, 3)
    assert np.array_equal(read_label(write_volume(tmp_path / "l.nii.gz", label)).array[:, 0, 0], [0, 1, 2])


@pytest.mark.parametrize("value", [32768, 40000, 65535])
def test_a_label_that_is_too_large_is_no_probability_and_may_be_ignored(tmp_path: Path, value: int) -> None:
    label = np.zeros((3, 3, 3), np.uint16)
    label[0] = value
    path = write_volume(tmp_path / "l.nii.gz", label)
    assert (read_label(path, ignore_label=value).array[0] == IGNORE).all()
    with pytest.raises(UserError, match=f"labels {value} are outside 0 to 32767"):
        read_label(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.3])
def test_a_value_that_is_no_whole_number_is_named(tmp_path: Path, value: float) -> None:
    label = np.zeros((3, 3, 3), np.float32)
    label[1, 1, 1] = value
    with pytest.raises(UserError, match=f"whole numbers, this one holds (-inf|{value:g}|nan)"):
        read_label(write_volume(tmp_path / "l.nii.gz", label), ignore_label=0)


def test_values_become_the_indices_of_their_classes(tmp_path: Path) -> None:
    label = np.array([0, 5, 6, 9, 255], np.int16).reshape(5, 1, 1)
    path = write_volume(tmp_path / "l.nii.gz", label)
    read = partial(read_label, path, classes=[0, 5], merged={6: 5, 9: 0})
    assert read(ignore_label=255).array.ravel().tolist() == [0, 1, 1, 0, IGNORE]
    with pytest.raises(UserError, match="labels 255 are not among the classes 0, 5, 6, 9, nor the ignore label -1"):
        read()
    with pytest.raises(UserError, match="labels 0, 9, 255 are not among the classes 5, 6"):
        read_label(path, classes=[5], merged={6: 5})
    write_volume(path, np.full((2, 2, 2), 255, np.uint8))
    assert (read(ignore_label=255).array == IGNORE).all()


def test_two_files_of_one_case_are_refused(tmp_path: Path) -> None:
    write_volume(tmp_path / "a.nii", noise(3, 3, 3))
    write_volume(tmp_path / "a.nii.gz", noise(3, 3, 3))
    with pytest.raises(UserError, match="the same case 'a'"):
        volume_files(tmp_path)


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


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        (np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]), "colours"),
        (np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1"), ("A", "u1")]), "colours"),
        (np.dtype(np.complex64), "complex numbers"),
        (np.dtype(np.complex128), "complex numbers"),
    ],
)
def test_colours_and_complex_numbers_are_refused(tmp_path: Path, dtype: np.dtype, kind: str) -> None:
    path = write_volume(tmp_path / "odd.nii.gz", np.ones((3, 4, 5), dtype))
    for read in (read_image, read_label):
        with pytest.raises(UserError, match=rf"odd\.nii\.gz holds {kind}.*Convert"):
            read(path)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_header_that_claims_more_than_its_file_can_hold_is_refused_before_memory_is_claimed(
    tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"huge{suffix}"
    raw = bytearray(nib.Nifti1Image(noise(30, 30, 30), np.eye(4)).to_bytes())
    for sizes, claimed in (((30000,) * 3, 108000000000000), ((200, 200, 100), 16000000)):
        raw[40:56] = np.array([3, *sizes, 1, 1, 1, 1], np.int16).tobytes()
        path.write_bytes(gzip.compress(raw) if suffix == ".nii.gz" else raw)
        tracemalloc.start()
        with pytest.raises(UserError, match=rf"huge.*cannot be read.*claims {claimed} bytes"):
            read_image(path)
        assert tracemalloc.get_traced_memory()[1] < 4e6
        tracemalloc.stop()


def test_a_file_of_several_compressed_members_is_read(tmp_path: Path) -> None:
    raw = nib.Nifti1Image(noise(6, 6, 6), np.eye(4)).to_bytes()
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(raw[:500]) + gzip.compress(raw[500:]) + gzip.compress(b""))
    assert read_image(tmp_path / "a.nii.gz").array.shape == (6, 6, 6)


def test_a_volume_that_does_not_fit_into_memory_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_volume(tmp_path / "large.nii.gz", noise(5, 5, 5))
    monkeypatch.setattr("sslfast.data.nifti.free_memory", lambda: 900)
    with pytest.raises(UserError, match=r"large\.nii\.gz does not fit into memory: it takes .* GB, and .* GB are free"):
        read_image(path)


@pytest.mark.parametrize("offset", [np.inf, np.nan, -5e8, 3e38])
def test_an_impossible_offset_of_the_voxels_is_named(tmp_path: Path, offset: float) -> None:
    path = tmp_path / "odd.nii"
    raw = bytearray(nib.Nifti1Image(noise(3, 3, 3), np.eye(4)).to_bytes())
    raw[108:112] = np.float32(offset).tobytes()
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"odd\.nii cannot be read, it is corrupt"):
        read_image(path)


def test_voxels_inside_the_header_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "pair.nii"
    raw = bytearray(nib.Nifti1Image(noise(3, 3, 3), np.eye(4)).to_bytes())
    raw[108:112], raw[344:348] = np.float32(0).tobytes(), b"ni1\0"  # a header whose voxels are in another file
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"pair\.nii cannot be read.*begin at byte 0, inside its header"):
        read_image(path)


def test_a_flipped_bit_anywhere_in_compressed_voxels_is_noticed(tmp_path: Path) -> None:
    array = np.round(noise(12, 10, 8), 1)
    path = write_volume(tmp_path / "damaged.nii.gz", array)
    whole, random = path.read_bytes(), np.random.default_rng(0)
    places, messages = range(300, len(whole), len(whole) // 40), []
    for place in places:
        content = bytearray(whole)
        content[place] ^= 1 << random.integers(8)
        path.write_bytes(content)
        try:
            assert np.array_equal(read_image(path).array, array), "a bit that stands for something"
        except UserError as error:
            messages.append(str(error))
    assert all("damaged.nii.gz cannot be read, it is corrupt" in message for message in messages)
    assert len(messages) > 0.9 * len(places)


@pytest.mark.parametrize("end", [b"junk", bytes(600)])
def test_bytes_after_the_end_of_a_compressed_file_are_no_fault(tmp_path: Path, end: bytes) -> None:
    array = noise(4, 4, 4)
    path = write_volume(tmp_path / "longer.nii.gz", array)
    path.write_bytes(path.read_bytes() + end)
    assert np.array_equal(read_image(path).array, array)


def test_links_that_lead_nowhere_are_named(tmp_path: Path) -> None:
    (tmp_path / "loop.nii.gz").symlink_to(tmp_path / "loop.nii.gz")
    (tmp_path / "gone.nii.gz").symlink_to(tmp_path / "nothing.nii.gz")
    for name in volume_files(tmp_path):
        with pytest.raises(UserError, match=rf"{name}\.nii\.gz is a symbolic link to a file that does not exist"):
            read_image(tmp_path / f"{name}.nii.gz")


def test_an_empty_scan_is_named(tmp_path: Path) -> None:
    path = write_volume(tmp_path / "empty.nii.gz", np.full((4, 4, 4), 7.0, np.float32))
    with pytest.raises(UserError, match=r"empty\.nii\.gz is empty: every voxel is 7"):
        decode(Case("empty", (path,)), Preprocessing(), classes=range(2), ignore_label=-1)


def test_names_are_compared_in_one_form_and_any_case(tmp_path: Path) -> None:
    write_volume(tmp_path / "a.nii.gz", noise(3, 3, 3)).rename(tmp_path / "Mu\u0308ller.NII.GZ")
    write_volume(tmp_path / "b.nii", noise(3, 3, 3)).rename(tmp_path / "b.NII")
    files = volume_files(tmp_path)
    assert sorted(files) == ["M\u00fcller", "b"]
    assert read_image(files["M\u00fcller"]).array.shape == read_image(files["b"]).array.shape == (3, 3, 3)


@pytest.mark.parametrize(("unit", "millimetres"), [("micron", 1e-3), ("meter", 1e3), ("mm", 1), ("unknown", 1)])
def test_lengths_are_millimetres_and_are_written_in_the_unit_of_the_scan(
    tmp_path: Path, unit: str, millimetres: float
) -> None:
    stored = np.array([[0.8, 0, 0, -90.1], [0, 0.9, 0.01, 33.3], [0, -0.01, 3, 7], [0, 0, 0, 1]])
    stored[:3] /= millimetres
    scan = nib.Nifti1Image(noise(4, 5, 6), stored)
    scan.header.set_xyzt_units(unit)
    nib.save(scan, tmp_path / "scan.nii.gz")
    volume = read_image(tmp_path / "scan.nii.gz")
    assert volume.spacing == pytest.approx((0.8, np.hypot(0.9, 0.01), np.hypot(3, 0.01)))
    write_label(tmp_path / "label.nii.gz", np.ones((4, 5, 6), np.uint8), volume)
    written = nib.load(tmp_path / "label.nii.gz")
    assert np.array_equal(written.affine, nib.load(tmp_path / "scan.nii.gz").affine)
    assert written.header.get_xyzt_units()[0] == unit
    assert np.array_equal(read_label(tmp_path / "label.nii.gz").affine, volume.affine)


def test_text_of_the_header_is_not_copied(tmp_path: Path) -> None:
    scan = nib.Nifti1Image(noise(4, 5, 6), np.eye(4))
    for field in ("descrip", "aux_file", "db_name", "intent_name"):
        scan.header[field] = b"Jane Doe"
    scan.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Jane Doe, born 1970"))
    nib.save(scan, tmp_path / "scan.nii")
    write_label(tmp_path / "label.nii", np.ones((4, 5, 6), np.uint8), read_image(tmp_path / "scan.nii"), "sslfast 12")
    assert b"Jane" in (tmp_path / "scan.nii").read_bytes()
    assert b"Jane" not in (tmp_path / "label.nii").read_bytes()
    assert description_of(tmp_path / "label.nii") == "sslfast 12"
    assert description_of(tmp_path / "none.nii") == ""


def test_a_system_that_does_not_say_how_much_memory_is_free_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: Path) -> str:
        raise FileNotFoundError(2, "No such file or directory")

    assert 0 < free_memory() < math.inf
    monkeypatch.setattr(Path, "read_text", fails)
    assert free_memory() == math.inf


def test_a_label_map_of_another_shape_than_its_scan_is_not_written(tmp_path: Path) -> None:
    scan = read_image(write_volume(tmp_path / "scan.nii", noise(4, 5, 6)))
    with pytest.raises(ValueError, match=r"array has shape \(4, 5\); it must have that of `like`, \(4, 5, 6\)"):
        write_label(tmp_path / "label.nii", np.ones((4, 5), np.uint8), scan)
    assert not (tmp_path / "label.nii").exists()
