"""The prediction command: the scan's own geometry to the bit, and scans that cannot be read."""

from __future__ import annotations

import errno
import gzip
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from helpers.models import OBLIQUE, make_model
from helpers.volumes import noise, write_volume
from sslfast import segmentations
from sslfast.data.folder import volumes_in
from sslfast.data.inputs import find_images
from sslfast.data.nifti import Volume
from sslfast.model import Model
from sslfast.predict import main
from sslfast.quality import read_rows
from sslfast.segmenter import Segmentation
from sslfast.training.checkpoint import save_checkpoint


def run(tmp_path: Path, images: Path, *flags: str) -> int:
    if not (tmp_path / "model.pt").exists():
        save_checkpoint(tmp_path / "model.pt", {"model": make_model().state()})
    paths = ["--checkpoint", str(tmp_path / "model.pt"), "--output", str(tmp_path / "out"), "--device", "cpu"]
    return main([*paths, "--images", str(images), *flags])


def written(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "out").iterdir())


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
    assert "1 of 3 volumes could not be segmented" in error
    assert "b.nii.gz" in error
    assert written(tmp_path) == [
        "a.nii.gz",
        "c.nii.gz",
        "quality.csv",
        "report.html",
    ]


def test_a_failure_while_segmenting_does_not_cost_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        write_volume(tmp_path / "scans" / f"{name}.nii.gz", noise(9, 9, 9 + (name == "b")))
    segment = segmentations.segment

    def fail(model: Model, volume: Volume, **settings: Any) -> Segmentation:
        if volume.shape[2] == 10:
            raise RuntimeError("out of memory")
        return segment(model, volume, **settings)

    monkeypatch.setattr(segmentations, "segment", fail)
    assert run(tmp_path, tmp_path / "scans") == 2
    error = capsys.readouterr().err
    assert f"1 of 3 volumes could not be segmented:\n- {tmp_path}/scans/b.nii.gz: RuntimeError: out of memory" in error
    assert written(tmp_path) == [
        "a.nii.gz",
        "c.nii.gz",
        "quality.csv",
        "report.html",
    ]


def test_a_scan_that_may_not_be_read_does_not_cost_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        write_volume(tmp_path / "scans" / f"{name}.nii.gz", noise(9, 9, 9))
    opened = gzip.open

    def refuse(path: Path, *arguments: Any) -> Any:  # for root may read everything
        if Path(path).name == "a.nii.gz":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments)

    monkeypatch.setattr("sslfast.data.nifti.gzip.open", refuse)
    monkeypatch.setattr("sslfast.segmentations.digest_of", lambda path, more: refuse(path).name and "0" * 16)
    assert run(tmp_path, tmp_path / "scans") == 2
    assert f"- {tmp_path}/scans/a.nii.gz cannot be read: Permission denied." in capsys.readouterr().err
    assert written(tmp_path) == ["b.nii.gz", "quality.csv", "report.html"]


def test_an_empty_scan_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_volume(tmp_path / "scans" / "a.nii.gz", np.full((9, 9, 9), 3, np.float32))
    assert run(tmp_path, tmp_path / "scans") == 2
    assert "scans/a.nii.gz is empty: every voxel is 3" in capsys.readouterr().err


def test_scans_that_are_not_read_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_volume(tmp_path / "scans" / "a.nii.gz", noise(9, 9, 9))
    (tmp_path / "scans" / "b.img").write_text("")
    assert run(tmp_path, tmp_path / "scans") == 0
    assert f"warning: b.img in {tmp_path / 'scans'}: no volumes, and not segmented" in capsys.readouterr().err


def test_several_scans_may_be_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scans = [write_volume(tmp_path / folder / "scan.nii.gz", noise(9, 9, 9)) for folder in "ab"]
    other = write_volume(tmp_path / "b" / "other.nii.gz", noise(9, 9, 9))
    assert run(tmp_path, scans[0], str(other)) == 0
    assert written(tmp_path) == [
        "other.nii.gz",
        "quality.csv",
        "report.html",
        "scan.nii.gz",
    ]
    assert run(tmp_path, scans[0], str(scans[1])) == 2
    assert "have the same name" in capsys.readouterr().err


def test_files_of_others_are_replaced_only_on_demand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_volume(tmp_path / "scans" / "a.nii.gz", noise(9, 9, 9))
    write_volume(tmp_path / "scans" / "b.nii.gz", noise(9, 9, 9))
    manual = write_volume(tmp_path / "out" / "b.nii.gz", np.ones((9, 9, 9), np.uint8))
    before = manual.read_bytes()
    assert run(tmp_path, tmp_path / "scans") == 2
    error = capsys.readouterr().err
    assert f"holds 1 file that this prediction would replace, the first {manual}" in error
    assert "--overwrite" in error
    assert manual.read_bytes() == before
    assert not (tmp_path / "out" / "a.nii.gz").exists()
    assert run(tmp_path, tmp_path / "scans", "--overwrite") == 0
    assert manual.read_bytes() != before


