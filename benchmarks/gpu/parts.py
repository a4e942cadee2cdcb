"""Runs the parts of a run one after the other, each in processes of its own, so that none can take another's result along."""

from __future__ import annotations

import math
import os
import re
import resource
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
    says: str = r"\S"  # a regular expression: the last line of its output with a match is what it says
    proof: str = ""  # a regular expression without a match of which in its output it has not passed


def run_parts(parts: Sequence[Part], folder: Path, deadline: float = math.inf, cwd: Path | None = None) -> bool:
    """Runs the parts in their order and tells how each ended as soon as it does; true if all passed.

    In `folder`, `results.jsonl` gets a record of each part that ended, `log.txt` what the parts print, while they do, and
    `results.md` is made anew after each. A part that fails, crashes or is out of time costs that part alone: its process
    group is killed, and the next starts. A part may have what those before it left of the time until the deadline, beyond
    its limit, but not what those after it need; what the time does not reach is dropped.

    Args:
        deadline: of the whole, as `time.monotonic()` counts.
        cwd: the folder in which the parts run.
    """
    folder.mkdir(parents=True, exist_ok=True)
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
                preexec_fn=_leave_no_core,
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
    if ended == PASSED and not re.search(part.proof, output):
        ended = f"failed: its output lacks {part.proof!r}"
    lines = [line.strip() for line in output.partition("Fatal Python error")[0].splitlines() if line.strip()]
    return ended, ([line for line in lines if re.search(part.says, line)] or lines or ["nothing"])[-1][:300]


def _ending(code: int) -> str:
    if code < 0:
        known = {number.value: number.name for number in signal.Signals}
        return f"ended by {known.get(-code, f'signal {-code}')}"
    return PASSED if code == 0 else f"failed with status {code}"


def _leave_no_core() -> None:
    """A process with a GPU's memory mapped would write for longer than it may take."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


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
