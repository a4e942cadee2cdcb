"""Python in processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from helpers.options import ROOT


def run_python(*arguments: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    """What Python prints; it must succeed."""
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-6000:]
    return result.stdout


def run_ranks(folder: Path, script: str, *arguments: str, size: int = 2) -> None:
    """Runs the script as each rank of a process group; each must end with "rank N equal".

    Its arguments are the rank, the number of ranks, the file where they meet, and `arguments`.
    """
    meeting = folder / "rendezvous"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(rank), str(size), str(meeting), *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        for rank, process in enumerate(ranks):
            out, err = process.communicate(timeout=300)
            assert out == f"rank {rank} equal\n", err[-3000:]
    finally:
        for process in ranks:  # those that wait for one that failed
            process.kill()
            process.communicate()


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Waits for the condition, which must hold in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
