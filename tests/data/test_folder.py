"""Dataset folders: both layouts, the split, and what is wrong with a folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from helpers.volumes import write_cases, write_volume
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
    assert dataset.classes.names == {0: "background", 1: "heart"}


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
    assert dataset.classes.names == {0: "background", 1: "left", 2: "right"}


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
    with pytest.raises(UserError, match=r"case_1\.nii\.gz in .*labels: no image in .*images has this name"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"labels": {"1": "a", "2": "b"}}, "must have the background as 0"),
        ({"labels": {"0": "a", "01": "b", "1": "c"}}, "a class or a value twice"),
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


def test_labels_may_have_another_ending_or_form_of_their_name(tmp_path: Path) -> None:
    names = {"case_0": "case_0_seg.nii.gz", "case_1": "case_1.NII.GZ", "case_2": "case_2-label.nii.gz"}
    names |= {"case_3": "case_3_0000.nii.gz", "M\u00fcller": "Mu\u0308ller.nii.gz"}
    write_cases(tmp_path, cases=5, labelled=5)
    (tmp_path / "images/case_4.nii.gz").rename(tmp_path / "images/M\u00fcller.nii.gz")
    for (name, label), i in zip(names.items(), range(5), strict=True):
        (tmp_path / f"labels/case_{i}.nii.gz").rename(tmp_path / "labels" / label)
        assert (tmp_path / f"images/{name}.nii.gz").exists()
    dataset = open_dataset(tmp_path)
    assert {case.name: case.label.name for case in dataset.training} == names


def test_names_of_nnunet_lose_their_channel_and_numbers_stay(tmp_path: Path) -> None:
    write_cases(tmp_path / "channel", cases=3, labelled=2)
    for image in (tmp_path / "channel/images").iterdir():
        image.rename(image.with_name(image.name.replace(".nii.gz", "_0000.nii.gz")))
    cases = open_dataset(tmp_path / "channel").training
    assert [(case.name, case.label is not None) for case in cases] == [
        ("case_0", True), ("case_1", True), ("case_2", False)
    ]  # fmt: skip
    shutil.copy(cases[0].image, tmp_path / "channel/images/case_0_0001.nii.gz")
    with pytest.raises(UserError, match=r"the case 'case_1' lacks channel 1 \(channel 1\)"):
        open_dataset(tmp_path / "channel")
    write_cases(tmp_path / "numbers", cases=3, labelled=2)
    for file in [*(tmp_path / "numbers/images").iterdir(), *(tmp_path / "numbers/labels").iterdir()]:
        file.rename(file.with_name(file.name.replace("case_", "scan_000")))
    assert [case.name for case in open_dataset(tmp_path / "numbers").training] == [
        "scan_0000",
        "scan_0001",
        "scan_0002",
    ]


def test_a_list_of_nnunet_1_leaves_the_channel_out(tmp_path: Path) -> None:
    write_cases(tmp_path, cases=2, labelled=2)
    for image in (tmp_path / "images").iterdir():
        image.rename(image.with_name(image.name.replace(".nii.gz", "_0000.nii.gz")))
    (tmp_path / "images").rename(tmp_path / "imagesTr")
    entries = [{"image": f"./imagesTr/case_{i}.nii.gz", "label": f"./labels/case_{i}.nii.gz"} for i in range(2)]
    describe(tmp_path, labels={"0": "background", "1": "heart"}, training=entries)
    cases = open_dataset(tmp_path).training
    assert [(case.name, case.image.name) for case in cases] == [
        ("case_0", "case_0_0000.nii.gz"), ("case_1", "case_1_0000.nii.gz")
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"dataset\.json lists './imagesTr/case_1\.nio', which does not exist"):
        open_dataset(describe(tmp_path, training=[{"image": "./imagesTr/case_1.nio"}]))
    describe(tmp_path, labels={"0": "background", "1": "heart"}, training=entries)
    shutil.copy(cases[1].image, tmp_path / "imagesTr/case_1_0001.nii.gz")
    assert [len(case.images) for case in open_dataset(tmp_path).training] == [1, 2]  # said when they are decoded
    (tmp_path / "imagesTr/case_1_0001.nii.gz").rename(tmp_path / "imagesTr/case_1_0002.nii.gz")
    with pytest.raises(UserError, match=r"the case 'case_1' has the channels \[0, 2\]; add those that lack"):
        open_dataset(tmp_path)


def test_two_labels_of_one_image_are_refused(tmp_path: Path) -> None:
    write_cases(tmp_path, cases=2, labelled=2)
    shutil.copy(tmp_path / "labels/case_0.nii.gz", tmp_path / "labels/case_0_seg.nii.gz")
    with pytest.raises(UserError, match=r"case_0\.nii\.gz and .*case_0_seg\.nii\.gz both belong to .*images/case_0"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("folder", ["images", "labels"])
@pytest.mark.parametrize("name", ["a.img", "a.raw", "a.dcm", "a.npy", "more"])
def test_volumes_that_are_not_read_are_listed(tmp_path: Path, folder: str, name: str) -> None:
    write_cases(tmp_path, cases=2, labelled=2)
    (tmp_path / folder / "notes.txt").write_text("not a volume")
    (tmp_path / folder / "._case_0.nii.gz").write_text("left by another file system")
    open_dataset(tmp_path)
    if name == "more":
        (tmp_path / folder / name).mkdir()
    else:
        (tmp_path / folder / name).write_bytes(b"x")
    with pytest.raises(UserError, match=rf"^{name} in .*{folder}: only \*\.nii\.gz, \*\.nii, .* DICOM"):
        open_dataset(tmp_path)


def test_a_datalist_names_validation_and_test(tmp_path: Path) -> None:
    write_cases(tmp_path, cases=5, labelled=4)
    entries = [{"image": f"images/case_{i}.nii.gz", "label": f"labels/case_{i}.nii.gz"} for i in range(4)]
    (tmp_path / "task").mkdir()
    for folder in ("images", "labels"):
        (tmp_path / folder).rename(tmp_path / "task" / f"{folder}Tr")
    for entry in entries:
        entry |= {key: path.replace("s/", "sTr/") for key, path in entry.items()}
    unlabelled = {"image": "imagesTr/case_4.nii.gz"}
    describe(tmp_path / "task", training=entries[:2], validation=entries[2:3], test=[entries[3], unlabelled])
    dataset = open_dataset(tmp_path / "task")
    named = {part: [case.name for case in getattr(dataset, part)] for part in ("training", "validation", "test")}
    assert named == {"training": ["case_0", "case_1", "case_4"], "validation": ["case_2"], "test": ["case_3"]}
    assert all(case.label for case in (*dataset.validation, *dataset.test))
    describe(tmp_path / "task", training=entries[:2], validation=[unlabelled])
    with pytest.raises(UserError, match="validation case 'case_4' has no label"):
        open_dataset(tmp_path / "task")


def test_a_task_of_symbolic_links_is_read(tmp_path: Path) -> None:
    write_cases(tmp_path / "store", cases=2, labelled=2)
    for folder in ("images", "labels"):
        (tmp_path / "task" / folder).parent.mkdir(exist_ok=True)
        (tmp_path / "task" / f"{folder}Tr").mkdir()
        for file in (tmp_path / "store" / folder).iterdir():
            (tmp_path / "task" / f"{folder}Tr" / file.name).symlink_to(file)
    describe(tmp_path / "task", training=[{"image": "imagesTr/case_0.nii.gz", "label": "labelsTr/case_0.nii.gz"}])
    assert open_dataset(tmp_path / "task").training[0].label is not None


def test_a_split_says_why_cases_are_unlabelled(tmp_path: Path) -> None:
    dataset = open_dataset(write_cases(tmp_path, cases=7, labelled=5))
    said = str(split_training(dataset, labelled=2, validation=1))
    assert said == "2 labelled cases, 4 unlabelled (2 without a label map, 2 by --labeled 2), 1 for validation"


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        '{"labels": NaN}',
        '{"labels": {"0": "a", "1": Infinity}}',
        '{"a": "\\ud800',
        "\0",
        '{"labels": 1e999',
    ],
)
def test_json_of_any_kind_is_named(tmp_path: Path, content: str) -> None:
    write_cases(tmp_path, cases=1, labelled=1)
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(UserError, match=r"dataset\.json cannot be read as JSON"):
        open_dataset(tmp_path)


def test_json_with_a_byte_order_mark_is_read_and_a_loop_is_named(tmp_path: Path) -> None:
    write_cases(tmp_path, cases=1, labelled=1)
    (tmp_path / "dataset.json").write_bytes(b'\xef\xbb\xbf{"labels": {"0": "background", "1": "heart"}}')
    assert open_dataset(tmp_path).classes.names == {0: "background", 1: "heart"}
    (tmp_path / "dataset.json").unlink()
    (tmp_path / "dataset.json").symlink_to(tmp_path / "dataset.json")
    with pytest.raises(UserError, match=r"dataset\.json cannot be read"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    "path", ["images\0/a.nii.gz", "imagesTr/../../outside.nii.gz", "/outside.nii.gz", "../task/a.nii.gz"]
)
def test_a_path_that_leads_out_of_the_folder_is_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "task" / "imagesTr").mkdir(parents=True)
    (tmp_path / "outside.nii.gz").write_bytes(b"")
    describe(tmp_path / "task", training=[{"image": path}])
    with pytest.raises(UserError, match="outside the dataset's folder"):
        open_dataset(tmp_path / "task")


@pytest.mark.parametrize(
    "labels",
    [
        {"background": 0, "x": 1.7},
        {"background": False, "x": True},
        {"0": {"a": 1}, "1": "b"},
        {"0": None, "1": "b"},
        7,
    ],
)
def test_names_and_values_of_classes_are_words_and_whole_numbers(tmp_path: Path, labels: object) -> None:
    write_cases(tmp_path, cases=2, labelled=1)
    with pytest.raises(UserError, match=r'dataset\.json: "labels" must map numbers to names'):
        open_dataset(describe(tmp_path, labels=labels))


def test_what_is_there_twice_in_json_is_named(tmp_path: Path) -> None:
    write_cases(tmp_path, cases=2, labelled=1)
    (tmp_path / "dataset.json").write_text('{"labels": {"0": "b", "1": "c", "1": "d"}}')
    with pytest.raises(UserError, match=r"dataset\.json cannot be read as JSON: '1' is there twice"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("name", ["testing", "val", "valid", "train"])
def test_lists_of_another_name_are_not_passed_over(tmp_path: Path, name: str) -> None:
    write_cases(tmp_path, cases=3, labelled=3)
    with pytest.raises(UserError, match=f"the list '{name}' is not read; name it training or validation or test"):
        open_dataset(describe(tmp_path, **{name: ["case_2"]}))


def test_label_maps_of_another_name_in_a_datalist_are_not_passed_over(tmp_path: Path) -> None:
    write_cases(tmp_path, cases=1, labelled=1)
    (tmp_path / "images").rename(tmp_path / "imagesTr")
    entry = {"image": "imagesTr/case_0.nii.gz", "seg": "labels/case_0.nii.gz", "fold": 0}
    with pytest.raises(UserError, match=r"entry only .* are read, not 'seg': 'labels/case_0\.nii\.gz'"):
        open_dataset(describe(tmp_path, training=[entry]))


@pytest.mark.parametrize("name", ["Labels", "labelsTr", "masks", "segmentations"])
def test_a_folder_of_label_maps_with_another_name_is_named(tmp_path: Path, name: str) -> None:
    write_cases(tmp_path, cases=2, labelled=1)
    (tmp_path / "labels").rename(tmp_path / name)
    with pytest.raises(UserError, match=f"{name}: label maps are read from .*/labels; rename the folder"):
        open_dataset(tmp_path)


def test_names_in_a_list_may_be_in_any_form(tmp_path: Path) -> None:
    write_cases(tmp_path, cases=3, labelled=3)
    for kind in ("images", "labels"):
        (tmp_path / kind / "case_0.nii.gz").rename(tmp_path / kind / "M\u00fcller.nii.gz")
    dataset = open_dataset(describe(tmp_path, test=["Mu\u0308ller"]))
    assert [case.name for case in dataset.test] == ["M\u00fcller"]


def test_a_case_of_nnunet_in_which_nothing_is_annotated_is_unlabelled(tmp_path: Path) -> None:
    write_cases(tmp_path, cases=3, labelled=3)
    describe(tmp_path, labels={"background": 0, "box": 1, "ignore": 2}, channel_names={"0": "CT"})
    for path in (tmp_path / "images").iterdir():
        path.rename(path.with_name(path.name.replace(".nii.gz", "_0000.nii.gz")))
    for kind in ("images", "labels"):
        (tmp_path / kind).rename(tmp_path / f"{kind}Tr")
    write_volume(tmp_path / "labelsTr/case_1.nii.gz", np.full((20, 18, 16), 2, np.uint8))
    assert [case.name for case in open_dataset(tmp_path).training if case.label] == ["case_0", "case_2"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"test": {"image": "imagesTr/a.nii.gz"}}, "'test' must be a list, got {'image'"),
        ({"test": ["imagesTr/case_0.nii.gz"]}, "case 'case_0' is listed twice. Remove one entry."),
    ],
)
def test_lists_of_the_decathlon_that_cannot_be_are_named(
    tmp_path: Path, content: dict[str, object], message: str
) -> None:
    write_cases(tmp_path, cases=1, labelled=0)
    (tmp_path / "images").rename(tmp_path / "imagesTr")
    with pytest.raises(UserError, match=rf"dataset\.json: {message}"):
        open_dataset(describe(tmp_path, training=["imagesTr/case_0.nii.gz"], **content))
