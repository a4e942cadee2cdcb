"""The training loop: every method in it, resuming to the same bits, and runs that fail."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.options import ROOT
from helpers.processes import wait_until
from helpers.training import SMALL, assert_same_bits, log_rows, train, weights
from helpers.volumes import decoded_case, noise, write_cases
from sslfast.data.classes import Classes
from sslfast.data.patches import Batch
from sslfast.data.volumes import DecodedCase
from sslfast.methods import METHODS
from sslfast.options import NetworkOptions
from sslfast.training.checkpoint import load_checkpoint
from sslfast.training.config import TrainConfig
from sslfast.training.trainer import Trainer

EXACT = ("--precision", "fp32", "--optimizer", "sgd")  # AdamW's first step is the gradient's sign, which rounding turns

CLASSES = Classes({0: "background", 1: "x"})


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_cases(tmp_path / "data", cases=6, labelled=4)


def decoded(folder: Path, name: str, labelled: bool) -> DecodedCase:
    image = noise(12, 11, 10)
    return decoded_case(folder, name, image, (image > 1).astype(np.int16) if labelled else None)


class Killed(Exception):
    """Ends a run before a step."""


def run_and_resume(
    config: TrainConfig, cases: list[DecodedCase], validation: list[DecodedCase], killed: int
) -> Trainer:
    """Trains, is killed before this step, and goes on; two of the cases are labelled."""
    parts = CLASSES, cases, 2, validation, torch.device("cpu")
    torch.manual_seed(1)
    trainer = Trainer(config, *parts)
    train_step = trainer._step

    def step(number: int, batch: Batch, log_row: bool) -> dict[str, float] | None:
        if number == killed:
            raise Killed
        return train_step(number, batch, log_row)

    trainer._step = step  # type: ignore[method-assign]
    with pytest.raises(Killed):
        trainer.run()
    resumed = Trainer(replace(config, resume=True), *parts)
    assert resumed.first_step == killed
    resumed.run()
    return resumed


def settings(folder: Path, method: str = "supervised", steps: int = 4) -> TrainConfig:
    """Of a small run that saves and validates after every step."""
    networks = NetworkOptions(width=4, depth=2)
    every = {"log_every": 1, "save_every": 1, "validate_every": 1}
    return TrainConfig("nowhere", folder, method, steps=steps, patch=(8, 8, 8), networks=networks, **every)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_logs_finite_losses_and_is_resumed_to_the_same_bits(method: str, tmp_path: Path) -> None:
    cases = [decoded(tmp_path, f"case_{i}", labelled=i < 2) for i in range(4)]
    torch.manual_seed(1)
    whole = Trainer(settings(tmp_path / "whole", method), CLASSES, cases, 2, [], torch.device("cpu"))
    whole.run()
    rows = log_rows(tmp_path / "whole")
    assert [int(row["step"]) for row in rows] == [0, 1, 2, 3]
    assert all(np.isfinite(float(row["loss_a"])) for row in rows)
    resumed = run_and_resume(settings(tmp_path / "resumed", method), cases, [], killed=2)
    assert_same_bits(weights(tmp_path / "resumed"), weights(tmp_path / "whole"))
    assert_same_bits(resumed.method.state_dict(), whole.method.state_dict())
    assert log_rows(tmp_path / "resumed") == rows


def test_the_learning_rate_falls_as_a_power_and_each_step_draws_its_own_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [decoded(tmp_path, f"case_{i}", labelled=True) for i in range(2)]
    drawn: dict[int, list[float]] = {}
    for run, seed in enumerate((1, 1, 2)):
        folder = tmp_path / str(run)
        config = replace(settings(folder), seed=seed, learning_rate=0.5)
        trainer = Trainer(config, CLASSES, cases, 2, [], torch.device("cpu"))
        method_step, numbers = trainer.method.step, []

        def step(*arguments: Any, method_step: Any = method_step, numbers: list[float] = numbers) -> Any:
            numbers.append(float(torch.rand(())))
            return method_step(*arguments)

        monkeypatch.setattr(trainer.method, "step", step)
        trainer.run()
        assert drawn.setdefault(seed, numbers) == numbers  # again with the same seed
        rates = [float(row["learning_rate"]) for row in log_rows(folder)]
        assert rates == pytest.approx([0.5 * (1 - step / 4) ** 0.9 for step in range(4)], rel=1e-4)
    assert len({*drawn[1], *drawn[2]}) == 8


def test_validation_leaves_out_voxels_that_are_not_annotated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [decoded(tmp_path, f"case_{i}", labelled=True) for i in range(2)]
    image = noise(12, 11, 10)
    label = (image > 1).astype(np.int16)
    label[:3] = -1
    annotated = decoded_case(tmp_path, "annotated", image, label)
    trainer = Trainer(settings(tmp_path), CLASSES, cases, 2, [annotated], torch.device("cpu"))
    predicted = torch.from_numpy(np.asarray(annotated.label) != 0)  # the class wherever nothing is annotated
    predict = lambda *_, **__: torch.stack((~predicted, predicted)).float()
    monkeypatch.setattr("sslfast.training.trainer.predict_probabilities", predict)
    assert trainer._validate() == 1


@pytest.mark.parametrize(("dice", "best"), [((0.3, 0.8, 0.5, 0.7), 2), ((0.3, 0.5, 0.8, 0.7), 3)])
def test_a_run_that_is_resumed_keeps_the_checkpoint_of_the_best_validation(
    dice: tuple[float, ...], best: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [decoded(tmp_path, f"case_{i}", labelled=True) for i in range(3)]
    measured = iter(dice)
    monkeypatch.setattr(Trainer, "_validate", lambda trainer: next(measured))
    run_and_resume(settings(tmp_path), cases[:2], cases[2:], killed=2)
    checkpoint = load_checkpoint(tmp_path / "checkpoint_best.pt")
    assert (checkpoint["step"], checkpoint["best_dice"]) == (best, 0.8)
    assert load_checkpoint(tmp_path / "checkpoint_last.pt")["best_dice"] == 0.8


def test_a_run_that_is_killed_and_resumed_gives_the_same_bits(data: Path, tmp_path: Path) -> None:
    flags = ["--steps", "30", "--labeled", "2", "--save-every", "4", "--validation", "1", "--validate-every", "6"]
    flags += ["--depth", "3", "--precision", "bf16"]
    assert train(data, tmp_path / "whole", *flags) == 0

    output = tmp_path / "killed"
    command = [sys.executable, "-m", "sslfast.train", "--data", str(data), "--output", str(output), *SMALL, *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: (output / "checkpoint_last.pt").exists() or process.poll() is not None, 240)
    assert process.poll() is None, "the run ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    reached = load_checkpoint(output / "checkpoint_last.pt")["step"]
    assert 4 <= reached < 30

    assert train(data, output, *flags, "--resume") == 0
    assert_same_bits(weights(tmp_path / "whole"), weights(output))
    assert log_rows(output) == log_rows(tmp_path / "whole")
    assert not list(output.glob(".part-*"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str]]]:
    """A dataset, and the log of a run on it whose networks are neither compiled nor checkpointed."""
    folder = tmp_path_factory.mktemp("plain")
    data = write_cases(folder / "data", cases=6, labelled=4)
    assert train(data, folder / "run", "--steps", 2, "--dropout", 0, *EXACT) == 0
    return data, log_rows(folder / "run")


@pytest.mark.parametrize("flag", ["--compile", "--checkpointing"])
def test_compiled_and_checkpointed_networks_learn_the_same(
    plain: tuple[Path, list[dict[str, str]]], tmp_path: Path, flag: str
) -> None:
    data, expected = plain
    assert train(data, tmp_path / "run", "--steps", 2, "--dropout", 0, *EXACT, flag) == 0
    for row, other in zip(expected, log_rows(tmp_path / "run"), strict=True):
        for loss in ("loss_a", "loss_b"):
            assert float(other[loss]) == pytest.approx(float(row[loss]), rel=1e-3)


def test_a_nan_loss_names_the_volumes_and_keeps_the_checkpoint(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    assert train(data, output, "--steps", 40, "--learning-rate", "1e30", "--save-every", 1) == 2
    error = capsys.readouterr().err
    assert "the loss is nan at step" in error
    assert "case_" in error
    assert "--learning-rate" in error
    assert load_checkpoint(output / "checkpoint_last.pt")["step"] >= 1


def test_weights_that_the_last_step_made_infinite_are_not_saved(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(data, tmp_path / "run", "--steps", 1, "--learning-rate", "1e300") == 2
    assert "the weights are NaN or infinite after step 1 and are not saved" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoint_last.pt").exists()


def test_a_full_disk_keeps_the_last_checkpoint_from_which_a_run_goes_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    original = Path.write_bytes

    def third_write_fails(path: Path, content: bytes) -> int:
        if path.name.endswith("checkpoint_last.pt"):
            third_write_fails.calls += 1  # type: ignore[attr-defined]
            if third_write_fails.calls == 3:  # type: ignore[attr-defined]
                original(path, bytes(content)[:100])
                raise OSError(28, "No space left on device")
        return original(path, content)

    third_write_fails.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(Path, "write_bytes", third_write_fails)
    assert train(data, output, "--steps", 4, "--save-every", 1) == 2
    error = capsys.readouterr().err
    assert "checkpoint_last.pt: No space left on device" in error
    assert load_checkpoint(output / "checkpoint_last.pt")["step"] == 2
    assert not list(output.glob(".part-*"))
    assert train(data, output, "--steps", 4, "--save-every", 1, "--resume") == 0
    assert train(data, tmp_path / "whole", "--steps", 4, "--save-every", 1) == 0
    assert_same_bits(weights(output), weights(tmp_path / "whole"))
