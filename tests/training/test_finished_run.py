"""What is done with a run after its last step: its best checkpoint, its report, its log and the record of its cases."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from helpers.training import log_rows, train
from helpers.volumes import write_cases
from sslfast import UserError
from sslfast.options import BEST
from sslfast.report import main as report
from sslfast.report_page import PAGE
from sslfast.training.checkpoint import load_checkpoint
from sslfast.training.trainer import Trainer
from sslfast.training.training_log import TrainingLog

FLAGS = ["--steps", 2, "--labeled", 1, "--validate-every", 1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, and data/, whose validation is best after the first of two steps."""
    folder, dice = tmp_path_factory.mktemp("finished"), iter((0.9, 0.1))
    data = write_cases(folder / "data", cases=4, labelled=3)
    parts = {"training": ["case_0", "case_3"], "validation": ["case_1"], "test": ["case_2"]}
    (data / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "box"}, **parts}))
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(Trainer, "_validate", lambda trainer: next(dice))
        assert train(data, folder / "run", *FLAGS) == 0
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def resume(folder: Path) -> int:
    return train(folder / "data", folder / "run", *FLAGS, "--resume")


def test_a_best_checkpoint_of_an_earlier_step_is_tested_by_itself(finished: Path) -> None:
    assert load_checkpoint(finished / "run" / BEST)["step"] == 1
    tested = [json.loads((finished / "run" / folder / "metrics.json").read_text()) for folder in ("test", "test_best")]
    assert [one["rows"][0]["case"] for one in tested] == ["case_2", "case_2"]
    (last, _), (best, _) = ([*(finished / "run" / folder).glob("*.csv")] for folder in ("test", "test_best"))
    assert last.read_bytes() != best.read_bytes()


def test_its_report_can_be_made_again(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = copy / "run" / PAGE
    page.unlink()
    assert report([str(copy / "run")]) == 0
    assert capsys.readouterr().out == f"{page}\n"
    assert "case_2" in page.read_text()
    (copy / "run" / "test" / "metrics.json").write_text("{}")
    assert report([str(copy / "run")]) == 2
    assert "metrics.json cannot be read: 'rows'. Evaluate the segmentations anew." in capsys.readouterr().err


def test_a_run_of_a_version_that_recorded_no_cases_is_resumed(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "run" / "cases.json").unlink()
    config = copy / "run" / "config.yaml"
    lines = [f"data: {copy / 'data'}" if line.startswith("data:") else line for line in config.read_text().splitlines()]
    config.write_text("\n".join(lines))
    assert resume(copy) == 0
    assert "finished after step 2 of 2" in capsys.readouterr().out


def test_an_unlabelled_volume_that_is_gone_is_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy / "data" / "images" / "case_3.nii.gz"
    path.unlink()
    path.symlink_to(copy / "gone.nii.gz")
    assert resume(copy) == 2
    assert f"{path} cannot be read: No such file or directory. Correct or remove it." in capsys.readouterr().err


def test_a_lost_log_begins_anew_and_one_that_cannot_be_read_is_named(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = copy / "run" / "log.csv"
    log.unlink()
    assert resume(copy) == 0
    assert f"warning: {log} is missing; it begins anew." in capsys.readouterr().err
    assert log_rows(copy / "run") == []
    log.write_text("step,loss\n0," + "1" * 200_000 + "\n")
    assert resume(copy) == 2
    assert f"{log} cannot be read: field larger than" in capsys.readouterr().err


def test_a_log_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with TrainingLog(tmp_path, 0) as log:
        log.write(0, {"loss": 1.0})
        log.path.unlink()
        log.path.mkdir()
        with pytest.raises(UserError, match=r"cannot write .*log\.csv: Is a directory. Free some space"):
            log.write(1, {"loss": 1.0})
