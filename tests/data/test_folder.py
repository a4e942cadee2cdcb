"""Dataset folders: both layouts, the split, and what is wrong with a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.volumes import write_cases
from sslfast import UserError
from sslfast.data.folder import open_dataset, split_training


def describe(folder: Path, **content: object) -> Path:
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def test_plain_folders_are_cases_in_the_order_of_their_names(tmp_path: Path) -> None:
    dataset = open_dataset(write_cases(tmp_path, cases=5, labelled=3))
    assert [case.name for case in dataset.training] == [f"case_{i}" for i in range(5)]
    assert [case.label is not None for case in dataset.training] == [True] * 3 + [False] * 2
    assert dataset.classes is None


def test_a_description_names_classes_and_parts(tmp_path: Path) -> None:
    write_cases(tmp_path, cases=6, labelled=6)
    describe(tmp_path, labels={"0": "background", "1": "heart"}, validation=["case_1"], test=["case_0", "case_5"])
    dataset = open_dataset(tmp_path)
    assert [case.name for case in dataset.training] == ["case_2", "case_3", "case_4"]
    assert [case.name for case in dataset.test] == ["case_0", "case_5"]
    assert dataset.classes == {0: "background", 1: "heart"}


def test_folders_of_the_decathlon_are_read(tmp_path: Path) -> None:
    write_cases(tmp_path, cases=4, labelled=3)
    (tmp_path / "images").rename(tmp_path / "imagesTr")
    (tmp_path / "labels").rename(tmp_path / "labelsTr")
    entries = [{"image": f"./imagesTr/case_{i}.nii.gz", "label": f"./labelsTr/case_{i}.nii.gz"} for i in range(3)]
    describe(
        tmp_path, labels={"background": 0, "left": 1, "right": 2}, training=entries, test=["./imagesTr/case_3.nii.gz"]
    )
    dataset = open_dataset(tmp_path)
    assert [case.label is not None for case in dataset.training] == [True, True, True, False]
    assert dataset.classes == {0: "background", 1: "left", 2: "right"}


def test_the_unlabelled_carry_no_path_to_a_label(tmp_path: Path) -> None:
    dataset = open_dataset(write_cases(tmp_path, cases=6, labelled=5))
    split = split_training(dataset, labelled=2, validation=1)
    assert [case.name for case in split.labelled] == ["case_0", "case_1"]
    assert [case.name for case in split.validation] == ["case_4"]
    assert [case.name for case in split.unlabelled] == ["case_2", "case_3", "case_5"]
    assert all(case.label is None for case in split.unlabelled)


@pytest.mark.parametrize(("labelled", "validation"), [(0, 0), (6, 0), (5, 1), (None, 5)])
def test_more_labels_than_there_are_are_refused(tmp_path: Path, labelled: int | None, validation: int) -> None:
    dataset = open_dataset(write_cases(tmp_path, cases=6, labelled=5))
    with pytest.raises(UserError, match=r"[45] labelled cases"):
        split_training(dataset, labelled, validation)


def test_a_dataset_without_a_label_is_refused(tmp_path: Path) -> None:
    dataset = open_dataset(write_cases(tmp_path, cases=2, labelled=0))
    with pytest.raises(UserError, match="no training case has a label"):
        split_training(dataset, None)


def test_empty_and_unknown_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no folder images/"):
        open_dataset(tmp_path)
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match="the list is empty"):
        open_dataset(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        open_dataset(tmp_path / "nowhere")
    (tmp_path / "images").rmdir()
    describe(tmp_path, training=[])
    with pytest.raises(UserError, match="the list is empty"):
        open_dataset(tmp_path)


def test_a_label_without_an_image_is_refused(tmp_path: Path) -> None:
    write_cases(tmp_path, cases=3, labelled=3)
    (tmp_path / "images" / "case_1.nii.gz").unlink()
    with pytest.raises(UserError, match=r"case_1\.nii\.gz has no image of that name"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"labels": {"0": "a", "2": "b"}}, "without a gap"),
        ({"labels": 3}, "must map numbers to names"),
        ({"test": ["case_9"]}, "'case_9' has no image"),
        ({"test": ["case_2"]}, "'case_2' has no label"),
        ({"test": ["case_0"], "validation": ["case_0"]}, "listed under validation and test"),
        ({"test": "case_0"}, "must be a list of case names"),
    ],
)
def test_a_wrong_description_is_named(tmp_path: Path, content: dict[str, object], message: str) -> None:
    write_cases(tmp_path, cases=3, labelled=2)
    describe(tmp_path, **content)
    with pytest.raises(UserError, match=message):
        open_dataset(tmp_path)


def test_json_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    write_cases(tmp_path, cases=1, labelled=1)
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(UserError, match=r"dataset\.json cannot be read as JSON"):
        open_dataset(tmp_path)
    (tmp_path / "dataset.json").write_text("[]")
    with pytest.raises(UserError, match="must hold a JSON object"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"image": "../outside.nii.gz"}, "outside the dataset's folder"),
        ({"image": "/etc/passwd.nii.gz"}, "outside the dataset's folder"),
        ({"image": "imagesTr/none.nii.gz"}, "does not exist"),
        ({"label": "x"}, "must be"),
        (7, "must be"),
    ],
)
def test_a_wrong_entry_of_the_decathlon_is_named(tmp_path: Path, entry: object, message: str) -> None:
    (tmp_path / "task").mkdir()
    (tmp_path / "outside.nii.gz").write_bytes(b"")
    describe(tmp_path / "task", training=[entry])
    with pytest.raises(UserError, match=message):
        open_dataset(tmp_path / "task")
