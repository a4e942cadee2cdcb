"""Peak memory of this process, and of a call in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def resident_mb(field: str = "VmRSS") -> float:
    """Of this process; VmHWM is the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field))) / 1024


def forget_peak() -> float:
    """Lets the peak start anew; gives what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident_mb()


def probe(module: str, *arguments: str) -> float:
    """What `python -m MODULE --probe ARGUMENTS` prints last; its allocator gives freed memory back at once."""
    result = subprocess.run(
        [sys.executable, "-m", module, "--probe", *arguments],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
    )
    return float(result.stdout.splitlines()[-1])
