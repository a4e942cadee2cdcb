"""The evaluate command: its table and files, and what it refuses."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from helpers.volumes import write_volume
from sslfast import UserError
from sslfast.data.files import volume_files
from sslfast.data.nifti import Volume, read_label
from sslfast.evaluate import main
from sslfast.evaluation import evaluate_folder
from sslfast.metrics import case_metrics
from sslfast.model import Model
from sslfast.networks import build_networks
from sslfast.options import LAST, NetworkOptions, Preprocessing
from sslfast.training.checkpoint import load_model, save_checkpoint


def cube(corner: int, value: int = 1) -> np.ndarray:
    array = np.zeros((12, 11, 10), np.uint8)
    array[corner : corner + 4, 3:7, 3:7] = value
    return array


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    predictions, labels = tmp_path / "predictions", tmp_path / "labels"
    for name, predicted, reference in (("a", cube(3), cube(3)), ("b", cube(5), cube(3)), ("c", cube(0, 0), cube(3))):
        write_volume(predictions / f"{name}.nii.gz", predicted)
        write_volume(labels / f"{name}.nii.gz", reference)
    return predictions, labels


def run(folders: tuple[Path, Path], *flags: str) -> int:
    return main(["--predictions", str(folders[0]), "--labels", str(folders[1]), *flags])


def test_results_are_a_table_a_csv_and_a_json(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folders, "--output", str(tmp_path / "out")) == 0
    table = capsys.readouterr().out
    assert " 0.500±0.500   0.444±0.509 " in table
    assert "a 1.000" in table
    assert "b 0.500" in table
    assert "c 0.000" in table
    with open(tmp_path / "out" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["outcome"]) for row in rows] == [("a", "found"), ("b", "found"), ("c", "missed")]
    assert float(rows[1]["hd95_pooled_mm"]) == 2 * float(rows[1]["hd95_pooled_vox"]) == 4
    content = json.loads((tmp_path / "out" / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert content["mean_dice"] == pytest.approx(0.5)
    assert content["summary"]["1"]["n_missed"] == 1
    assert content["rows"][2]["hd95_pooled_vox"] == "inf"
    assert "medpy" in content["definitions"]


def test_files_go_beside_the_predictions_by_default(folders: tuple[Path, Path]) -> None:
    assert run(folders) == 0
    assert (folders[0] / "metrics.json").exists()


def test_ignored_voxels_do_not_count(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    reference = cube(3)
    reference[7:] = 255
    write_volume(folders[1] / "b.nii.gz", reference)
    write_volume(folders[0] / "b.nii.gz", cube(3) | cube(6))
    assert run(folders, "--ignore-label", "255") == 0
    assert "b 1.000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(
            lambda p, r: write_volume(p / "b.nii.gz", np.zeros((3, 3, 3), np.uint8)),
            r"b.nii.gz is not on the grid of its reference .*b.nii.gz: .* has shape",
            id="another shape",
        ),
        pytest.param(
            lambda p, r: write_volume(p / "b.nii.gz", cube(3), np.eye(4)),
            r"b.nii.gz is not on the grid of its reference .*b.nii.gz: .* affines differ",
            id="another affine",
        ),
        pytest.param(lambda p, r: (p / "b.nii.gz").write_bytes(b"x"), "b.nii.gz cannot be read", id="no NIfTI"),
        pytest.param(
            lambda p, r: write_volume(r / "b.nii.gz", cube(3).astype(np.float32) / 2),
            "b.nii.gz: a label map must hold whole numbers",
            id="a reference of fractions",
        ),
    ],
)
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_bad_case_is_listed_after_the_metrics_of_the_others(
    folders: tuple[Path, Path],
    spoil: Callable[[Path, Path], object],
    message: str,
    jobs: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(*folders)
    assert run(folders, "--jobs", str(jobs)) == 2
    printed, error = capsys.readouterr()
    assert "Dice by case: c 0.000, a 1.000" in printed
    _, error = error.split("error: ")  # after the progress
    assert error.startswith("1 of 3 cases could not be evaluated:\n- ")
    assert re.search(message, error)
    assert error.count("\n") == 2
    content = json.loads((folders[0] / "metrics.json").read_text())
    assert [row["case"] for row in content["rows"]] == ["a", "c"]
    assert list(content["failed"]) == ["b"]
    assert content["mean_dice"] == 0.5


def test_if_every_case_is_bad_no_metrics_are_written(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for path in folders[0].iterdir():
        path.write_bytes(b"x")
    assert run(folders) == 2
    assert "error: 3 of 3 cases could not be evaluated:\n- " in capsys.readouterr().err
    assert not (folders[0] / "metrics.csv").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(
            lambda p, r: [(p / f"{name}.nii.gz").unlink() for name in "bc"],
            "has no segmentation of b, c; every reference needs one. Add --partial to leave them out",
            id="no segmentation of some cases",
        ),
        pytest.param(
            lambda p, r: [f.unlink() for f in p.iterdir()],
            "has no segmentation of a, b, c; every reference needs one. Are these the right folders?",
            id="no segmentation",
        ),
        pytest.param(lambda p, r: [f.unlink() for f in r.iterdir()], "holds no label map", id="no reference"),
        pytest.param(lambda p, r: p.rename(p.with_name("x")), "predictions is not a folder", id="no folder"),
    ],
)
def test_before_anything_is_read_what_is_missing_is_named(
    folders: tuple[Path, Path], spoil: Callable[[Path, Path], object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(*folders)
    assert run(folders) == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1
    assert message in error
    assert not (folders[0] / "metrics.csv").exists()


def test_without_a_reference_nothing_is_compared(folders: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match="there is no reference label map to compare with"):
        evaluate_folder(folders[0], {})


def test_partial_leaves_out_references_without_a_segmentation_and_says_so(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (folders[0] / "b.nii.gz").unlink()
    assert run(folders, "--partial") == 0
    printed = capsys.readouterr().out
    assert "Dice by case: c 0.000, a 1.000\n" in printed
    assert "left out, for there is no segmentation: b\n" in printed
    content = json.loads((folders[0] / "metrics.json").read_text())
    assert content["missing"] == ["b"]
    assert content["mean_dice"] == 0.5


def test_jobs_must_be_at_least_1(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folders, "--jobs", "0") == 2
    assert "--jobs 0: it must be 1 to 256" in capsys.readouterr().err


@pytest.mark.parametrize("beside", [True, False], ids=["beside the folder", "in the folder"])
def test_classes_have_the_names_of_dataset_json(
    folders: tuple[Path, Path], beside: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    description = {"labels": {"0": "background", "1": "atrium", "2": "ventricle"}}
    (folders[1].parent if beside else folders[1]).joinpath("dataset.json").write_text(json.dumps(description))
    assert run(folders) == 0
    assert re.search("^atrium .*^ventricle ", capsys.readouterr().out, re.MULTILINE | re.DOTALL)
    content = json.loads((folders[0] / "metrics.json").read_text())
    assert content["classes"] == description["labels"]
    assert content["summary"]["2"]["n_absent"] == 3


def test_classes_have_the_names_of_a_checkpoint(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = NetworkOptions(width=2, depth=2)
    classes = {0: "background", 1: "atrium"}
    model = Model(options, Preprocessing(), classes, (8, 8, 8), *build_networks(options, 2))
    (tmp_path / "run").mkdir()
    save_checkpoint(tmp_path / "run" / LAST, {"model": model.state(), "step": 1})
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "other"}}))
    for checkpoint in (tmp_path / "run", tmp_path / "run" / LAST):
        assert run(folders, "--checkpoint", str(checkpoint)) == 0
        assert capsys.readouterr().out.splitlines()[1].startswith("atrium ")
        assert load_model(str(checkpoint)).classes == load_model(checkpoint).classes == classes


def test_classes_that_the_networks_did_not_learn_are_left_out_of_the_references(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "abc":
        reference = folders[1] / f"{name}.nii.gz"
        label = read_label(reference).array
        label[0, 0, 0] = 7
        write_volume(reference, label)
    (folders[1] / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "atrium"}}))
    assert run(folders) == 2
    assert "such as --classes name_7=7" in capsys.readouterr().err
    for entry in ("atrium", "atrium=1"):
        assert run(folders, "--classes", entry) == 0
        assert capsys.readouterr().out.splitlines()[1].startswith("atrium ")
    assert run(folders, "--classes", "atrium=1+7") == 0
    write_volume(folders[0] / "a.nii.gz", np.where(read_label(folders[0] / "a.nii.gz").array, 7, 0).astype(np.uint8))
    capsys.readouterr()
    assert run(folders, "--classes", "atrium=7+1") == 0  # merged in the segmentations too
    assert "class" in capsys.readouterr().out
    assert run(folders, "--classes", "atrium", "--checkpoint", "run") == 2
    assert "give one of them" in capsys.readouterr().err
    (folders[1] / "b.nii.gz").write_bytes(b"none")
    assert run(folders, "--classes", "atrium") == 2
    captured = capsys.readouterr()
    assert captured.out.splitlines()[1].startswith("atrium ")
    assert "1 of 3 cases could not be evaluated" in captured.err


def test_rows_are_those_of_the_metrics_whatever_classes_the_other_cases_have(folders: tuple[Path, Path]) -> None:
    write_volume(folders[0] / "c.nii.gz", cube(2) | cube(5, 2))
    write_volume(folders[1] / "a.nii.gz", cube(3) | cube(5, 3))
    evaluations = [evaluate_folder(folders[0], volume_files(folders[1]), jobs=jobs) for jobs in (1, 3)]
    expected = []
    for case, path in volume_files(folders[1]).items():
        predicted, reference = read_label(folders[0] / path.name), read_label(path)
        for row in case_metrics(predicted.array, reference.array, 4, (2.0, 2.0, 2.0)):
            expected.append({"case": case, "spacing_mm": "2 2 2", **row})
    assert len(expected) == 9
    for evaluation in evaluations:
        assert repr(evaluation.rows) == repr(expected)  # to the last bit, nan and the order of columns included
        assert evaluation.classes == {0: "background", 1: "class 1", 2: "class 2", 3: "class 3"}


def test_one_case_is_held_at_a_time(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    held: weakref.WeakSet[Volume] = weakref.WeakSet()
    most = 0

    def counted(path: Path, **options: object) -> Volume:
        nonlocal most
        volume = read_label(path, **options)
        held.add(volume)
        most = max(most, len(held))
        return volume

    monkeypatch.setattr(Volume, "__hash__", object.__hash__)
    monkeypatch.setattr(Volume, "__eq__", object.__eq__)
    monkeypatch.setattr("sslfast.evaluation.read_label", counted)
    assert run(folders) == 0
    assert most == 2


class Deadly:
    """A path that ends the process that receives it."""

    def __reduce__(self) -> tuple[object, ...]:
        return os._exit, (1,)


def test_a_case_whose_process_dies_is_named_and_the_others_are_evaluated(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {**volume_files(folders[0]), "b": Deadly()}
    monkeypatch.setattr("sslfast.evaluation.volume_files", lambda folder: files)
    evaluation = evaluate_folder(folders[0], volume_files(folders[1]), jobs=2)
    assert evaluation.case_dice() == {"a": 1.0, "c": 0.0}
    assert list(evaluation.failed) == ["b"]
    assert evaluation.failed["b"].endswith(
        "b.nii.gz: the process that evaluated it died, often for want of memory; try fewer --jobs"
    )


def test_references_that_are_not_read_are_named(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    (folders[1] / "d.img").write_text("")
    assert run(folders) == 2
    assert f"d.img in {folders[1]}: only *.nii.gz, *.nii, " in capsys.readouterr().err


PARENT = """
import os, signal, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from sslfast.evaluation import _leave_the_end_to_the_parent

if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, get_context("spawn"), _leave_the_end_to_the_parent)
    print(pool.submit(os.getpid).result(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_worker_ends_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    ended = subprocess.run([sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE, text=True, timeout=60)
    assert ended.returncode == -signal.SIGKILL
    assert int(ended.stdout)  # which a worker that still ran would hold open, until the timeout


def test_an_output_folder_that_cannot_be_made_is_named(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert run(folders, "--output", str(tmp_path / "file")) == 2
    assert "cannot make the folder" in capsys.readouterr().err
