"""What shows that a run is resumed on the volumes that it began with; whole runs are in test_run.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from helpers.training import train
from helpers.volumes import write_cases, write_volume
from sslfast.training.run_folder import _fingerprint


def test_other_voxels_in_a_file_without_compression_are_noticed(tmp_path: Path) -> None:
    array = np.zeros((64, 64, 64), np.uint8)
    array[20:30, 20:30, 20:30] = 1
    path = write_volume(tmp_path / "label.nii", array)
    before = _fingerprint(path)
    assert _fingerprint(path) == before
    write_volume(path, np.roll(array, 3, 0))
    assert _fingerprint(path) != before


def test_segmentations_of_others_are_not_replaced_by_a_new_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_cases(tmp_path / "data", cases=3, labelled=3)
    mine = write_volume(tmp_path / "run" / "test" / "case_2.nii.gz", np.ones((4, 4, 4), np.uint8))
    assert train(data, tmp_path / "run") == 2
    assert f"{mine} is not of a run, and would be replaced; choose another --output" in capsys.readouterr().err
