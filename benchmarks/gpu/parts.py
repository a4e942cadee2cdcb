"""Runs the parts of a run one after the other, each in processes of its own, so that none can take another's result along."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu.records import append, write_page

LOG = "log.txt"
LEAST = 10.0  # seconds in which a part may still learn something
GRACE = 3.0  # seconds for the traceback of a process that is out of time

PASSED = "passed"


@dataclass(frozen=True)
class Part:
    """A command with a time limit."""

    name: str
    limit: float  # seconds
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    says: str = r"\S"  # the last line of its output that has this is what it says


def run_parts(parts: Sequence[Part], folder: Path, minutes: float = float("inf"), cwd: Path | None = None) -> bool:
    """Runs the parts in their order and tells how each ended as soon as it does; true if all passed.

    In `folder`, `results.jsonl` gets a record of each part that ended, `log.txt` what the parts print, while they do, and
    `results.md` is made anew after each. A part that fails, crashes or is out of time costs that part alone: its process
    group is killed, and the next starts. Of the minutes for the whole, a part may have what those before it left, beyond its
    limit, but not what those after it need; what they do not reach is dropped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * minutes
    endings = []
    for i, part in enumerate(parts):
        started = time.monotonic()
        left = deadline - started
        spare = left - sum(other.limit for other in parts[i:]) if math.isfinite(left) else 0.0
        print(f"{part.name} ...", end="", flush=True)
        ended, said = "interrupted", "the run was stopped"
        try:
            limit = min(part.limit + max(spare, 0.0), left)
            ended, said = ("dropped", "no time left") if left < LEAST else _run(part, folder, limit, cwd)
        finally:
            seconds = time.monotonic() - started
            append(folder, "part", name=part.name, ended=ended, said=said, seconds=round(seconds, 1), limit=part.limit)
            write_page(folder)
            print(f" {ended}, {seconds:.0f} s: {said}", flush=True)
        endings.append(ended)
    return all(ended == PASSED for ended in endings)


def _run(part: Part, folder: Path, limit: float, cwd: Path | None) -> tuple[str, str]:
    """How a part ended, and the line that says what came of it."""
    with (folder / LOG).open("ab") as log:
        log.write(f"\n===== {part.name}: {' '.join(part.command)}\n".encode())
        log.flush()
        start = log.tell()
        try:
            process = subprocess.Popen(
                part.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env={**os.environ, "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1", **part.environment},
                process_group=0,
            )
        except OSError as error:
            return "could not start", str(error)
    try:
        ended = _ending(process.wait(limit))
    except subprocess.TimeoutExpired:
        ended = f"out of time after {limit:.0f} s"
        _signal(process, signal.SIGABRT)  # Python prints where it was
        _wait(process, GRACE)
    finally:
        _signal(process, signal.SIGKILL)  # and whatever it left behind
    _wait(process, GRACE)  # a process in the driver's hands may not end at all: then it is left there
    output = (folder / LOG).read_bytes()[start:].decode(errors="replace")
    lines = [line.strip() for line in output.partition("Fatal Python error")[0].splitlines() if line.strip()]
    return ended, ([line for line in lines if re.search(part.says, line)] or lines or ["nothing"])[-1][:300]


def _ending(code: int) -> str:
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return PASSED if code == 0 else f"failed with status {code}"


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return
