"""Training in several processes: too many, one that fails, one that dies."""

from __future__ import annotations

import csv
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore

from helpers.options import ROOT, SEED
from helpers.processes import run_python, wait_until
from helpers.volumes import write_cases
from sslfast.errors import UserError
from sslfast.training.checkpoint import load_checkpoint
from sslfast.training.distributed import FAILED_ELSEWHERE, processes


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


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    message = "process 2 on a machine with 1 GPUs; use --nproc-per-node=1, or --device cpu"
    with pytest.raises(UserError, match=message), processes(torch.device("cuda")):
        pass


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


def test_an_unreadable_volume_ends_all_ranks_with_one_message(tmp_path: Path) -> None:
    data = write_cases(tmp_path / "data", cases=7, labelled=3)
    broken = data / "images" / "case_6.nii.gz"
    broken.write_bytes(broken.read_bytes()[:-100])
    result = subprocess.run(
        arguments(data, tmp_path / "run"), cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode != 0
    assert result.stderr.count(f"error: {broken} cannot be read") == 1
    assert result.stderr.count(f"error: {FAILED_ELSEWHERE}") <= 1  # torchrun may be quicker to end it
    assert "[rank" not in result.stderr  # a traceback


FAILING = """
import sys, time, torch
from sslfast.errors import UserError, exit_status
from sslfast.training.distributed import processes

def command():
    with processes(torch.device("cpu")) as (reducer, _):
        reducer.sum(torch.ones(1))  # all have met, as in `run`
        print(time.time(), flush=True)
        if str(reducer.rank) in sys.argv[2:]:
            raise UserError(sys.argv[1].format(reducer.rank))
        reducer.sum(torch.ones(1))

sys.exit(exit_status(command))
"""


@pytest.mark.parametrize(
    ("message", "failing"), [("case_{} is wrong", {0}), ("case_{} is wrong", {0, 1}), ("case_0 is wrong", {1, 2})]
)
def test_an_error_of_the_user_ends_all_ranks_within_seconds_and_is_told_once(message: str, failing: set[int]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "3"}
    if len(errors := {message.format(rank) for rank in failing}) < len(failing):
        # the first of those that have the same error tells it, by a store that outlives them, as torchrun's does
        place["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        _store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", FAILING, message, *map(str, failing)],
            cwd=ROOT,
            env={**os.environ, **place, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    started, said = zip(*(rank.communicate(timeout=120) for rank in ranks), strict=True)
    assert time.time() - max(map(float, started)) < 20
    assert [rank.returncode for rank in ranks] == [2, 2, 2], said
    assert not any("Traceback" in text for text in said), said
    # PyTorch may have warned before that the process with the store has ended
    told = sorted(line for text in said for line in text.splitlines() if line.startswith("error: "))
    expected = [*errors, *[FAILED_ELSEWHERE] * (len(ranks) - len(errors))]
    assert told == sorted(f"error: {error}" for error in expected), said


KILLS = int(os.environ.get("SSLFAST_KILLS", "1"))  # more take longer


def test_ranks_that_die_are_restarted_and_change_nothing(tmp_path: Path) -> None:
    write_cases(tmp_path / "data", cases=7, labelled=3)
    steps = 36 + 200 * (KILLS - 1)
    run_python(*arguments(tmp_path / "data", tmp_path / "whole", steps=steps)[1:], OMP_NUM_THREADS="1")
    printed = tmp_path / "printed.txt"  # a pipe that nobody reads is full after some kills
    with printed.open("w") as file:
        process = subprocess.Popen(
            arguments(tmp_path / "data", tmp_path / "killed", restarts=KILLS, steps=steps),
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    log, choice = tmp_path / "killed" / "log.csv", random.Random(SEED)
    dead: set[int] = set()
    for kill in range(KILLS):
        wait_until(lambda dead=frozenset(dead): len(ranks_of(process) - dead) == 2 or process.poll() is not None)
        if process.poll() is not None:
            break  # what it printed says why
        rows = choice.randrange(8)  # of the 13 that a run of one kill logs
        if kill > 0 or rows == 0:  # at any moment from the start of Python on
            time.sleep(choice.uniform(0, 10 if kill > 0 else 3))
        else:  # in one of the steps after this row
            wait_until(lambda rows=rows: rows_of(log) >= rows or process.poll() is not None, 300)
            time.sleep(choice.uniform(0, 0.2))
        ranks = ranks_of(process) - dead
        os.kill(choice.choice(sorted(ranks)), signal.SIGKILL)
        dead |= ranks
    process.wait(timeout=600)
    report = printed.read_text()
    assert process.returncode == 0, report[-3000:]
    assert report.count("(exitcode: -9)") == KILLS, report
    first, second = (dict(leaves(load_checkpoint(tmp_path / name / "checkpoint_last.pt"))) for name in RUNS)
    assert first[("step",)] == steps
    assert [*first] == [*second]
    for place, value in first.items():
        assert type(second[place]) is type(value), place
        assert torch.equal(value, second[place]) if isinstance(value, torch.Tensor) else value == second[place], place
    one, other = (list(csv.DictReader((tmp_path / name / "log.csv").open())) for name in RUNS)
    assert [{**row, "seconds": None} for row in one] == [{**row, "seconds": None} for row in other]


RUNS = "whole", "killed"


def leaves(content: object, place: tuple[object, ...] = ()) -> Iterator[tuple[tuple[object, ...], object]]:
    """What a checkpoint holds, tensors and plain values, each with the keys that lead to it.

    There is no state of a random generator: each step seeds its own (see `Trainer._step`).
    """
    if isinstance(content, dict | list | tuple):
        yield (*place, "length"), len(content)
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from leaves(value, (*place, key))
    else:
        yield place, content


def rows_of(log: Path) -> int:
    """The rows that a run has logged so far."""
    return log.read_text().count("\n") - 1 if log.exists() else 0


def ranks_of(torchrun: subprocess.Popen[Any]) -> set[int]:
    """The process ids of its ranks."""
    found = subprocess.run(["pgrep", "-P", str(torchrun.pid)], capture_output=True, text=True, check=False)
    return {int(number) for number in found.stdout.split()}


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
    os.kill(max(ranks_of(process)), signal.SIGTERM)
    report, _ = process.communicate(timeout=300)
    done = torch.load(output / "checkpoint_last.pt", weights_only=True)["step"]
    assert report.count(f"{output}: stopped after step {done} of 5000, and saved\nGo on with: ") == 1, report[-3000:]
    assert "exitcode  : 143" in report, report[-3000:]
