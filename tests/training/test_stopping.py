"""Ctrl-C and SIGTERM: the step is finished, the checkpoint written, and the message says how to go on."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.options import ROOT
from helpers.processes import wait_until
from helpers.training import SMALL, assert_same_bits, log_rows, train, weights
from helpers.volumes import write_cases
from sslfast.methods.ssl_contrastive import SSLContrastive
from sslfast.ops.reduce import Reducer
from sslfast.train import main
from sslfast.training import trainer
from sslfast.training.checkpoint import load_checkpoint
from sslfast.training.stopping import Stopping

FLAGS = ["--steps", 6, "--labeled", 2]
COMPUTE = SSLContrastive.step


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_cases(tmp_path / "data", cases=4, labelled=2)


def send_in_step(monkeypatch: pytest.MonkeyPatch, step: int, *signals: signal.Signals) -> None:
    """Sends this process signals in a step of every run."""

    def compute(method: SSLContrastive, *arguments: Any) -> Any:
        if arguments[-1] == step:
            for number in signals:
                os.kill(os.getpid(), number)
        return COMPUTE(method, *arguments)

    monkeypatch.setattr(SSLContrastive, "step", compute)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_after_its_step_and_the_printed_command_goes_on_to_the_same_bits(
    data: Path,
    tmp_path: Path,
    number: signal.Signals,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output, before = tmp_path / "run", signal.getsignal(number)
    send_in_step(monkeypatch, 2, number)
    assert train(data, output, *FLAGS) == status
    assert signal.getsignal(number) == before
    assert load_checkpoint(output / "checkpoint_last.pt")["step"] == 3
    *_, said, command = capsys.readouterr().err.splitlines()
    assert said == f"{output}: stopped after step 3 of 6, and saved"
    prefix, command = command.split(": ")
    assert prefix == "Go on with"

    monkeypatch.undo()
    python, dash_m, module, *arguments = shlex.split(command)
    assert (python, dash_m, module) == ("python", "-m", "sslfast.train")
    assert main(arguments) == 0
    assert train(data, tmp_path / "whole", *FLAGS) == 0
    assert_same_bits(weights(output), weights(tmp_path / "whole"))
    assert log_rows(output) == log_rows(tmp_path / "whole")


def test_ctrl_c_before_the_run_began_has_no_command_to_go_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sslfast.training.run.open_dataset", interrupt)
    assert train(data, tmp_path / "run", *FLAGS) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_second_ctrl_c_stops_at_once(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    send_in_step(monkeypatch, 2, signal.SIGINT, signal.SIGINT)
    assert train(data, tmp_path / "run", *FLAGS) == 130
    assert not (tmp_path / "run" / "checkpoint_last.pt").exists()


def test_a_second_sigterm_changes_nothing(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    send_in_step(monkeypatch, 2, signal.SIGTERM, signal.SIGTERM)
    assert train(data, tmp_path / "run", *FLAGS) == 143
    assert load_checkpoint(tmp_path / "run" / "checkpoint_last.pt")["step"] == 3


def test_a_stopped_baseline_goes_on_with_its_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    save = trainer.save_checkpoint

    def save_and_stop(path: Path, content: dict[str, Any]) -> None:
        save(path, content)
        if path.parent.name == "supervised":
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(trainer, "save_checkpoint", save_and_stop)
    assert train(data, output, *FLAGS, "--baseline", "--save-every", 2) == 143
    said = capsys.readouterr().err
    assert f"{output / 'supervised'}: stopped after step 3 of 6" in said
    assert f"--config {output / 'config.yaml'} --output {output} --resume" in said


def test_ctrl_c_at_the_terminal_reaches_the_workers_too_and_the_checkpoint_is_written(
    data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    flags = ["--data", str(data), "--output", str(output), *SMALL, "--steps", "5000", "--workers", "2"]
    command = [sys.executable, "-m", "sslfast.train", *flags]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        log = output / "log.csv"
        wait_until(lambda: (log.exists() and log.read_text().count("\n") > 2) or process.poll() is not None, 120)
        os.killpg(process.pid, signal.SIGINT)
        error = process.communicate(timeout=120)[1]
    assert process.returncode == 130, error
    assert "Traceback" not in error
    done = load_checkpoint(output / "checkpoint_last.pt")["step"]
    assert f"stopped after step {done} of 5000, and saved\nGo on with: python -m sslfast.train --config" in error


@pytest.mark.parametrize(("minutes", "expected"), [("1e-9", [1, 2, 3, 4, 5, 6]), ("10", [4, 6])])
def test_checkpoints_are_written_by_time_as_well(
    data: Path, tmp_path: Path, minutes: str, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    monkeypatch.setattr(trainer, "save_checkpoint", lambda path, content: steps.append(content["step"]))
    assert train(data, tmp_path / "run", *FLAGS, "--save-every", 4, "--save-minutes", minutes) == 0
    assert steps == expected


def test_a_signal_during_the_agreement_is_not_lost() -> None:
    class Two(Reducer):
        """Two processes, of which this one receives a signal once it has said that it has none."""

        size, rank = 2, 1

        def gather(self, values: torch.Tensor) -> torch.Tensor:
            both = torch.stack((values, torch.zeros_like(values)))
            if not values:
                os.kill(os.getpid(), signal.SIGTERM)
            return both

    with Stopping(Two()) as stopping:
        assert not stopping.agreed()
        assert stopping.agreed() == stopping.received == signal.SIGTERM
