"""What shows that a run is resumed on the volumes that it began with; whole runs are in test_run.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from helpers.volumes import write_volume
from sslfast.training.run_folder import _fingerprint


def test_other_voxels_in_a_file_without_compression_are_noticed(tmp_path: Path) -> None:
    array = np.zeros((64, 64, 64), np.uint8)
    array[20:30, 20:30, 20:30] = 1
    path = write_volume(tmp_path / "label.nii", array)
    before = _fingerprint(path)
    assert _fingerprint(path) == before
    write_volume(path, np.roll(array, 3, 0))
    assert _fingerprint(path) != before
