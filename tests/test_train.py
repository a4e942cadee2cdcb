"""The training command: its flags, and what it refuses before a run begins."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.training import SMALL, train
from helpers.volumes import write_cases, write_volume
from sslfast.methods import METHODS, find_method
from sslfast.methods.ssl_contrastive import SSLContrastive
from sslfast.train import main
from sslfast.training.config import TrainConfig


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_cases(tmp_path / "data", cases=6, labelled=4)


@pytest.fixture
def configs(monkeypatch: pytest.MonkeyPatch) -> list[TrainConfig]:
    """The settings of the runs that the command starts; none of them runs."""
    started: list[TrainConfig] = []
    monkeypatch.setattr("sslfast.training.run.run", lambda config, plan: started.append(config) or {})
    return started


def test_names_of_other_code_bases_are_understood(configs: list[TrainConfig], tmp_path: Path) -> None:
    flags = ["--max_iterations", "2", "--labeled_num", "2", "--labeled_bs", "1", "--base_lr", "0.01"]
    assert main(["--root_path", str(tmp_path), "--output", str(tmp_path / "run"), *SMALL, *flags]) == 0
    (config,) = configs
    assert config.data == str(tmp_path)
    assert (config.steps, config.labeled, config.labeled_batch, config.learning_rate) == (2, 2, 1, 0.01)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_chosen_by_its_name_and_has_its_own_options(
    configs: list[TrainConfig], tmp_path: Path, method: str
) -> None:
    assert train(tmp_path, tmp_path / "run", "--method", method) == 0
    (config,) = configs
    assert config.method == method
    assert config.options == find_method(method).Options()


def test_options_of_a_method_are_flags(configs: list[TrainConfig], tmp_path: Path) -> None:
    assert train(tmp_path, tmp_path / "run", "--preset", "paper", "--percentile", 70, 90) == 0
    (config,) = configs
    assert isinstance(config.options, SSLContrastive.Options)
    assert config.options.preset == "paper"
    assert config.options.percentile == (70, 90)


def test_an_option_out_of_range_is_refused_before_the_run_begins(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(data, tmp_path / "run", "--gate", 0.7, 0.3) == 2
    assert "the first number of gate is 0.7" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--patch", "8", "9", "8"], "such as --patch 8 8 8"),
        (["--depth", "4", "--patch", "8", "8", "8", "--norm", "instance"], "one voxel that is left"),
        (["--labeled", "9"], "choose 1 to 4"),
        (["--labeled", "0"], "--labeled 0: it must be 1 to 1,000,000,000"),
        (["--steps", "0"], "--steps 0: it must be 1 to 1,000,000,000"),
        (["--compile", "--checkpointing"], "remove one of them"),
        (["--spacing", "-1"], "--spacing -1.0 -1.0 -1.0: it must be 0.0001 to 1,000"),
        (["--pooling", "22"], "--pooling 22: with --depth 2 it must be 1 words of three digits 1 or 2"),
        (["--patch", "4096", "4096", "4096"], "--patch 4096 4096 4096: it has 6.9e+10 voxels; networks take"),
        (["--spacing", "nan"], "--spacing nan nan nan: it must be a finite number"),
        (["--foreground", "3"], "--foreground 3.0: it must be 0 to 1"),
        (["--window", "5", "1"], "--window 5.0 1.0: it must be rising numbers"),
        (["--width", "0"], "--width 0: it must be 1 to 256"),
        (["--dropout", "2"], "--dropout 2.0: it must be at least 0 and below 1"),
        (["--depth", "9"], "--depth 9: it must be 2 to 6"),
        (["--seed", "-1"], "--seed -1: it must be 0 to"),
        (["--learning-rate", "inf"], "--learning-rate inf: it must be a finite number"),
        (["--learning-rate", "0"], "--learning-rate 0.0: it must be above 0"),
        (["--weight-decay", "-1"], "--weight-decay -1.0: it must be 0 to 100"),
        (["--save-minutes", "0"], "--save-minutes 0.0: it must be above 0"),
        (["--validation", "-1"], "--validation -1: it must be 0 to 1,000,000,000"),
        (["--norm", "batch", "--depth", "4", "--patch", "8", "8", "8"], "one voxel that is left"),
        (["--percentile", "120", "20"], "--percentile 120.0 20.0: it must be 0 to 100"),
        (["--temperature", "0"], "--temperature 0.0: it must be 1e-06 to 1,000,000.0"),
        (["--contrast-weight", "nan"], "--contrast-weight nan: it must be a finite number"),
        (["--method", "mcf", "--ramp", "1.5"], "--ramp 1.5: it must be 0 to 1"),
        (["--method", "u2pl", "--memory", "-1"], "--memory -1: it must be 0 to 1,000,000"),
        (["--device", "cuda"], "--device cuda"),
        (["--streams"], "--streams is for one process with a GPU"),
        (["--method", "magic"], "--method magic: choose one of supervised, ssl-contrastive"),
        (["--method", "nowhere:Magic"], "No module named 'nowhere'"),
        (["--method", "pathlib:Path"], "Path must be a subclass of sslfast.methods.Method"),
        (["--validation", "4"], "--validation 4"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_with_its_flag(
    data: Path, tmp_path: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert train(data, tmp_path / "run", "--steps", 2, *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", [["--stepz", "3"], ["--norm", "magic"], ["--steps", "many"], ["--spacing", "1", "2"]])
def test_an_unknown_flag_or_value_is_shown(
    data: Path, tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        train(data, tmp_path / "run", *flags)
    assert exit_.value.code == 2
    shown = "".join(capsys.readouterr())
    assert flags[0] in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(
            lambda d: (d / "images/case_0.nii.gz").write_bytes(b"junk"),
            "case_0.nii.gz cannot be read",
            id="an image that is no NIfTI",
        ),
        pytest.param(
            lambda d: write_volume(d / "images/case_5.nii.gz", np.zeros((9, 9, 9, 3), np.float32)),
            "case_5.nii.gz has 3 channels, and the dataset 1; complete or remove the case",
            id="four dimensions",
        ),
        pytest.param(
            lambda d: write_volume(d / "images/case_5.nii.gz", np.full((9, 9, 9), np.nan, np.float32)),
            "NaN",
            id="NaN in an image",
        ),
        pytest.param(
            lambda d: write_volume(d / "labels/case_1.nii.gz", np.zeros((9, 9, 9), np.uint8)),
            "Resample the second onto the first",
            id="a label of another shape",
        ),
        pytest.param(
            lambda d: write_volume(d / "labels/case_1.nii.gz", np.zeros((20, 18, 16), np.uint8), np.eye(4)),
            "affines differ",
            id="a label of another affine",
        ),
        pytest.param(lambda d: shutil.rmtree(d / "labels"), "no training case has a label", id="no label"),
        pytest.param(
            lambda d: [f.unlink() for f in (*d.glob("images/*"), *d.glob("labels/*"))],
            "the list is empty",
            id="no image",
        ),
    ],
)
def test_data_that_cannot_be_trained_on_is_refused(
    data: Path, tmp_path: Path, spoil: Callable[[Path], object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(data)
    assert train(data, tmp_path / "run", "--steps", 2) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "run" / "checkpoint_last.pt").exists()


def test_labels_out_of_range_are_named_with_their_file(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "dataset.json").write_text('{"labels": {"0": "background", "1": "box"}}')
    label = np.zeros((20, 18, 16), np.uint8)
    label[0, 0, 0] = 2
    write_volume(data / "labels" / "case_1.nii.gz", label)
    assert train(data, tmp_path / "run", "--steps", 2) == 2
    assert "case_1.nii.gz: labels 2 are not among the classes 0, 1" in capsys.readouterr().err


def test_an_output_folder_that_cannot_be_made_is_named(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert train(data, tmp_path / "file" / "run", "--steps", 2) == 2
    assert "cannot make the folder" in capsys.readouterr().err


def test_several_processes_cannot_time_their_steps(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["--data", str(data), "--output", str(tmp_path / "run"), "--hours", "1"]) == 2
    assert "--hours with several processes: each would time its own steps; give --steps" in capsys.readouterr().err


def test_a_side_without_its_counterpart_is_said_where_it_would_be_mirrored(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "dataset.json").write_text('{"labels": {"0": "background", "1": "left lung"}}')
    assert train(data, tmp_path / "run", "--steps", 1, "--augment", "all") == 0
    assert (
        "warning: nothing is mirrored from left to right, for a class has a side and no counterpart\n"
        in capsys.readouterr().err
    )
