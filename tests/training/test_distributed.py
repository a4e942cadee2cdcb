"""Training in several processes: too many, and one that dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

from helpers.options import ROOT
from helpers.processes import run_python, wait_until
from helpers.volumes import write_cases


def arguments(data: Path, output: Path, restarts: int = 0, steps: int = 30) -> list[str]:
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        f"--max-restarts={restarts}",
        *(
            "-m",
            "sslfast.train",
            "--data",
            str(data),
            "--output",
            str(output),
            "--device",
            "cpu",
            "--precision",
            "fp32",
        ),
        *("--steps", str(steps), "--save-every", "3", "--log-every", "3", "--patch", "8", "8", "8", "--width", "4"),
        *("--depth", "2", "--labeled-batch", "1", "--unlabeled-batch", "1"),
    ]


def test_more_processes_than_volumes_are_refused(tmp_path: Path) -> None:
    write_cases(tmp_path / "data", cases=1, labelled=1)
    result = subprocess.run(
        arguments(tmp_path / "data", tmp_path / "run"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert "error: 2 processes train on 1 volumes; start no more than 1" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_rank_that_dies_is_restarted_and_changes_nothing(tmp_path: Path) -> None:
    write_cases(tmp_path / "data", cases=7, labelled=3)
    run_python(*arguments(tmp_path / "data", tmp_path / "whole")[1:], OMP_NUM_THREADS="1")
    process = subprocess.Popen(
        arguments(tmp_path / "data", tmp_path / "killed", restarts=2),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    checkpoint = tmp_path / "killed" / "checkpoint_last.pt"
    wait_until(lambda: checkpoint.exists() or process.poll() is not None, 300)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout
    os.kill(int(workers.split()[-1]), signal.SIGKILL)
    report, _ = process.communicate(timeout=300)
    assert process.returncode == 0, report[-3000:]
    assert "(exitcode: -9)" in report, report  # it was killed in mid-run
    first, second = (
        torch.load(tmp_path / name / "checkpoint_last.pt", weights_only=True) for name in ("whole", "killed")
    )
    assert first["step"] == second["step"] == 30
    for network in ("network_a", "network_b"):
        for name, value in first["model"][network].items():
            assert torch.equal(value, second["model"][network][name]), name


def test_a_signal_to_one_rank_stops_all_after_the_same_step(tmp_path: Path) -> None:
    write_cases(tmp_path / "data", cases=7, labelled=3)
    output = tmp_path / "run"
    process = subprocess.Popen(
        [*arguments(tmp_path / "data", output, steps=5000), "--save-every", "5000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    log = output / "log.csv"
    wait_until(lambda: (log.exists() and log.read_text().count("\n") > 2) or process.poll() is not None, 300)
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout
    os.kill(int(ranks.split()[-1]), signal.SIGTERM)
    report, _ = process.communicate(timeout=300)
    done = torch.load(output / "checkpoint_last.pt", weights_only=True)["step"]
    assert report.count(f"{output}: stopped after step {done} of 5000, and saved\nGo on with: ") == 1, report[-3000:]
    assert "exitcode  : 143" in report, report[-3000:]
