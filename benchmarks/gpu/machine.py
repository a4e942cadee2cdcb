"""The first part of a run: the machine, how fast it copies and multiplies, which backends run and why others don't."""

from __future__ import annotations

import argparse
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.gpu.device import BACKENDS, DEVICE, copy_speed, product_speed
from benchmarks.gpu.records import append, digest_of_tree
from benchmarks.gpu.rehearsal import REHEARSES, RUN
from benchmarks.report import output_of, versions
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
        run=RUN[REHEARSES],
        sources=digest_of_tree(),
        **versions(),
        triton=_version("triton"),
        cuda=torch.version.cuda,
        driver=None if REHEARSES else output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
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


if __name__ == "__main__":
    sys.exit(main())
