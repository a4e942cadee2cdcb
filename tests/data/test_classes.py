"""Values of label maps and the classes that they stand for: named, numbered, or with a gap."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from helpers.training import train
from helpers.volumes import write_cases, write_volume
from sslfast import UserError
from sslfast.data.classes import Classes, choose_classes, described_classes, find_values, name_classes
from sslfast.data.folder import open_dataset
from sslfast.data.nifti import read_label
from sslfast.evaluate import main as evaluate
from sslfast.evaluation import evaluate_folder
from sslfast.predict import main as predict
from sslfast.prepare import main as prepare
from sslfast.training.checkpoint import load_model

SIZE = (20, 18, 16)


def labels_with(folder: Path, *values: int, cases: int = 3, labelled: int = 2) -> Path:
    """A dataset whose label maps hold these values instead of 1, 2 and so on."""
    write_cases(folder, cases=cases, labelled=labelled, size=SIZE, classes=len(values) + 1)
    for path in (folder / "labels").iterdir():
        write_volume(path, np.array([0, *values], np.int16)[np.asarray(nib.load(path).dataobj)])
    return folder


def find_classes(labels: list[Path], ignore_label: int) -> dict[int, str]:
    return name_classes(find_values(labels, ignore_label), ignore_label)


def paths(folder: Path) -> list[Path]:
    return sorted((folder / "labels").iterdir())


def test_values_without_a_gap_are_classes(tmp_path: Path) -> None:
    assert find_classes(paths(labels_with(tmp_path, 1, 2)), -1) == {0: "background", 1: "class 1", 2: "class 2"}
    assert find_classes(paths(labels_with(tmp_path, 1, 2)), 2) == {0: "background", 1: "class 1"}


@pytest.mark.parametrize(
    ("values", "shown", "offer"),
    [
        ((255,), "0, 255", "name_255=255"),
        ((1, 2, 4), "0, 1, 2, 4", "name_1=1 name_2=2 name_4=4"),
        ((5, 90), "0, 5, 90", "name_5=5 name_90=90"),
    ],
)
def test_values_with_a_gap_make_no_class_that_nobody_drew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], values: tuple[int, ...], shown: str, offer: str
) -> None:
    data = labels_with(tmp_path / "data", *values)
    with pytest.raises(UserError, match=rf"hold the values {shown}, not 0, 1, 2 and so on.*--classes {offer}"):
        find_classes(paths(data), -1)
    assert train(data, tmp_path / "run", "--steps", 1) == 2
    assert prepare(["--data", str(data)]) == 2
    assert capsys.readouterr().err.count(f"--classes {offer}") == 2
    assert not (tmp_path / "run").exists()


def test_a_mask_whose_foreground_is_ignored_is_no_label(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = labels_with(tmp_path / "data", 255)
    assert train(data, tmp_path / "run", "--steps", 1, "--ignore-label", 255) == 2
    error = capsys.readouterr().err
    assert "no label map has a foreground voxel, as 255 is the ignore label" in error
    assert "--classes name_255=255" in error


def test_more_values_than_classes_are_refused(tmp_path: Path) -> None:
    path = write_volume(tmp_path / "l.nii.gz", np.arange(64, dtype=np.uint8).reshape(4, 4, 4))
    with pytest.raises(UserError, match="there are 64 classes, and sslfast takes at most 32"):
        find_classes([path], -1)


def test_more_classes_than_the_kernels_take_are_a_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = labels_with(tmp_path, 1)
    (data / "dataset.json").write_text(json.dumps({"labels": {str(i): f"organ {i}" for i in range(118)}}))
    assert prepare(["--data", str(data)]) == 2
    assert "there are 118 classes, and sslfast takes at most 32" in capsys.readouterr().err


def test_a_label_map_becomes_indices_of_its_classes(tmp_path: Path) -> None:
    label = np.array([0, 2, 5, 9], np.uint8).repeat(2).reshape(2, 2, 2)
    path = write_volume(tmp_path / "l.nii.gz", label)
    assert np.array_equal(read_label(path, classes=[0, 2, 5, 9]).array.ravel(), [0, 0, 1, 1, 2, 2, 3, 3])
    assert np.array_equal(read_label(path, classes=[0, 2, 5], ignore_label=9).array.ravel(), [0, 0, 1, 1, 2, 2, -1, -1])
    with pytest.raises(UserError, match="labels 5, 9 are not among the classes 0, 2, nor the ignore label -1"):
        read_label(path, classes=[0, 2])


@pytest.mark.parametrize("by", ["flag", "dataset.json"])
@pytest.mark.parametrize("spacing", [[], ["--spacing", "1.5"]])
def test_the_values_of_the_labels_come_back_in_segmentations_and_metrics(
    tmp_path: Path, by: str, spacing: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    data = labels_with(tmp_path / "data", 5, 300)
    flags: list[object] = ["--classes", "spleen=300", "liver=5"] if by == "flag" else []
    if by == "dataset.json":
        (data / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "spleen": 300, "liver": 5}}))
    assert train(data, tmp_path / "run", "--steps", 2, *spacing, *flags) == 0
    model = load_model(tmp_path / "run")
    assert model.classes == {0: "background", 5: "liver", 300: "spleen"}
    command = ["--checkpoint", str(tmp_path / "run"), "--images", str(data / "images"), "--device", "cpu"]
    assert predict([*command, "--output", str(tmp_path / "out")]) == 0
    segmentations = [nib.load(path) for path in (tmp_path / "out").glob("*.nii.gz")]
    found = {value for segmentation in segmentations for value in np.unique(segmentation.dataobj).tolist()}
    assert found <= {0, 5, 300}
    assert len(found) > 1  # two steps predict noise, of any class
    labels = {path.name.removesuffix(".nii.gz"): path for path in paths(data)}
    evaluation = evaluate_folder(tmp_path / "out", labels, classes=model.classes)
    assert {row["class"] for row in evaluation.rows} == {5, 300}
    same = evaluate_folder(data / "labels", labels)
    assert same.classes == {0: "background", 1: "class 1", 5: "class 5", 300: "class 300"}
    assert same.mean_dice == 1


def test_classes_that_nobody_labelled_and_empty_label_maps_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = labels_with(tmp_path / "data", 1, cases=3, labelled=2)
    write_volume(data / "labels/case_1.nii.gz", np.zeros(SIZE, np.uint8))
    (data / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "liver", "2": "spleen"}}))
    for command in (lambda: prepare(["--data", str(data)]), lambda: train(data, tmp_path / "run", "--steps", 1)):
        assert command() == 0
        error = capsys.readouterr().err
        assert "warning: no labelled training case has spleen; the networks cannot learn it" in error
        assert "warning: no voxel of the foreground is labelled in case_1; is the label map finished?" in error


def test_labels_without_any_foreground_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = labels_with(tmp_path / "data", 1)
    (data / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "liver"}}))
    for path in paths(data):
        write_volume(path, np.zeros(SIZE, np.uint8))
    assert train(data, tmp_path / "run", "--steps", 1) == 2
    assert "none of the 2 labelled cases has a foreground voxel" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["liver"], "--classes liver: each class must be name=value"),
        (["=1"], "each class must be name=value"),
        (["liver=-1"], "each class must be name=value"),
        (["liver=1+"], "each class must be name=value"),
        (["all", "liver=1"], "--classes all: each class must be name=value"),
        (["liver=1", "spleen=1"], "a class or a value twice"),
        (["liver=1", "liver=2"], "a class or a value twice"),
        (["background=0"], "at least one class"),
        (["liver=40000"], "from 1 to 32767"),
        (["core=2", "whole=1+2"], "every value of 'core' is also of a later class; list it after them"),
    ],
)
def test_a_wrong_class_is_named(classes: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose_classes(classes, None, lambda: {0, 1})


ORGANS = Classes({0: "background", 1: "liver", 2: "left lung", 5: "right lung", 9: "spleen"})


@pytest.mark.parametrize(
    ("entries", "names", "merged"),
    [
        ([], ORGANS.names, {}),
        (["all"], ORGANS.names, {}),
        (["liver", "spleen"], {0: "background", 1: "liver", 9: "spleen"}, {2: 0, 5: 0}),
        (["lungs=2+5"], {0: "background", 2: "lungs"}, {1: 0, 5: 2, 9: 0}),
        (["whole=1+2+5", "core=2+5"], {0: "background", 1: "whole", 2: "core"}, {5: 2, 9: 0}),
    ],
)
def test_classes_are_chosen_by_name_or_value_and_merged(
    entries: list[str], names: dict[int, str], merged: dict[int, int]
) -> None:
    assert choose_classes(entries, ORGANS, lambda: {0, 1, 9}) == Classes(names, merged)


def test_a_class_that_dataset_json_does_not_name_gets_the_names_that_it_has() -> None:
    with pytest.raises(
        UserError, match=r"--classes lung: .*, or a name of dataset\.json: background, liver, left lung"
    ):
        choose_classes(["lung"], ORGANS, lambda: {0, 1})
    many = Classes({0: "background", **{value: f"organ {value}" for value in range(1, 30)}})
    with pytest.raises(UserError, match=r"organ 10, organ 11, …$"):
        choose_classes(["lung"], many, lambda: {0, 1})


def test_values_that_no_dataset_json_names_are_classes_or_background_as_asked_for() -> None:
    assert choose_classes(["liver"], ORGANS, lambda: {0, 1, 7}).merged == {2: 0, 5: 0, 7: 0, 9: 0}
    assert choose_classes(["all"], ORGANS, lambda: {0, 1, 7}).names == {**ORGANS.names, 7: "class 7"}
    choose_classes([], ORGANS, lambda: pytest.fail("the label maps need not be read"))


def test_without_a_dataset_json_the_values_of_the_label_maps_count() -> None:
    every = choose_classes(["all"], None, lambda: {0, 5, 7, 255}, ignore_label=-1)
    assert every == Classes({0: "background", 5: "class 5", 7: "class 7", 255: "class 255"})
    assert choose_classes(["x=7"], None, lambda: {0, 5, 7, 255}) == Classes({0: "background", 7: "x"}, {5: 0, 255: 0})


def test_regions_of_nnunet_become_classes_as_nnunet_writes_them() -> None:
    labels = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}
    classes, ignored = described_classes(Path("d.json"), {"labels": labels, "regions_class_order": [1, 2, 3]})
    assert classes == Classes({0: "background", 1: "whole", 2: "core", 3: "enhancing"})
    labels = {"background": 0, "organs": [4, 7], "ignore": 9}
    classes, ignored = described_classes(Path("d.json"), {"labels": labels, "regions_class_order": [7]})
    assert (classes, ignored) == (Classes({0: "background", 7: "organs"}, {4: 7}), 9)


def test_a_region_is_chosen_with_all_of_its_values() -> None:
    labels = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": [3]}
    regions = described_classes(Path("d.json"), {"labels": labels})[0]
    for entries, names, merged in (
        (["whole"], {0: "background", 1: "whole"}, {2: 1, 3: 1}),
        (["core"], {0: "background", 2: "core"}, {1: 0, 3: 2}),
        (["enhancing", "whole"], {0: "background", 1: "whole", 3: "enhancing"}, {2: 1}),
    ):
        assert choose_classes(entries, regions, set) == Classes(names, merged)


@pytest.mark.parametrize("value", [-1, 40000])
def test_a_value_that_no_label_map_holds_is_no_class(value: int) -> None:
    with pytest.raises(UserError, match="at least one class from 1 to 32767, got 'background=0 liver=1"):
        described_classes(Path("d.json"), {"labels": {"background": 0, "liver": [1, value]}})


def test_chosen_and_merged_classes_come_back_in_segmentations_and_metrics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = labels_with(tmp_path / "data", 5, 40, 300)
    assert train(data, tmp_path / "run", "--steps", 1, "--classes", "organs=40+300") == 0
    model = load_model(tmp_path / "run")
    assert (model.classes, model.merged) == ({0: "background", 40: "organs"}, {5: 0, 300: 40})
    flags = ["--checkpoint", str(tmp_path / "run"), "--predictions", str(data / "labels"), "--output", str(tmp_path)]
    assert evaluate([*flags, "--labels", str(data / "labels")]) == 2  # these predictions hold other values
    assert "labels 5, 300 are not among the classes 0, 40" in capsys.readouterr().err
    for path in paths(data):
        label = np.asarray(nib.load(path).dataobj)
        write_volume(tmp_path / "segmented" / path.name, np.where(label >= 40, 40, 0).astype(np.int16))
    assert evaluate([*flags, "--labels", str(data / "labels"), "--predictions", str(tmp_path / "segmented")]) == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["mean_dice"] == 1


def test_more_than_32_classes_are_chosen_from(tmp_path: Path) -> None:
    data = labels_with(tmp_path / "data", 90)
    (data / "dataset.json").write_text(json.dumps({"labels": {str(i): f"organ{i}" for i in range(118)}}))
    assert train(data, tmp_path / "run", "--steps", 1, "--classes", "organ90", "organ7") == 0
    assert load_model(tmp_path / "run").classes == {0: "background", 7: "organ7", 90: "organ90"}


def test_the_ignored_value_of_nnunet_is_no_class(tmp_path: Path) -> None:
    data = labels_with(tmp_path, 1, 9)
    (data / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "liver": 1, "ignore": 9}}))
    dataset = open_dataset(data)
    assert (dataset.classes, dataset.ignore_label) == (Classes({0: "background", 1: "liver"}), 9)
    assert train(data, tmp_path / "run", "--steps", 1) == 0


def test_a_class_that_is_also_ignored_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_cases(tmp_path / "data", cases=3, labelled=2)
    (data / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "box": 1}}))
    assert train(data, tmp_path / "run", "--ignore-label", 1) == 2
    assert "1 is both the class 'box' and the ignore label" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert prepare(["--data", str(data), "--ignore-label", "1"]) == 2
    assert "1 is both the class 'box' and the ignore label" in capsys.readouterr().err


@pytest.mark.parametrize(("value", "ignored"), [(254.7, 255), (-0.6, -1)])
def test_a_voxel_near_the_ignored_value_is_no_ignored_one(tmp_path: Path, value: float, ignored: int) -> None:
    array = np.zeros((4, 4, 4), np.float32)
    array[0], array[1] = 1, value
    with pytest.raises(UserError, match="a label map must hold whole numbers"):
        read_label(write_volume(tmp_path / "label.nii.gz", array), ignore_label=ignored)
