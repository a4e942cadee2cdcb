"""Preparing a dataset: what is reported of its cases, and every fault."""

from __future__ import annotations

from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest

from helpers.volumes import noise, write_cases, write_volume
from sslfast.data.public.conversion import READERS
from sslfast.prepare import PrepareConfig, main


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_cases(tmp_path, cases=5, labelled=2)


def test_cases_sizes_and_axes_are_reported(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(data)]) == 0
    report = capsys.readouterr().out
    assert "5 training cases, 2 of them labelled" in report
    assert "20×18×16" in report
    assert "RAS" in report
    assert "Axes differ" not in report


def test_axes_that_differ_are_reported(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_volume(data / "images" / "case_9.nii.gz", noise(4, 5, 6), np.diag([-1.0, 1, 1, 1]))
    assert main(["--data", str(data)]) == 0
    assert "Axes differ (5 RAS, 1 LAS)" in capsys.readouterr().out


def test_every_fault_is_listed_at_once(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "images" / "case_3.nii.gz").write_bytes((data / "images" / "case_2.nii.gz").read_bytes())
    (data / "images" / "case_4.nii.gz").write_bytes(b"broken")
    (data / "labels" / "case_1.nii.gz").write_bytes(b"broken")
    assert main(["--data", str(data)]) == 2
    error = capsys.readouterr().err
    assert "3 faults" in error
    assert "labels/case_1.nii.gz cannot be read" in error
    assert "case_4.nii.gz cannot be read" in error
    assert "case_3.nii.gz is the same volume as case 'case_2'" in error


def test_every_reader_can_be_chosen() -> None:
    choices = get_args(get_args(get_type_hints(PrepareConfig, include_extras=True)["dataset"])[0])
    assert choices == ("folder", *READERS)


def test_without_data_the_flag_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert capsys.readouterr().err == "error: --data is missing; give the folder of the dataset, or demo\n"
