"""The evaluate command: its table and files, and what it refuses."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from helpers.volumes import write_volume
from sslfast.evaluate import main


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
            lambda p, r: (p / "b.nii.gz").unlink(), "has no segmentation of b", id="no segmentation of a case"
        ),
        pytest.param(
            lambda p, r: write_volume(p / "b.nii.gz", np.zeros((3, 3, 3), np.uint8)), "has shape", id="another shape"
        ),
        pytest.param(
            lambda p, r: write_volume(p / "b.nii.gz", cube(3), np.eye(4)), "affines differ", id="another affine"
        ),
        pytest.param(lambda p, r: (p / "b.nii.gz").write_bytes(b"x"), "b.nii.gz cannot be read", id="no NIfTI"),
        pytest.param(
            lambda p, r: write_volume(r / "b.nii.gz", cube(3).astype(np.float32) / 2),
            "whole numbers",
            id="a label of fractions",
        ),
        pytest.param(lambda p, r: [f.unlink() for f in r.iterdir()], "holds no NIfTI file", id="no label"),
    ],
)
def test_input_that_cannot_be_scored_is_named(
    folders: tuple[Path, Path], spoil: Callable[[Path, Path], object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(*folders)
    assert run(folders) == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1
    assert message in error
    assert not (folders[0] / "metrics.csv").exists()


def test_an_output_folder_that_cannot_be_made_is_named(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert run(folders, "--output", str(tmp_path / "file")) == 2
    assert "cannot make the folder" in capsys.readouterr().err
