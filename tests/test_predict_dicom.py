"""Predictions of other formats than NIfTI, and DICOM segmentations."""

from __future__ import annotations

import sys
from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from helpers.dicom import oblique_image, write_image, write_series
from helpers.models import make_model
from helpers.volumes import noise
from sslfast import UserError, segmentations
from sslfast.data.dicom_seg import make_dicom_seg
from sslfast.data.itk import find_series
from sslfast.data.nifti import read_image, read_label
from sslfast.predict import main
from sslfast.quality import MEASURES
from sslfast.segmenter import Segmentation
from sslfast.training.checkpoint import save_checkpoint

SIZE = (9, 11, 7)


def run(tmp_path: Path, images: Path, *flags: str) -> int:
    if not (tmp_path / "model.pt").exists():
        save_checkpoint(tmp_path / "model.pt", {"model": make_model().state()})
    paths = ["--checkpoint", str(tmp_path / "model.pt"), "--output", str(tmp_path / "out"), "--device", "cpu"]
    return main([*paths, "--images", str(images), *flags])


def written(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "out").iterdir())


def scan() -> np.ndarray:
    return np.round(100 * noise(*SIZE)).astype(np.int16)


@pytest.fixture
def halves(monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """The label map that the network finds in every volume."""
    labels = np.zeros(SIZE, np.uint8)
    labels[2:6, 1:4, 2:5] = 1
    labels[2, 3, 6] = 1
    quality = {"x": dict.fromkeys(MEASURES, 1.0)}
    monkeypatch.setattr(segmentations, "segment", lambda *arguments, **settings: Segmentation(labels, quality))
    return labels


def test_all_formats_of_a_volume_are_segmented_alike(tmp_path: Path) -> None:
    image = oblique_image(scan())
    for name in ("a.nii.gz", "b.nrrd", "c.mha", "d.mhd"):
        write_image(tmp_path / "scans" / name, image)
    write_series(tmp_path / "scans" / "e", image, name=lambda number: f"IM{number}")
    assert run(tmp_path, tmp_path / "scans") == 0
    first, *others = (read_label(tmp_path / "out" / f"{name}.nii.gz") for name in "abcde")
    for other in others:
        assert np.array_equal(other.array, first.array)
        assert np.allclose(other.affine, first.affine, atol=1e-4)


def test_a_folder_may_be_one_series_and_its_prediction_is_continued(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_series(tmp_path / "case", oblique_image(scan()))
    assert run(tmp_path, folder) == 0
    assert written(tmp_path) == ["case.nii.gz", "quality.csv", "report.html"]
    assert run(tmp_path, folder) == 0
    assert "1 of 1 segmentations are in" in capsys.readouterr().out
    assert run(tmp_path, folder, "--output", str(folder)) == 2
    assert "is a folder of the dataset" in capsys.readouterr().err
    write_series(folder, oblique_image(scan()))
    assert run(tmp_path, folder) == 2
    assert "would replace" in capsys.readouterr().err


def test_a_dicom_segmentation_lies_on_the_slices_of_its_series(tmp_path: Path, halves: np.ndarray) -> None:
    folder = write_series(tmp_path / "scans" / "case", oblique_image(scan()))
    assert run(tmp_path, tmp_path / "scans", "--dicom-seg") == 0
    assert written(tmp_path) == [
        "case.dcm",
        "case.nii.gz",
        "quality.csv",
        "report.html",
    ]
    assert np.array_equal(read_label(tmp_path / "out" / "case.nii.gz").array, halves)
    segmentation = hd.seg.segread(tmp_path / "out" / "case.dcm")
    classes = list(make_model().classes.values())
    assert [segmentation.get_segment_description(1).segment_label] == classes[1:]
    sources = [pydicom.dcmread(file) for file in find_series(folder).files]
    for source, frame in zip(
        sources, segmentation.get_pixels_by_source_instance([s.SOPInstanceUID for s in sources], combine_segments=True)
    ):
        index = round((float(source.InstanceNumber)) - 1)
        assert np.array_equal(frame.T, halves[:, :, index])
    for frame in segmentation.PerFrameFunctionalGroupsSequence:
        position = np.array(frame.PlanePositionSequence[0].ImagePositionPatient, float)
        assert min(np.abs(position - np.array(s.ImagePositionPatient, float)).max() for s in sources) < 1e-4
    volume = segmentation.get_volume(combine_segments=True)
    voxel = np.linalg.inv(volume.affine) @ np.diag([-1, -1, 1, 1]) @ read_image(folder).affine @ [2, 3, 6, 1]
    assert volume.array[tuple(np.round(voxel[:3]).astype(int))] == 1
    assert (str(segmentation.PatientName), segmentation.PatientID) == ("Doe^Jane", "7")
    assert segmentation.StudyInstanceUID == sources[0].StudyInstanceUID


def test_each_class_is_a_segment_with_its_name(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "case", oblique_image(scan()))
    labels = np.zeros(SIZE, np.int16)
    labels[1:3], labels[5] = 5, 300
    classes = {0: "background", 5: "liver", 7: "spleen", 300: "Übergang"}
    make_dicom_seg(labels, classes, folder, "x").save_as(tmp_path / "seg.dcm")
    segmentation = hd.seg.segread(tmp_path / "seg.dcm")
    described = [segmentation.get_segment_description(number) for number in segmentation.segment_numbers]
    assert [one.segment_label for one in described] == ["liver", "spleen", "Übergang"]
    assert [one.segmented_property_type.value for one in described] == ["5", "7", "300"]
    uids = [pydicom.dcmread(file).SOPInstanceUID for file in find_series(folder).files]
    frames = segmentation.get_pixels_by_source_instance(uids, assert_missing_frames_are_empty=True)
    for index, value in enumerate((5, 7, 300)):
        assert np.array_equal(frames[..., index].transpose(2, 1, 0), labels == value)


def test_a_series_without_names_has_a_segmentation_and_an_empty_one_too(tmp_path: Path) -> None:
    def change(one: Dataset, number: int) -> None:
        for keyword in ("PatientName", "PatientID", "StudyID", "AccessionNumber", "StudyDate", "StudyTime"):
            delattr(one, keyword)

    folder = write_series(tmp_path / "case", oblique_image(scan()), change=change)
    segmentation = make_dicom_seg(np.zeros(SIZE, np.uint8), {0: "background", 1: "x"}, folder, "x")
    assert not segmentation.pixel_array.any()


def test_dicom_segmentations_are_for_series_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_series(tmp_path / "scans" / "a", oblique_image(scan()))
    write_image(tmp_path / "scans" / "b.mha", oblique_image(scan()))
    assert run(tmp_path, tmp_path / "scans", "--dicom-seg") == 2
    assert "scans/b.mha is no DICOM series" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_series_that_lacks_what_is_needed_does_not_cost_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_series(tmp_path / "scans" / "a", oblique_image(scan()))
    write_series(
        tmp_path / "scans" / "b", oblique_image(scan()), change=lambda one, n: delattr(one, "StudyInstanceUID")
    )
    assert run(tmp_path, tmp_path / "scans", "--dicom-seg") == 2
    assert "scans/b: no DICOM segmentation can refer to this series" in capsys.readouterr().err
    assert written(tmp_path) == [
        "a.dcm",
        "a.nii.gz",
        "quality.csv",
        "report.html",
    ]


def test_without_highdicom_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_series(tmp_path / "case", oblique_image(scan()))
    monkeypatch.setitem(sys.modules, "highdicom", None)
    assert run(tmp_path, folder, "--dicom-seg") == 2
    assert "pip install 'sslfast[dicom-seg]'" in capsys.readouterr().err


def test_dicom_files_of_others_are_replaced_only_on_demand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_series(tmp_path / "case", oblique_image(scan()))
    assert run(tmp_path, folder) == 0
    other = tmp_path / "out" / "case.dcm"
    other.write_bytes(b"another")
    assert run(tmp_path, folder, "--dicom-seg") == 2
    assert f"the first {other}" in capsys.readouterr().err
    assert other.read_bytes() == b"another"
    assert run(tmp_path, folder, "--dicom-seg", "--overwrite") == 0
    written = other.read_bytes()
    capsys.readouterr()
    assert run(tmp_path, folder, "--dicom-seg") == 0
    assert "1 of 1 segmentations are in" in capsys.readouterr().out
    assert other.read_bytes() == written


def test_a_slice_that_was_lost_in_between_is_named(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "case", oblique_image(scan()), name=lambda number: f"{number}.dcm")
    (folder / "3.dcm").unlink()
    with pytest.raises(UserError, match=r"case/2\.dcm and 4\.dcm are 5 mm apart"):
        make_dicom_seg(np.zeros(SIZE, np.uint8), {0: "background", 1: "x"}, folder, "x")
