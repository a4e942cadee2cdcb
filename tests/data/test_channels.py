"""Images of several channels: each layout in which they come, and what is missing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from helpers.training import train
from helpers.volumes import noise, write_cases, write_volume
from sslfast import UserError
from sslfast.data.channels import channel_names
from sslfast.data.folder import Dataset, open_dataset
from sslfast.data.nifti import read_channels, read_header
from sslfast.data.volumes import decode, grid_spacing
from sslfast.options import Preprocessing
from sslfast.predict import main as predict
from sslfast.prepare import main as prepare
from sslfast.training.checkpoint import load_model

NAMES = {"0": "T1", "1": "T2"}


def folders(data: Path) -> Path:
    """A folder for each channel."""
    for path in [*(data / "images").iterdir()]:
        image = np.asarray(nib.load(path).dataobj)
        write_volume(data / "images/T1" / path.name, image)
        write_volume(data / "images/T2" / path.name, 5 - image)
        path.unlink()
    return data


def nnunet(data: Path) -> Path:
    """Files named by case and channel, as nnU-Net has them."""
    folders(data)
    for number, channel in NAMES.items():
        for path in (data / "images" / channel).iterdir():
            (data / "imagesTr").mkdir(exist_ok=True)
            path.rename(data / "imagesTr" / path.name.replace(".nii.gz", f"_000{number}.nii.gz"))
    shutil.rmtree(data / "images")
    (data / "labels").rename(data / "labelsTr")
    labels = {"background": 0, "box": 1}
    (data / "dataset.json").write_text(json.dumps({"channel_names": NAMES, "labels": labels, "file_ending": ".nii.gz"}))
    return data


def decathlon(data: Path) -> Path:
    """A 4D file for each case."""
    for path in (data / "images").iterdir():
        image = np.asarray(nib.load(path).dataobj)
        write_volume(path, np.stack((image, 5 - image), -1))
    cases = sorted(path.name for path in (data / "images").iterdir())
    (data / "images").rename(data / "imagesTr")
    training = [
        {"image": f"imagesTr/{name}", **({"label": f"labels/{name}"} if (data / "labels" / name).exists() else {})}
        for name in cases
    ]
    description = {"modality": NAMES, "labels": {"0": "background", "1": "box"}, "training": training}
    (data / "dataset.json").write_text(json.dumps(description))
    return data


LAYOUTS = pytest.mark.parametrize("layout", [folders, nnunet, decathlon], ids=lambda layout: layout.__name__)


def arrays(dataset: Dataset) -> dict[str, np.ndarray]:
    return {case.name: read_channels(case.images).array for case in dataset.training}


@LAYOUTS
def test_every_layout_has_the_same_channels(tmp_path: Path, layout: type) -> None:
    plain = write_cases(tmp_path / "plain", cases=3, labelled=2)
    dataset = open_dataset(layout(write_cases(tmp_path / "data", cases=3, labelled=2)))
    assert dataset.channels == ("T1", "T2")
    assert [(case.name, case.label is not None) for case in dataset.training] == [
        ("case_0", True), ("case_1", True), ("case_2", False)
    ]  # fmt: skip
    for case in open_dataset(plain).training:
        image = read_channels(case.images).array
        assert np.array_equal(arrays(dataset)[case.name], np.concatenate((image, 5 - image)))


@LAYOUTS
def test_a_run_on_two_channels_segments_new_scans_of_every_layout(
    tmp_path: Path, layout: type, capsys: pytest.CaptureFixture[str]
) -> None:
    data = layout(write_cases(tmp_path / "data", cases=3, labelled=2))
    assert prepare(["--data", str(data)]) == 0
    assert "channels: T1, T2" in capsys.readouterr().out
    assert train(data, tmp_path / "run", "--steps", 2) == 0
    model = load_model(tmp_path / "run")
    assert model.channels == ("T1", "T2")
    segmented = []
    for other in (folders, nnunet, decathlon):
        scans = other(write_cases(tmp_path / other.__name__, cases=2, labelled=1))
        images = scans / ("images" if other is folders else "imagesTr")
        flags = ["--checkpoint", str(tmp_path / "run"), "--images", str(images), "--output", str(tmp_path / "out")]
        assert predict([*flags, "--device", "cpu", "--overwrite"]) == 0
        paths = sorted((tmp_path / "out").glob("*.nii.gz"))
        assert [path.name for path in paths] == ["case_0.nii.gz", "case_1.nii.gz"]
        segmented.append([np.asarray(nib.load(path).dataobj) for path in paths])
    for others in segmented[1:]:
        assert all(np.array_equal(one, other) for one, other in zip(segmented[0], others))


def test_the_second_channel_is_seen(tmp_path: Path) -> None:
    data = folders(write_cases(tmp_path / "data", cases=3, labelled=2))
    case = open_dataset(data).training[0]
    image = decode(case, Preprocessing(), num_classes=2, ignore_label=-1, channels=2).image
    assert image.shape == (2, 20, 18, 16)
    for channel in image:  # each is normalised by itself
        assert (channel.mean(), channel.std()) == pytest.approx((0, 1), abs=1e-5)
    np.testing.assert_allclose(image[0], -image[1], atol=1e-5)


def test_a_missing_channel_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = folders(write_cases(tmp_path / "folders", cases=3, labelled=2))
    (data / "images/T2/case_1.nii.gz").unlink()
    with pytest.raises(
        UserError, match=r"images: the case 'case_1' lacks channel 1 \(T2\); add what lacks, or remove the case"
    ):
        open_dataset(data)
    raw = nnunet(write_cases(tmp_path / "nnunet", cases=3, labelled=2))
    (raw / "imagesTr/case_2_0000.nii.gz").unlink()
    with pytest.raises(UserError, match=r"imagesTr: the case 'case_2' lacks channel 0 \(T1\)"):
        open_dataset(raw)
    series = decathlon(write_cases(tmp_path / "decathlon", cases=3, labelled=2))
    write_volume(series / "imagesTr/case_2.nii.gz", noise(20, 18, 16))
    assert train(series, tmp_path / "run", "--steps", 1) == 2
    assert "case_2.nii.gz has 1 channel, and the dataset 2" in capsys.readouterr().err
    assert prepare(["--data", str(series)]) == 2
    assert "case_2.nii.gz has 1 channel, and the dataset 2" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["images/c7.mgz", "images/T2/c9.mgz", "images/FLAIR/c1.mgz"])
def test_what_cannot_be_read_beside_channels_is_named(tmp_path: Path, place: str) -> None:
    data = folders(write_cases(tmp_path, cases=3, labelled=2))
    (data / place).parent.mkdir(exist_ok=True)
    (data / place).write_bytes(b"x")
    with pytest.raises(UserError, match=r"(c7\.mgz|c9\.mgz|FLAIR) in .*are read"):
        open_dataset(data)


def test_odd_names_of_channels_and_labels_are_understood_or_explained(tmp_path: Path) -> None:
    data = nnunet(write_cases(tmp_path / "seg", cases=3, labelled=2))
    (data / "imagesTr").rename(data / "images")
    (data / "labelsTr").rename(data / "labels")
    (data / "labels/case_0.nii.gz").rename(data / "labels/case_0_seg.nii.gz")
    assert [(case.name, len(case.images)) for case in open_dataset(data).training if case.label] == [
        ("case_0", 2), ("case_1", 2)
    ]  # fmt: skip
    for path in (data / "images").iterdir():
        write_volume(path, noise(20, 18, 16, 2))
    shutil.rmtree(data / "labels")
    assert [case.name for case in open_dataset(data).training][:2] == ["case_0_0000", "case_0_0001"]  # 4D files
    patients = write_cases(tmp_path / "patients", cases=2, labelled=2)
    for path in [*(patients / "images").iterdir()]:
        (patients / "images" / path.name.removesuffix(".nii.gz")).mkdir()
        path.rename(patients / "images" / path.name.removesuffix(".nii.gz") / "T1.nii.gz")
    with pytest.raises(UserError, match=r"case_0 has the name of a label map; a folder in .* holds one channel of all"):
        open_dataset(patients)


def test_predict_names_what_lacks_a_channel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = folders(write_cases(tmp_path / "data", cases=3, labelled=2))
    assert train(data, tmp_path / "run", "--steps", 1) == 0
    plain = write_cases(tmp_path / "plain", cases=2, labelled=1) / "images"
    flags = ["--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert predict([*flags, "--images", str(plain)]) == 2
    assert "case_0.nii.gz has 1 channel; the networks were trained with 2: T1, T2" in capsys.readouterr().err
    (plain / "case_0.nii.gz").rename(plain / "case_0_0000.nii.gz")
    (plain / "case_1.nii.gz").rename(plain / "case_0_0001.nii.gz")
    write_volume(plain / "case_1_0001.nii.gz", noise(9, 9, 9))
    assert predict([*flags, "--images", str(plain)]) == 2
    assert "the case 'case_1' lacks channel 0 (T1)" in capsys.readouterr().err
    assert predict([*flags, "--images", str(plain / "case_0_0000.nii.gz"), str(plain / "case_0_0001.nii.gz")]) == 0
    beside = ["--checkpoint", str(tmp_path / "run"), "--output", str(data / "images"), "--device", "cpu"]
    assert predict([*beside, "--images", str(data / "images")]) == 2
    assert "is a folder of the dataset" in capsys.readouterr().err
    (data / "images/T2").rename(data / "images/FLAIR")
    assert predict([*flags, "--images", str(data / "images")]) == 2
    assert "has the folders FLAIR, T1; the channels are T1, T2. Rename them." in capsys.readouterr().err


def test_channels_on_other_grids_and_empty_ones_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = folders(write_cases(tmp_path / "data", cases=3, labelled=2))
    write_volume(data / "images/T2/case_0.nii.gz", noise(20, 18, 15))
    write_volume(data / "images/T2/case_1.nii.gz", np.zeros((20, 18, 16), np.float32))
    assert prepare(["--data", str(data)]) == 2
    error = capsys.readouterr().err
    assert "T1/case_0.nii.gz has shape (20, 18, 16)" in error
    assert "T2/case_0.nii.gz has (20, 18, 15)" in error
    assert "T2/case_1.nii.gz is empty: every voxel is 0" in error


@pytest.mark.parametrize(
    ("description", "expected"),
    [
        ({}, ()),
        ({"channel_names": {"0": "CT"}}, ("CT",)),
        ({"modality": {"1": "T2", "0": "T1"}}, ("T1", "T2")),
        ({"modality": "MRI"}, ("MRI",)),
        ({"channel_names": ["a", "b"]}, ("a", "b")),
        ({"channel_names": {"0": "a", "2": "b"}}, None),
        ({"channel_names": {"0": "a", "1": "a"}}, None),
        ({"channel_names": {"0": 3}}, None),
        ({"modality": 3}, None),
    ],
)
def test_names_of_channels_are_read_or_refused(
    description: dict[str, object], expected: tuple[str, ...] | None
) -> None:
    if expected is None:
        with pytest.raises(UserError, match=r"^d\.json: '(channel_names|modality)' "):
            channel_names(Path("d.json"), description)
    else:
        assert channel_names(Path("d.json"), description) == expected


def test_headers_are_read_without_their_voxels(tmp_path: Path) -> None:
    path = write_volume(tmp_path / "a.nii.gz", noise(5, 6, 7, 3), np.diag([-1.0, 2.0, 4.0, 1.0]))
    header = read_header([path])
    assert (header.array.shape, header.spacing) == ((3, 5, 6, 7), (1.0, 2.0, 4.0))
    turned = write_volume(tmp_path / "b.nii.gz", noise(5, 6, 7), np.diag([1.0, 2.0, 8.0, 1.0])[[2, 1, 0, 3]])
    assert grid_spacing([[path], [turned], [turned]], Preprocessing()) == (8.0, 2.0, 1.0)
    assert grid_spacing([[path]], Preprocessing(spacing=(1, 2, 3))) == (1, 2, 3)


@pytest.mark.skipif(
    not (BRATS := Path(os.environ.get("SSLFAST_REAL_DATA", "")) / "brats2013_2mm").is_dir(),
    reason="SSLFAST_REAL_DATA names no folder with brats2013_2mm",
)
def test_real_tumours_in_two_channels_are_trained_on_and_segmented(tmp_path: Path) -> None:
    dataset = open_dataset(BRATS)
    assert dataset.channels == ("FLAIR", "T1c")
    assert len(dataset.training) == 6
    assert train(BRATS, tmp_path / "run", "--steps", 2, "--labeled", 3, "--spacing", 4, "--patch", 32, 32, 32) == 0
    model = load_model(tmp_path / "run")
    assert [*model.classes.values()] == ["background", "necrosis", "edema", "non-enhancing", "enhancing"]
    scans = [str(path) for path in dataset.training[5].images]
    flags = ["--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert predict([*flags, "--images", *scans]) == 0
    segmented, scan = nib.load(tmp_path / "out/pat0006.nii.gz"), nib.load(scans[0])
    assert segmented.shape == scan.shape
    np.testing.assert_allclose(segmented.affine, scan.affine, rtol=1e-6)
