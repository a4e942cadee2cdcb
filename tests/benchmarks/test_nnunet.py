"""The nnU-Net row of the study, as far as it goes without nnU-Net."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.accuracy import nnunet
from benchmarks.accuracy.runs import Result, Trial, read_rows
from benchmarks.report import RESULTS
from helpers.volumes import write_cases
from sslfast import UserError
from sslfast.data.folder import open_dataset


@pytest.fixture
def real(tmp_path: Path) -> Path:
    """A folder with a cohort of 6 training and 2 test cases. The first training case in the list is not case_0."""
    root = write_cases(tmp_path / "real" / "hippocampus", cases=8, labelled=8)
    training = [f"case_{i}" for i in (5, 3, 0, 1, 2, 4)]
    parts = {"training": training, "test": ["case_6", "case_7"]}
    (root / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "box"}, **parts}))
    return tmp_path / "real"


def test_nnunet_gets_the_labelled_cases_and_no_label_of_a_test_case(real: Path, tmp_path: Path) -> None:
    dataset = open_dataset(real / "hippocampus")
    for labeled, cases in ((3, [5, 3, 0]), (2, [5, 3])):
        folder = nnunet.write_raw(dataset, labeled, tmp_path / "raw")
        images = {f"imagesTr/case_{i}_0000.nii.gz" for i in cases} | {f"imagesTs/case_{i}_0000.nii.gz" for i in (6, 7)}
        labels = {f"labelsTr/case_{i}.nii.gz" for i in cases}
        written = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert written == images | labels | {"dataset.json"}
        description = json.loads((folder / "dataset.json").read_text())
        assert description["numTraining"] == labeled
        assert description["labels"] == {"background": 0, "box": 1}
    source = real / "hippocampus" / "labels" / "case_5.nii.gz"
    assert (folder / "labelsTr" / "case_5.nii.gz").read_bytes() == source.read_bytes()
    with pytest.raises(UserError, match="--labeled 9"):
        nnunet.write_raw(dataset, 9, tmp_path / "raw")


@pytest.mark.parametrize(("minutes", "seconds", "epochs"), [(9, 16.0, 33), (9, 0.25, 2160), (0.1, 16.0, 1)])
def test_the_epochs_fit_the_minutes(minutes: float, seconds: float, epochs: int) -> None:
    assert nnunet.epochs_within(minutes, [100.0, 100 + seconds, 100 + 2 * seconds]) == epochs


def test_a_missing_package_or_cohort_is_named(
    real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--name", str(tmp_path / "page"), "--output", str(tmp_path / "runs"), "--real"]
    monkeypatch.setattr(nnunet, "find_spec", lambda _: None)
    assert nnunet.main([*flags, str(real)]) == 2
    assert "pip install nnunetv2" in capsys.readouterr().err
    monkeypatch.setattr(nnunet, "find_spec", lambda _: "installed")
    assert nnunet.main([*flags, str(tmp_path)]) == 2
    assert "--real DIR" in capsys.readouterr().err
    assert not (tmp_path / "page.md").exists()


def test_a_finished_seed_of_nnunet_is_not_repeated(real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []

    def run(trial: Trial, config: nnunet.NnunetConfig, _dataset: object, images: Path, settings: str) -> Result:
        assert len(list(images.iterdir())) == 2
        ran.append(trial.seed)
        return Result(settings, "yesterday", float("nan"), np.array([0.5, 0.5 + 0.1 * trial.seed]), 60 * config.minutes)

    monkeypatch.setattr(nnunet, "run", run)
    monkeypatch.setattr(nnunet, "prepare", lambda *_: None)
    monkeypatch.setattr(nnunet, "find_spec", lambda _: "installed")
    flags = ["--real", str(real), "--labeled", "2", "--name", str(tmp_path / "page"), "--output", str(tmp_path)]
    for more, seeds in (
        (["--seeds", "1"], [1]),
        (["--seeds", "1", "2"], [2]),
        (["--seeds", "1", "2"], []),
        (["--seeds", "2", "--minutes", "3"], [2]),
    ):
        ran.clear()
        assert nnunet.main([*flags, *more]) == 0
        assert ran == seeds
    assert {trial.seed for trial in read_rows(tmp_path / "page.csv")} == {1, 2}
    page = (tmp_path / "page.md").read_text()
    assert "| 2 | 0.575 [" in page
    assert "| 1: 0.550, 2: 0.600 | 3.0 |" in page
    assert "- 2 labels, seed 1: yesterday" in page


@pytest.mark.skipif(not (RESULTS / "accuracy-nnunet.csv").exists(), reason="nothing is committed")
def test_the_committed_page_of_nnunet_is_that_of_its_runs() -> None:
    page = nnunet.page(read_rows(RESULTS / "accuracy-nnunet.csv"))
    assert (RESULTS / "accuracy-nnunet.md").read_text().splitlines() == page
