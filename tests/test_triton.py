"""The Triton kernels without a GPU: interpreted against the references, and compiled for one that is not there."""

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


@pytest.mark.parametrize(("tests", "least"), [("test_backends", 60), ("test_consistency", 25)])
def test_the_interpreted_kernels_pass_the_tests_of_the_backends(tests: str, least: int) -> None:
    environment = {"TRITON_INTERPRET": "1", "SSLFAST_BACKEND": "triton", "SSLFAST_TEST_BACKEND": "triton"}
    report = run("-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/{tests}.py", **environment)
    passed = int(report.rpartition(" passed")[0].split()[-1])
    assert passed > least, report[-2000:]


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
    }
    for name, _, registers, spilled in rows:
        assert 0 < int(registers) <= 255, name
        assert int(spilled) == 0, name
