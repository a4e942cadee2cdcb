"""Runs the parts of a run one after the other, each in its own processes, so that a failure costs no other."""

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
MIN_SECONDS = 10.0  # less is not worth a start
GRACE = 3.0  # seconds for the traceback of a process that is out of time

PASSED = "passed"


@dataclass(frozen=True)
class Part:
    """A command with a time limit."""

    name: str
    limit: float  # seconds
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    summary: str = r"\S"  # regular expression of the line that summarises its output; the last match counts
    required: str = ""  # regular expression that its output must match for it to have passed


def run_parts(parts: Sequence[Part], folder: Path, deadline: float = math.inf, cwd: Path | None = None) -> bool:
    """Runs the parts in their order and tells how each ended as soon as it does; true if all passed.

    In `folder`, `results.jsonl` gets a record of each part that ended, `log.txt` what the parts print, while they print
    it, and `results.md` is made anew after each. A part that fails, crashes or runs out of time costs that part alone:
    its process group is killed, and the next starts. Beyond its limit, a part may have the time that those before it
    left until the deadline, but not what those after it need. Parts that the time does not reach are dropped.

    Args:
        deadline: of the whole, as `time.monotonic()` counts.
        cwd: the folder in which the parts run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for i, part in enumerate(parts):
        started = time.monotonic()
        left = deadline - started
        spare = left - sum(other.limit for other in parts[i:]) if math.isfinite(left) else 0.0
        print(f"{part.name} ...", end="", flush=True)
        result, summary = "interrupted", "the run was stopped"
        try:
            limit = min(part.limit + max(spare, 0.0), left)
            result, summary = ("dropped", "no time left") if left < MIN_SECONDS else _run(part, folder, limit, cwd)
        finally:
            seconds = time.monotonic() - started
            values = {"name": part.name, "result": result, "summary": summary}
            append(folder, "part", **values, seconds=round(seconds, 1), limit=part.limit)
            write_page(folder)
            print(f" {result}, {seconds:.0f} s: {summary}", flush=True)
        results.append(result)
    return all(result == PASSED for result in results)


def _run(part: Part, folder: Path, limit: float, cwd: Path | None) -> tuple[str, str]:
    """A part's result, and the line that summarises its output."""
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
        result = _result(process.wait(limit))
    except subprocess.TimeoutExpired:
        result = f"out of time after {limit:.0f} s"
        _signal(process, signal.SIGABRT)  # Python prints where it was
        _wait(process, GRACE)
    finally:
        _signal(process, signal.SIGKILL)  # and whatever it left behind
    _wait(process, GRACE)  # a process that hangs in the driver may not end at all; the run goes on without it
    output = (folder / LOG).read_bytes()[start:].decode(errors="replace")
    if result == PASSED and not re.search(part.required, output):
        result = f"failed: its output lacks {part.required!r}"
    lines = [line.strip() for line in output.partition("Fatal Python error")[0].splitlines() if line.strip()]
    return result, ([line for line in lines if re.search(part.summary, line)] or lines or ["nothing"])[-1][:300]


def _result(code: int) -> str:
    if code < 0:
        known = {number.value: number.name for number in signal.Signals}
        return f"ended by {known.get(-code, f'signal {-code}')}"
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
