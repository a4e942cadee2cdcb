"""A whole run: what it leaves, what repeats it, and what it may read. One run is looked at, one is repeated."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from helpers.training import assert_same_bits, log_rows, train, weights
from helpers.volumes import noise, write_cases, write_volume
from sslfast.atomic_io import MACHINE
from sslfast.errors import too_many_classes
from sslfast.options import LAST
from sslfast.train import main
from sslfast.training import health
from sslfast.training.checkpoint import load_checkpoint, save_checkpoint
from sslfast.training.config import CONFIG

STEPS = 4
FLAGS = ["--steps", STEPS, "--labeled", 2, "--percentile", 70, 90]
UNLABELLED = ("case_2", "case_3", "case_4", "case_4")  # the first two have a label that is not to be used


@dataclass(frozen=True)
class Run:
    """A tested run."""

    data: Path
    output: Path
    printed: str = ""


@pytest.fixture(scope="module")
def tested(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """With a validation case and a test case."""
    folder = tmp_path_factory.mktemp("tested")
    data = write_cases(folder / "data", cases=5, labelled=5)
    parts = {"training": ["case_0", "case_1", "case_2"], "validation": ["case_3"], "test": ["case_4"]}
    (data / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "box"}, **parts}))
    printed = StringIO()
    with redirect_stdout(printed):
        assert train(data, folder / "run", *FLAGS, "--validate-every", 2) == 0
    return Run(data, folder / "run", printed.getvalue())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """On two labelled and four unlabelled cases alone, to be repeated."""
    folder = tmp_path_factory.mktemp("trained")
    data = write_cases(folder / "data", cases=6, labelled=4)
    assert train(data, folder / "run", *FLAGS) == 0
    return Run(data, folder / "run")


@pytest.fixture
def copy(trained: Run, tmp_path: Path) -> Run:
    """The same, to be changed."""
    shutil.copytree(trained.data, tmp_path / "data")
    shutil.copytree(trained.output, tmp_path / "run")
    return Run(tmp_path / "data", tmp_path / "run")


# What it leaves


def test_its_settings_are_written(tested: Run) -> None:
    config = yaml.safe_load((tested.output / "config.yaml").read_text())
    assert config["method"] == "ssl-contrastive"
    assert (config["steps"], config["labeled"], config["percentile"]) == (STEPS, 2, [70.0, 90.0])


def test_every_step_is_logged_and_validations_where_they_were_asked_for(tested: Run) -> None:
    rows = log_rows(tested.output)
    assert [int(row["step"]) for row in rows] == [0, 1, 2, 3]
    assert all(np.isfinite(float(row["loss_a"])) for row in rows)
    assert [bool(row["validation_dice"]) for row in rows] == [False, True, False, True]


def test_the_checkpoints_are_of_the_last_step_and_of_the_best_validation(tested: Run) -> None:
    assert load_checkpoint(tested.output / "checkpoint_last.pt")["step"] == STEPS
    best = load_checkpoint(tested.output / "checkpoint_best.pt")
    dice = {int(row["step"]) + 1: float(row["validation_dice"] or 0) for row in log_rows(tested.output)}
    assert best["best_dice"] == pytest.approx(max(dice.values()))
    assert dice[best["step"]] == pytest.approx(best["best_dice"])


@pytest.mark.parametrize("name", ["curves.png", "overlays.png"])
def test_pictures_are_drawn(tested: Run, name: str) -> None:
    assert (tested.output / name).read_bytes().startswith(b"\x89PNG")


def test_curves_are_written_for_tensorboard(tested: Run) -> None:
    assert list((tested.output / "tensorboard").glob("events*"))


def test_both_checkpoints_are_tested_and_named(tested: Run) -> None:
    assert "last step" in tested.printed
    assert "validation-best" in tested.printed
    for folder in ("test", "test_best"):
        assert json.loads((tested.output / folder / "metrics.json").read_text())["rows"][0]["case"] == "case_4"
        assert (tested.output / folder / "case_4.nii.gz").exists()
    if load_checkpoint(tested.output / "checkpoint_best.pt")["step"] == STEPS:
        tables = [(tested.output / folder / "metrics.csv").read_text() for folder in ("test", "test_best")]
        assert tables[0] == tables[1]


def test_a_bad_reference_of_a_test_case_is_listed_after_the_metrics_of_the_others(
    trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained.data, tmp_path / "data")
    description = {"labels": {"0": "background", "1": "box"}, "test": ["case_2", "case_3"]}
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(description))
    write_volume(tmp_path / "data" / "labels" / "case_2.nii.gz", np.full((20, 18, 16), 0.5, np.float32))
    assert train(tmp_path / "data", tmp_path / "run", "--steps", 1) == 2
    printed, error = capsys.readouterr()
    assert "Dice by case: case_3 0." in printed
    assert "error: 1 of 2 cases could not be evaluated:\n- " in error
    assert "case_2.nii.gz: a label map must hold whole numbers" in error
    content = json.loads((tmp_path / "run" / "test" / "metrics.json").read_text())
    assert ([row["case"] for row in content["rows"]], list(content["failed"])) == (["case_3"], ["case_2"])
    assert (tmp_path / "run" / "overlays.png").exists()


def test_more_than_32_classes_are_refused_before_anything_is_written(
    trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained.data, tmp_path / "data")
    labels = {str(c): f"part {c}" for c in range(33)}
    (tmp_path / "data" / "dataset.json").write_text(json.dumps({"labels": labels}))
    assert train(tmp_path / "data", tmp_path / "run", "--steps", 1) == 2
    assert f"error: --method ssl-contrastive: {too_many_classes(33)}\n" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# What repeats it


def test_its_configuration_with_other_loader_processes_gives_the_same_bits(trained: Run, tmp_path: Path) -> None:
    flags = ["--config", str(trained.output / "config.yaml"), "--output", str(tmp_path / "again"), "--workers", "2"]
    assert main(flags) == 0
    assert_same_bits(weights(trained.output), weights(tmp_path / "again"))


def test_another_seed_gives_other_weights(trained: Run, tmp_path: Path) -> None:
    assert train(trained.data, tmp_path / "other", *FLAGS, "--seed", 4) == 0
    one, other = weights(trained.output), weights(tmp_path / "other")
    first = next(iter(one))
    assert not torch.equal(one[first], other[first])


def test_resuming_a_finished_run_changes_nothing_and_shows_its_result(
    tested: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    before, settings = weights(tested.output), tested.output / "config.yaml"
    settings.write_text(settings.read_text().replace("intensity:\n- zscore", "intensity: zscore"))  # as once written
    assert train(tested.data, tested.output, *FLAGS, "--validate-every", 2, "--resume") == 0
    assert_same_bits(before, weights(tested.output))
    volumes, said, result = capsys.readouterr().out.split("\n", 2)
    assert said == f"{tested.output}: finished after step 4 of 4; nothing is left to train, and the result is"
    assert f"{volumes}\n{result}" == tested.printed


def test_resuming_where_there_is_no_run_is_refused(
    trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(trained.data, tmp_path / "rum", *FLAGS, "--resume") == 2
    assert f"--resume: {tmp_path / 'rum'} holds no run, for it has no config.yaml" in capsys.readouterr().err
    assert not (tmp_path / "rum").exists()


def test_a_baseline_that_was_not_begun_is_begun_when_its_run_is_resumed(copy: Run) -> None:
    assert train(copy.data, copy.output, *FLAGS, "--baseline", "--resume") == 0
    assert load_checkpoint(copy.output / "supervised" / "checkpoint_last.pt")["step"] == STEPS


def test_the_folder_of_the_volumes_may_move(copy: Run, capsys: pytest.CaptureFixture[str]) -> None:
    moved = copy.data.rename(copy.data.with_name("moved"))
    assert train(f"{moved}/", copy.output, *FLAGS, "--resume") == 0
    assert "finished after step 4 of 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(
            lambda data: write_volume(data / "images/case_3.nii.gz", noise(20, 18, 16)),
            "was started with other unlabelled volumes than",
            id="an image",
        ),
        pytest.param(
            lambda data: write_volume(data / "labels/case_1.nii.gz", np.ones((20, 18, 16), np.uint8)),
            "was started with other labelled volumes than",
            id="a label",
        ),
        pytest.param(
            lambda data: (data / "images/case_5.nii.gz").unlink(),
            "case_5 differ. Resume with the same, or start a new run.",
            id="a case is missing",
        ),
    ],
)
def test_other_volumes_are_refused_and_named(
    copy: Run, spoil: Callable[[Path], object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(copy.data)
    assert train(copy.data, copy.output, *FLAGS, "--resume") == 2
    assert message in capsys.readouterr().err


def test_a_damaged_record_of_the_volumes_is_named(copy: Run, capsys: pytest.CaptureFixture[str]) -> None:
    (copy.output / "cases.json").write_text("[" * 100_000)
    assert train(copy.data, copy.output, *FLAGS, "--resume") == 2
    assert f"{copy.output / 'cases.json'} cannot be read" in capsys.readouterr().err


def test_a_run_without_a_record_of_its_volumes_is_resumed_from_the_same_folder_alone(
    copy: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy.output / "config.yaml").write_text((copy.output / "config.yaml").read_text().replace("trained", "elsewhere"))
    (copy.output / "cases.json").unlink()
    assert train(copy.data, copy.output, *FLAGS, "--resume") == 2
    assert "--data (was " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "kept"),
    [
        pytest.param(lambda text: f"{text}9,0.0", 4, id="a row cut short"),
        pytest.param(lambda text: f"{text}x\n", 4, id="a word"),
        pytest.param(lambda text: text.replace("\n1,", "\nx,"), 3, id="a step that is no number"),
        pytest.param(lambda text: text.replace("\n2,", "\n2,\0\udcff"), 3, id="bytes"),
        pytest.param(lambda text: text.replace("\n", ",\n", 1), 0, id="a longer header"),
        pytest.param(lambda text: "", 0, id="empty"),
        pytest.param(lambda text: "\0" * 200, 0, id="zeros, as after a power cut"),
        pytest.param(lambda text: "hello", 0, id="another text"),
        pytest.param(lambda text: text[:30], 0, id="half a header"),
        pytest.param(lambda text: text[:-3], 3, id="half a number"),
    ],
)
def test_a_damaged_log_is_mended_and_kept(
    copy: Run, spoil: Callable[[str], str], kept: int, capsys: pytest.CaptureFixture[str]
) -> None:
    log, rows = copy.output / "log.csv", log_rows(copy.output)
    damaged = spoil(log.read_text())
    log.write_text(damaged, errors="surrogateescape")
    assert train(copy.data, copy.output, *FLAGS, "--resume") == 0
    assert f"warning: {log} was damaged" in capsys.readouterr().err
    mended = log_rows(copy.output)
    assert len(mended) == kept
    assert all(row in rows for row in mended)
    assert (copy.output / "log-damaged.csv").read_text(errors="surrogateescape") == damaged


def test_what_killed_processes_left_behind_is_removed(
    copy: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("SSLFAST_CACHE", str(cache))
    with subprocess.Popen(["true"]) as ended:
        pass
    old = [copy.output / ".part-1-checkpoint_last.pt", cache / "volumes" / f".part-{ended.pid}-{MACHINE}-a.npy"]
    old.append(cache / "volumes" / ".part-1-0123abcd-of-another-machine-two-days-ago.npy")
    kept = [cache / "volumes" / f".part-{os.getpid()}-{MACHINE}-b.npy"]
    kept.append(cache / "volumes" / ".part-1-0123abcd-of-another-machine.npy")
    (cache / "volumes").mkdir(parents=True)
    for path in (*old, *kept):
        path.touch()
    os.utime(old[-1], (0, 0))
    assert train(copy.data, copy.output, *FLAGS, "--resume") == 0
    assert not any(path.exists() for path in old)
    assert all(path.exists() for path in kept)


def test_resuming_with_other_settings_is_refused(trained: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(trained.data, trained.output, *FLAGS, "--steps", 5, "--resume") == 2
    error = capsys.readouterr().err
    assert "--steps (was 4, is 5)" in error
    assert "The learning rate and the weights of the losses depend on --steps." in error
    assert train(trained.data, trained.output, *FLAGS) == 2
    assert "add --resume" in capsys.readouterr().err


def test_resuming_from_a_corrupt_checkpoint_names_it(copy: Run, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy.output / "checkpoint_last.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    flags = ["--config", str(copy.output / "config.yaml"), "--output", str(copy.output), "--resume"]
    assert main(flags) == 2
    assert "checkpoint_last.pt is not a readable checkpoint: it is damaged" in capsys.readouterr().err


# What it may read


def test_the_unlabelled_path_cannot_read_a_label(trained: Run, copy: Run, tmp_path: Path) -> None:
    (copy.data / "labels" / "case_2.nii.gz").write_bytes(b"corrupt")
    write_volume(copy.data / "labels" / "case_3.nii.gz", np.full((3, 3, 3), 99, np.int16))
    assert train(copy.data, tmp_path / "again", *FLAGS) == 0
    assert_same_bits(weights(trained.output), weights(tmp_path / "again"))


def test_unlabelled_volumes_change_what_is_learnt(trained: Run, copy: Run, tmp_path: Path) -> None:
    for name in UNLABELLED:
        write_volume(copy.data / "images" / f"{name}.nii.gz", noise(20, 18, 16))
    assert train(copy.data, tmp_path / "other", *FLAGS) == 0
    one, other = weights(trained.output), weights(tmp_path / "other")
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_partially_annotated_volumes_of_several_classes_train(tmp_path: Path) -> None:
    data = write_cases(tmp_path / "data", cases=3, labelled=2, classes=4)
    label = np.zeros((20, 18, 16), np.uint8)
    label[:4], label[4:6], label[6:] = 1, 3, 255
    write_volume(data / "labels" / "case_0.nii.gz", label)
    assert train(data, tmp_path / "run", "--steps", 3, "--ignore-label", 255) == 0
    assert load_checkpoint(tmp_path / "run" / "checkpoint_last.pt")["model"]["classes"].keys() == {0, 1, 2, 3}


def test_a_class_that_is_not_predicted_is_named_during_the_run_and_after_it(
    trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(health, "WINDOW", 4)
    for limit in ("SEEN", "LEARNED"):
        monkeypatch.setattr(health, limit, 2.0)  # a Dice that no class reaches
    flags = ["--steps", 9, "--labeled", 2, "--save-every", 1]
    assert train(trained.data, tmp_path, *flags) == 0
    first = capsys.readouterr()
    assert first.err.count("warning: neither network predicts class 1") == 1
    assert first.out.count("warning, ssl-contrastive: neither network predicts class 1") == 1
    assert "not predicted: class 1" in first.err
    assert train(trained.data, tmp_path, *flags, "--resume") == 0
    again = capsys.readouterr()
    assert "warning: neither" not in again.err, "nothing was trained"
    assert "warning, ssl-contrastive: neither network" in again.out, "the finding is the run's"


def first_moments(content: dict[str, Any]) -> dict[str, Any]:
    return next(iter(content["optimizer"]["state"].values()))


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda content: first_moments(content).update(exp_avg=torch.zeros(3)), id="another shape"),
        pytest.param(lambda content: first_moments(content)["exp_avg_sq"].fill_(math.nan), id="NaN"),
        pytest.param(lambda content: first_moments(content).update(exp_avg=None), id="None"),
        pytest.param(lambda content: first_moments(content).pop("exp_avg"), id="no moment"),
        pytest.param(lambda content: content["optimizer"].update(state={}), id="no moments"),
        pytest.param(lambda content: content["optimizer"]["param_groups"][0].update(betas=None), id="no betas"),
        pytest.param(lambda content: content["optimizer"]["param_groups"][0].pop("eps"), id="no epsilon"),
        pytest.param(lambda content: content.update(best_dice=math.nan), id="NaN as the best Dice"),
    ],
)
def test_a_checkpoint_that_no_training_wrote_is_not_resumed(
    copy: Run, spoil: Callable[[dict[str, Any]], object], capsys: pytest.CaptureFixture[str]
) -> None:
    content = load_checkpoint(copy.output / LAST)
    spoil(content)
    content.pop("format")
    save_checkpoint(copy.output / LAST, content)
    assert train(copy.data, copy.output, *FLAGS, "--resume") == 2
    assert f"{copy.output / LAST} does not hold what a checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("data", ["null", "1", "[a]", "2020-01-01"])
def test_a_record_of_another_kind_of_data_is_compared(copy: Run, data: str) -> None:
    config = copy.output / CONFIG
    config.write_text(re.sub("(?m)^data: .*", f"data: {data}", config.read_text()))
    assert train(copy.data, copy.output, *FLAGS, "--resume") == 0  # cases.json holds what the volumes are


def test_the_command_to_go_on_can_be_pasted(
    tested: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    folder = tmp_path / "my run"
    shutil.copytree(tested.output, folder)
    monkeypatch.setattr("sslfast.training.run.segment_and_evaluate", interrupt)
    assert train(tested.data, folder, *FLAGS, "--validate-every", 2, "--resume") == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"Go on with: python -m sslfast.train --config '{folder / CONFIG}' --output '{folder}' --resume"
