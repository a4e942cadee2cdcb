"""The prediction command: the scan's own geometry to the bit, and scans that cannot be read."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from helpers.models import OBLIQUE, make_model
from helpers.volumes import noise, write_volume
from sslfast.predict import main
from sslfast.training.checkpoint import save_checkpoint


def run(tmp_path: Path, images: Path, *flags: str) -> int:
    save_checkpoint(tmp_path / "model.pt", {"model": make_model().state()})
    paths = ["--checkpoint", str(tmp_path / "model.pt"), "--images", str(images), "--output", str(tmp_path / "out")]
    return main([*paths, "--device", "cpu", *flags])


@pytest.mark.parametrize("size", [(13, 9, 11), (5, 17, 3)])
def test_oblique_affine_and_odd_shape_come_back_exactly(tmp_path: Path, size: tuple[int, int, int]) -> None:
    array = noise(*size)
    write_volume(tmp_path / "scans" / "scan.nii.gz", array, OBLIQUE)
    assert run(tmp_path, tmp_path / "scans") == 0
    scan, written = (nib.load(tmp_path / folder / "scan.nii.gz") for folder in ("scans", "out"))
    assert written.shape == size
    assert np.array_equal(written.affine, scan.affine)
    for field in ("sform_code", "qform_code", "pixdim", "xyzt_units"):
        assert np.array_equal(written.header[field], scan.header[field]), field
    assert set(np.unique(np.asarray(written.dataobj))) <= {0, 1}


def test_one_bad_scan_does_not_cost_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "c"):
        write_volume(tmp_path / "scans" / f"{name}.nii.gz", noise(9, 9, 9))
    (tmp_path / "scans" / "b.nii.gz").write_bytes(b"broken")
    assert run(tmp_path, tmp_path / "scans") == 2
    error = capsys.readouterr().err
    assert "1 of 3 volumes could not be read" in error
    assert "b.nii.gz" in error
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.nii.gz", "c.nii.gz"]


def test_one_scan_may_be_given_by_its_file(tmp_path: Path) -> None:
    scan = write_volume(tmp_path / "one.nii", noise(9, 9, 9))
    assert run(tmp_path, scan) == 0
    assert (tmp_path / "out" / "one.nii.gz").exists()


@pytest.mark.parametrize("kind", ["empty", "missing", "no-nifti"])
def test_an_input_that_cannot_be_is_named(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "scans").mkdir()
    (tmp_path / "scan.png").write_bytes(b"x")
    path = {"empty": tmp_path / "scans", "missing": tmp_path / "no.nii.gz", "no-nifti": tmp_path / "scan.png"}[kind]
    assert run(tmp_path, path) == 2
    error = capsys.readouterr().err
    assert str(path) in error
    assert "Traceback" not in error


def test_scans_are_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_volume(tmp_path / "out" / "a.nii.gz", np.zeros((9, 9, 9), np.float32))
    assert run(tmp_path, tmp_path / "out") == 2
    assert "would replace them" in capsys.readouterr().err


def test_a_missing_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = write_volume(tmp_path / "a.nii.gz", np.zeros((9, 9, 9), np.float32))
    flags = ["--checkpoint", str(tmp_path), "--images", str(images), "--output", str(tmp_path / "out")]
    assert main(flags) == 2
    assert "there is no checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [("--strides", "0", "1", "1"), ("--overlap", "1"), ("--at-once", "0")])
def test_windows_that_cannot_be_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]
) -> None:
    write_volume(tmp_path / "scans" / "a.nii.gz", np.zeros((9, 9, 9), np.float32))
    assert run(tmp_path, tmp_path / "scans", *flags) == 2
    assert flags[0] in capsys.readouterr().err