def test_a_prediction_that_was_stopped_is_continued(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scans = [write_volume(tmp_path / "scans" / f"{name}.nii.gz", noise(9, 9, 9)) for name in "abc"]
    assert run(tmp_path, tmp_path / "scans") == 0
    (tmp_path / "out" / "b.nii.gz").unlink()
    kept = {name: (tmp_path / "out" / f"{name}.nii.gz").stat().st_mtime_ns for name in "ac"}
    capsys.readouterr()
    assert run(tmp_path, tmp_path / "scans") == 0
    assert "2 of 3 segmentations are in" in capsys.readouterr().out
    assert kept == {name: (tmp_path / "out" / f"{name}.nii.gz").stat().st_mtime_ns for name in "ac"}
    assert (tmp_path / "out" / "b.nii.gz").exists()
    assert run(tmp_path, tmp_path / "scans", "--overlap", "0.25") == 2  # another prediction
    assert "would replace" in capsys.readouterr().err
    write_volume(scans[0], noise(9, 9, 9))  # another scan of the same name
    assert run(tmp_path, tmp_path / "scans") == 2
    assert f"the first {tmp_path}/out/a.nii.gz" in capsys.readouterr().err


def test_one_scan_may_be_given_by_its_file(tmp_path: Path) -> None:
    scan = write_volume(tmp_path / "one.nii", noise(9, 9, 9))
    assert run(tmp_path, scan) == 0
    assert (tmp_path / "out" / "one.nii.gz").exists()


def test_one_channel_named_as_in_nnunet_gives_names_of_cases(tmp_path: Path) -> None:
    for name in "ab":
        write_volume(tmp_path / f"scans/{name}_0000.nii.gz", noise(9, 9, 9))
    assert [*find_images([tmp_path / "scans"])] == ["a", "b"]
    assert [*find_images([tmp_path / "scans/a_0000.nii.gz"])] == ["a"]
    write_volume(tmp_path / "scans/c.nii.gz", noise(9, 9, 9))  # so the names end with no channel
    assert [*find_images([tmp_path / "scans"])] == ["a_0000", "b_0000", "c"]


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
    assert "is a folder of the dataset" in capsys.readouterr().err


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


def test_a_table_of_others_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_volume(tmp_path / "scans" / "a.nii.gz", noise(9, 9, 9))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "quality.csv").write_text("case,rating\na,3\n")
    assert run(tmp_path, tmp_path / "scans") == 2
    assert "would replace, the first" in capsys.readouterr().err
    assert (tmp_path / "out" / "quality.csv").read_text() == "case,rating\na,3\n"


def test_rows_that_another_process_writes_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        write_volume(tmp_path / "scans" / f"{name}.nii.gz", noise(9, 9, 9))
    segment = segmentations.segment

    def slow(model: Model, volume: Volume, **settings: Any) -> Segmentation:
        if not (tmp_path / "out" / "b.nii.gz").exists():
            monkeypatch.setattr(segmentations, "segment", segment)
            assert run(tmp_path, tmp_path / "scans" / "b.nii.gz", "--no-report") == 0
        return segment(model, volume, **settings)

    monkeypatch.setattr(segmentations, "segment", slow)
    assert run(tmp_path, tmp_path / "scans" / "a.nii.gz", "--no-report") == 0
    assert sorted(read_rows(tmp_path / "out")) == ["a", "b"]
    assert written(tmp_path) == ["a.nii.gz", "b.nii.gz", "quality.csv"]


def test_a_full_disk_for_maps_is_named_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_volume(tmp_path / "scans" / "a.nii.gz", noise(9, 9, 9))

    def full(file: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    assert run(tmp_path, tmp_path / "scans", "--disagreement") == 2
    assert "No space left on device" in capsys.readouterr().err


def test_segmentations_and_their_maps_may_be_labels(tmp_path: Path) -> None:
    write_volume(tmp_path / "scans" / "a.nii.gz", noise(9, 9, 9))
    assert run(tmp_path, tmp_path / "scans", "--disagreement", "--uncertainty", "--probabilities", "all") == 0
    assert volumes_in(tmp_path / "out") == {"a": tmp_path / "out" / "a.nii.gz"}
