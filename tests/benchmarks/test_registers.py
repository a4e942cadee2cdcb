"""Every kernel compiled for GPUs that are not there: its registers, and that none is spilled."""

from __future__ import annotations

import pytest

from benchmarks.cases import OPS
from helpers.nvcc import needs_nvcc
from helpers.options import ROOT
from helpers.processes import run_python


def rows(report: str) -> dict[tuple[str, str], tuple[int, int]]:
    """Registers and spilled bytes, by compute capability and kernel."""
    table, capability = {}, ""
    for line in report.splitlines():
        if line.startswith("sm_"):
            capability = line
        elif line.startswith("| `"):
            name, _, registers, spilled = (cell.strip(" `") for cell in line.split("|")[1:-1])
            table[capability, name] = int(registers), int(spilled)
    return table


@needs_nvcc
def test_every_cuda_kernel_compiles_within_the_registers_of_the_table() -> None:
    committed = rows((ROOT / "benchmarks" / "results" / "registers-cuda.md").read_text())
    assert {capability for capability, _ in committed} == {"sm_80", "sm_90", "sm_100"}
    ours = rows(run_python("-m", "benchmarks.registers", "cuda", "90"))  # each takes a minute
    assert ours.keys() == {(capability, kernel) for capability, kernel in committed if capability == "sm_90"}
    for kernel, (registers, spilled) in ours.items():
        assert spilled == 0, kernel
        assert registers <= committed[kernel][0], kernel


def test_every_triton_kernel_compiles_and_spills_nothing() -> None:
    pytest.importorskip("triton")
    report = run_python("-m", "benchmarks.registers", "triton", "90", TRITON_INTERPRET="0", SSLFAST_BACKEND="reference")
    table = rows(report)
    assert {name.split(".")[0] for _, name in table} == {*OPS, "norm_act", "voxels"}
    for kernel, (registers, spilled) in table.items():
        assert 0 < registers <= 255, kernel
        assert spilled == 0, kernel
