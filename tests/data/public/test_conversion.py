"""Public datasets: files made in exactly their layouts, read back through the trainer's own reader."""

from __future__ import annotations

import json
import locale
import sys
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from helpers.dicom import write_series
from helpers.volumes import write_volume
from sslfast.data.folder import open_dataset
from sslfast.data.nifti import read_image, read_label
from sslfast.data.public import conversion
from sslfast.errors import UserError
from sslfast.prepare import main

SIZE = (12, 10, 9)


def arrays(number: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(number)
    label = np.zeros(SIZE, np.uint8)
    label[2:5, 3:7, 1 + number % 3 : 6] = 1
    return random.normal(size=SIZE).astype(np.float32), label


def write_h5(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image, label = arrays(number)
    with h5py.File(path, "w") as file:
        file["image"], file["label"] = image, label


def write_sitk(path: Path, array: np.ndarray, spacing: tuple[float, float, float] = (0.7, 0.8, 2.5)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array.transpose(2, 1, 0))
    image.SetSpacing(spacing)
    image.SetOrigin((5, -7, 11))
    sitk.WriteImage(image, str(path))


def write_pancreas(source: Path, *numbers: int) -> Path:
    """Scans with their label maps."""
    for number in numbers:
        image, label = arrays(number)
        write_volume(source / f"PANCREAS_{number:04d}.nii.gz", image)
        write_volume(source / f"label{number:04d}.nii.gz", label)
    return source


def prepare(name: str, source: Path, output: Path) -> int:
    return main([name, "--source", str(source), "--output", str(output)])


def test_left_atrium_h5_follows_the_published_lists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source"
    names = ["ZQF", "0RZ", "3DA", "AB1"]
    for i, name in enumerate(names):
        write_h5(source / "2018LA_Seg_Training Set" / name / "mri_norm2.h5", i)
    (source / "train.list").write_text("ZQF\n3DA\n0RZ\n")
    (source / "test.list").write_text("AB1\n")
    assert prepare("la", source, tmp_path / "out") == 0
    dataset = open_dataset(tmp_path / "out")
    assert [case.name for case in dataset.training] == [
        "ZQF",
        "3DA",
        "0RZ",
    ]  # the list's order: the first k are labelled
    assert [case.name for case in dataset.test] == ["AB1"]
    image, label = read_image(dataset.training[1].image), read_label(dataset.training[1].label)
    assert np.array_equal(image.array, arrays(2)[0])
    assert np.array_equal(label.array, arrays(2)[1])
    assert image.spacing == pytest.approx((0.625,) * 3)
    assert "--intensity none" in capsys.readouterr().out
    assert "around the label" in json.loads((tmp_path / "out" / "dataset.json").read_text())["cropped"]


def test_left_atrium_nrrd_keeps_its_geometry(tmp_path: Path) -> None:
    image, label = arrays(1)
    write_sitk(tmp_path / "source" / "CASE1" / "lgemri.nrrd", image)
    write_sitk(tmp_path / "source" / "CASE1" / "laendo.nrrd", label * 255)
    assert prepare("la", tmp_path / "source", tmp_path / "out") == 0
    (case,) = open_dataset(tmp_path / "out").training
    volume = read_image(case.image)
    assert np.array_equal(volume.array, image)
    assert volume.spacing == pytest.approx((0.7, 0.8, 2.5))
    assert np.allclose(volume.affine[:3, 3], (-5, 7, 11))
    assert nib.aff2axcodes(volume.affine) == ("L", "P", "S")
    assert np.array_equal(read_label(case.label).array, label)


def test_pancreas_h5_has_the_names_of_the_lists(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for i in (1, 2, 3):
        write_h5(source / "Pancreas_h5" / f"image{i:04d}_norm.h5", i)
    (source / "train.list").write_text("image0003_norm.h5\nimage0001_norm.h5\n")
    (source / "test.list").write_text("image0002_norm.h5\n")
    assert prepare("pancreas", source, tmp_path / "out") == 0
    dataset = open_dataset(tmp_path / "out")
    assert [case.name for case in dataset.training] == ["pancreas_0003", "pancreas_0001"]
    assert np.array_equal(read_image(dataset.test[0].image).array, arrays(2)[0])


def test_pancreas_dicom_series_keep_their_geometry_beside_nifti_labels(tmp_path: Path) -> None:
    source = tmp_path / "source"
    image, label = arrays(4)
    hounsfield = np.round(100 * image).astype(np.int16)
    scan = sitk.GetImageFromArray(hounsfield.transpose(2, 1, 0))
    scan.SetSpacing((0.8, 0.8, 1.5))
    write_series(source / "Pancreas-CT" / "PANCREAS_0007" / "study" / "series", scan)
    affine = np.diag([-0.8, -0.8, 1.5, 1])
    write_volume(source / "TCIA_pancreas_labels" / "label0007.nii.gz", label, affine)
    before = locale.setlocale(locale.LC_CTYPE)
    assert prepare("pancreas", source, tmp_path / "out") == 0
    assert locale.setlocale(locale.LC_CTYPE) == before
    (case,) = open_dataset(tmp_path / "out").training
    volume = read_image(case.image)
    assert np.array_equal(volume.array, hounsfield)
    assert np.allclose(volume.affine, affine)
    assert np.array_equal(read_label(case.label).array, label)


def test_brats_takes_the_whole_tumour(tmp_path: Path) -> None:
    image, label = arrays(5)
    folder = tmp_path / "source" / "HGG" / "BraTS19_X_1"
    for kind, array in (("flair", image), ("t1", image + 1), ("seg", label * 4)):
        write_volume(folder / f"BraTS19_X_1_{kind}.nii.gz", array)
    (folder / "._BraTS19_X_1_flair.nii.gz").write_bytes(b"left by another file system")
    assert prepare("brats", tmp_path / "source", tmp_path / "out") == 0
    (case,) = open_dataset(tmp_path / "out").training
    assert case.name == "BraTS19_X_1"
    assert np.array_equal(read_image(case.image).array, image)
    assert np.array_equal(read_label(case.label).array, label)


def test_brats_finds_the_one_label_with_another_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, label = arrays(5)
    folder = tmp_path / "source" / "BraTS20_Training_355"
    write_volume(folder / "BraTS20_Training_355_flair.nii", image)
    write_volume(folder / "W39_1998.09.19_Segm.nii", label * 4)
    assert prepare("brats", tmp_path / "source", tmp_path / "out") == 0
    (case,) = open_dataset(tmp_path / "out").training
    assert np.array_equal(read_label(case.label).array, label)
    write_volume(folder / "W39_2_Segm.nii", label)
    assert prepare("brats", tmp_path / "source", tmp_path / "again") == 2
    assert "W39_1998.09.19_Segm.nii, W39_2_Segm.nii" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


def test_brats_takes_one_of_two_labels_and_names_the_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "source" / "B1"
    write_volume(folder / "B1_flair.nii.gz", arrays(5)[0])
    write_volume(folder / "B1_seg.nii", arrays(5)[1])
    write_volume(folder / "B1_seg.nii.gz", arrays(6)[1])
    assert prepare("brats", tmp_path / "source", tmp_path / "out") == 2
    assert "B1_seg.nii.gz in " in capsys.readouterr().err


def test_brats_h5_follows_the_lists_of_its_publisher(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for i in (1, 2, 3):
        write_h5(source / "data" / f"BraTS19_X_{i}.h5", i)
    for part, number in (("train", 3), ("val", 1), ("test", 2)):
        (source / f"{part}.txt").write_text(f"BraTS19_X_{number},\n")
    assert prepare("brats", source, tmp_path / "out") == 0
    dataset = open_dataset(tmp_path / "out")
    assert [[c.name[-1] for c in part] for part in (dataset.training, dataset.validation, dataset.test)] == [
        ["3"],
        ["1"],
        ["2"],
    ]
    assert np.array_equal(read_image(dataset.test[0].image).array, arrays(2)[0])
    assert np.array_equal(read_label(dataset.test[0].label).array, arrays(2)[1])


def test_a_label_map_without_an_image_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, label = arrays(1)
    write_volume(tmp_path / "PANCREAS_0001.nii.gz", image)
    write_volume(tmp_path / "label0002.nii.gz", label)
    assert prepare("pancreas", tmp_path, tmp_path / "out") == 2
    assert "label0002.nii.gz" in capsys.readouterr().err


def test_every_case_that_cannot_be_converted_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_pancreas(tmp_path / "source", 1, 2, 3)
    (source / "PANCREAS_0001.nii.gz").write_bytes(b"")
    write_volume(source / "label0003.nii.gz", arrays(1)[1][:-1])
    assert prepare("pancreas", source, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "2 of 3 cases" in error
    assert "PANCREAS_0001.nii.gz" in error
    assert "label0003.nii.gz" in error
    assert (tmp_path / "out" / "labels" / "pancreas_0002.nii.gz").exists()
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_a_conversion_replaces_nobodys_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = write_pancreas(tmp_path / "source", 1), tmp_path / "out"
    assert prepare("pancreas", source, output) == 0
    assert prepare("pancreas", source, output) == 0
    write_volume(output / "labels" / "pancreas_0001.nii.gz", arrays(2)[1])
    corrected = (output / "labels" / "pancreas_0001.nii.gz").read_bytes()
    assert prepare("pancreas", source, output) == 2
    assert (
        "labels/pancreas_0001.nii.gz is not what this conversion writes; choose another --output"
        in capsys.readouterr().err
    )
    assert (output / "labels" / "pancreas_0001.nii.gz").read_bytes() == corrected
    (output / "dataset.json").write_text(json.dumps({"name": "mine"}))
    assert prepare("pancreas", source, output) == 2
    assert json.loads((output / "dataset.json").read_text()) == {"name": "mine"}


def test_a_copied_label_on_another_grid_is_named_as_in_the_source(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_pancreas(tmp_path / "source", 1)
    write_volume(source / "label0001.nii.gz", arrays(1)[1][:-1])
    assert prepare("pancreas", source, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert str(source / "PANCREAS_0001.nii.gz") in error
    assert str(source / "label0001.nii.gz") in error


@pytest.mark.parametrize("name", ["la", "pancreas", "brats"])
@pytest.mark.parametrize("fault", ["missing", "empty", "no output", "itself"])
def test_a_source_or_output_that_cannot_be_is_named(
    tmp_path: Path, name: str, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    if fault != "missing":
        source.mkdir()
    output = {"no output": [], "itself": ["--output", str(source)]}.get(fault, ["--output", str(tmp_path / "out")])
    assert main([name, "--source", str(source), *output]) == 2
    error = capsys.readouterr().err
    assert ("--output" if fault in ("no output", "itself") else str(source)) in error
    assert "Traceback" not in error


def test_broken_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source" / "A"
    source.mkdir(parents=True)
    (source / "mri_norm2.h5").write_bytes(b"broken")
    assert prepare("la", tmp_path / "source", tmp_path / "out") == 2
    assert "mri_norm2.h5 cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "out" / "dataset.json").exists()
    (source / "mri_norm2.h5").unlink()
    image, label = arrays(1)
    write_sitk(source / "lgemri.nrrd", image)
    write_sitk(source / "laendo.nrrd", label, spacing=(1, 1, 1))
    assert prepare("la", tmp_path / "source", tmp_path / "out2") == 2
    assert "their affines differ" in capsys.readouterr().err
    (source / "laendo.nrrd").unlink()
    (tmp_path / "source" / "train.list").write_text("A\nB\n")
    assert prepare("la", tmp_path / "source", tmp_path / "out3") == 2
    assert "lists 'B'" in capsys.readouterr().err
    (tmp_path / "source" / "train.list").write_text("A\nA\n")
    assert prepare("la", tmp_path / "source", tmp_path / "out4") == 2
    assert "the case 'A' occurs more than once. Keep one." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "files", "case"),
    [
        ("la", ["one/A/lgemri.nrrd", "two/A/lgemri.nrrd"], "A"),
        ("pancreas", ["one/image0001_norm.h5", "two/0001.h5"], "pancreas_0001"),
        ("pancreas", ["one/PANCREAS_0001.nii.gz", "two/PANCREAS_0001.nii"], "pancreas_0001"),
        ("brats", ["one/BraTS19_A.h5", "two/BraTS19_A.h5"], "BraTS19_A"),
        ("brats", ["one/A/A_flair.nii.gz", "two/A/A_flair.nii.gz"], "A"),
    ],
)
def test_two_scans_of_the_same_name_are_named_and_none_is_left_out(
    tmp_path: Path, name: str, files: list[str], case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in files:
        (tmp_path / "source" / file).parent.mkdir(parents=True)
        (tmp_path / "source" / file).touch()
    assert prepare(name, tmp_path / "source", tmp_path / "out") == 2
    assert f"the case {case!r} occurs more than once. Keep one." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_h5_file_without_a_3d_volume_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "source" / "A").mkdir(parents=True)
    with h5py.File(tmp_path / "source" / "A" / "mri_norm2.h5", "w") as file:
        file["image"] = np.zeros((4, 5))
    assert prepare("la", tmp_path / "source", tmp_path / "out") == 2
    assert "mri_norm2.h5: 'image' has shape (4, 5); it must be a 3D volume" in capsys.readouterr().err


def test_without_h5py_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_h5(tmp_path / "source" / "A" / "mri_norm2.h5", 1)
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert prepare("la", tmp_path / "source", tmp_path / "out") == 2
    assert "mri_norm2.h5: h5 files need h5py: pip install 'sslfast[h5]'" in capsys.readouterr().err


def test_a_scan_without_a_number_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_volume(tmp_path / "source" / "scan.nii.gz", arrays(1)[0])
    assert prepare("pancreas", tmp_path / "source", tmp_path / "out") == 2
    assert "scan.nii.gz: the file name must contain the number of the case" in capsys.readouterr().err


def test_a_dataset_without_a_published_split_takes_the_lists_beside_it(tmp_path: Path) -> None:
    names = ["k0", "k1", "k2"]
    said, order = conversion._split("made", tmp_path, names, None)
    assert said == "all for training: no list beside the data"
    assert order == [(name, "training") for name in names]
    (tmp_path / "train.list").write_text("k1.npz\nk0\n")
    (tmp_path / "test.list").write_text("folder/k2.nii.gz\n")
    _, order = conversion._split("made", tmp_path, names, None)
    assert order == [("k1", "training"), ("k0", "training"), ("k2", "test")]
    with pytest.raises(UserError, match="made has no split of that name; leave --split out"):
        conversion._split("made", tmp_path, names, "mine")
