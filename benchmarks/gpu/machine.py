"""The first part of a run: what machine this is, how fast it copies and multiplies, which backends run and why not another."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.gpu.device import BACKENDS, DEVICE, REHEARSES, copy_speed, product_speed
from benchmarks.gpu.records import append, digest_of_tree
from benchmarks.gpu.rehearsal import RUN
from sslfast.ops.backend import unavailable


def main() -> int:
    """The command; returns the exit status: 1 where a backend cannot run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.machine", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    folder = parser.parse_args().output
    reasons = {name: unavailable(backend) for name, backend in BACKENDS.items()}
    append(
        folder,
        "machine",
        device="a CPU" if REHEARSES else torch.cuda.get_device_name(),
        date=str(date.today()),
        run=RUN[REHEARSES],
        commit=_printed("git", "rev-parse", "--short=12", "HEAD"),
        sources=digest_of_tree(),
        python=platform.python_version(),
        torch=torch.__version__,
        triton=_version("triton"),
        cuda=torch.version.cuda,
        driver=None if REHEARSES else _printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        cpus=os.cpu_count(),
        **{f"backend {name}": reason or "runs" for name, reason in reasons.items()},
        copy_gb_s=copy_speed() / 1e9,
        bf16_tflop_s=product_speed() / 1e12,
    )
    for name, reason in reasons.items():
        print(f"{name} on {DEVICE}: {reason or 'runs'}")
    return int(any(reasons.values()))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _printed(*command: str) -> str | None:
    """What a command prints, or None where it cannot run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    sys.exit(main())
