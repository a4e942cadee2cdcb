"""Python in processes of its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
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


def run_command(command: str, cwd: Path, **environment: str) -> None:
    """Runs `python -m MODULE FLAGS` as a shell would, in the fork of a process that has imported the trainer; it must
    succeed. The start of Python and these imports would take longer than the command does with a small dataset.
    """
    python, option, module, *flags = shlex.split(command)
    assert (python, option) == ("python", "-m")
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["sslfast.training.run", "sslfast.report_page"])
    printed = cwd / "printed.txt"
    process = forks.Process(target=_run_module, args=(module, flags, cwd, printed, {**os.environ, **environment}))
    process.start()
    process.join()
    assert process.exitcode == 0, f"{command}\n{printed.read_text()[-6000:]}"


def _run_module(module: str, flags: Sequence[str], cwd: Path, printed: Path, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv[1:] = flags
    with printed.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        runpy.run_module(module, run_name="__main__", alter_sys=True)


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
