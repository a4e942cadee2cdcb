"""The Triton kernels without a GPU: compiled for one that is not there.

`python -m benchmarks.gpu --rehearse` runs the tests of the backends with them, interpreted.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent


def run(*arguments: str, **environment: str) -> str:
    """What a Python process prints; it must succeed."""
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-3000:]
    return result.stdout


def test_every_kernel_compiles_for_a_gpu_and_spills_nothing() -> None:
    report = run("-m", "benchmarks.registers", "triton", "90", TRITON_INTERPRET="0", SSLFAST_BACKEND="reference")
    rows = [
        [cell.strip(" `") for cell in line.split("|")[1:-1]] for line in report.splitlines() if line.startswith("| `")
    ]
    assert {row[0].split(".")[0] for row in rows} == {
        "dual_supervised",
        "reliability",
        "pseudo_supervised",
        "rectified_consistency",
        "masked_consistency",
        "class_prototypes",
        "sample_voxels",
        "voxel_infonce",
        "voxels",
    }
    for name, _, registers, spilled in rows:
        assert 0 < int(registers) <= 255, name
        assert int(spilled) == 0, name
