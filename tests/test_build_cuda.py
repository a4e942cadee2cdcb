"""The CUDA kernels without a GPU: compiled, linked and loaded for devices that are not there; their launches and registers.

`python -m benchmarks.gpu --rehearse` runs the tests of the backends with their code, on the CPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu.rehearsal import build_emulated
from sslfast.build import BuildError, cuda_architecture, find_nvcc

ROOT = Path(__file__).parent.parent


def has_nvcc() -> bool:
    try:
        find_nvcc()
    except BuildError:
        return False
    return True


needs_nvcc = pytest.mark.skipif(not has_nvcc(), reason="needs nvcc")


def run(*arguments: str | Path, **environment: str) -> str:
    """What a process prints; it must succeed."""
    result = subprocess.run(
        arguments, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-6000:]
    return result.stdout


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels' code as a library for the CPU."""
    return build_emulated(tmp_path_factory.mktemp("emulated"))


LAUNCHES = """
import ctypes, sys, torch, sslfast
maps = [torch.randn(4, c, 9, 10, 11).requires_grad_() for c in (3, 3, 8, 8)]
teacher = torch.randn(2, 3, 9, 10, 11)
criterion = sslfast.DualContrastiveLoss(3, ramp_steps=1)
labels = torch.randint(0, 3, (2, 9, 10, 11))
criterion(*maps, labels, step=1, teacher=teacher)
count = ctypes.CDLL(sys.argv[1]).emulated_launches
started = count()
loss = criterion(*maps, labels, step=2, teacher=teacher).loss
forward = count() - started
loss.backward()
print(forward, count() - started - forward)
"""


def test_the_default_step_is_14_launches_forward_and_5_backward(emulated: Path) -> None:
    # forward: dual_supervised, reliability 3, rectified_consistency 2, class_prototypes, sample_voxels 2 x 2, gather_voxels 2,
    # voxel_infonce; backward: dual_supervised, rectified_consistency 2, gather_voxels, voxel_infonce. On a GPU, where the host does
    # not know the loser, gather_voxels has twice as many.
    assert run(sys.executable, "-c", LAUNCHES, emulated, SSLFAST_PREBUILT=str(emulated.parent)).split() == ["14", "5"]


@needs_nvcc
def test_every_kernel_compiles_within_the_registers_of_the_table() -> None:
    def rows(report: str) -> dict[tuple[str, str], tuple[int, int]]:
        found, capability = {}, ""
        for line in report.splitlines():
            if line.startswith("sm_"):
                capability = line
            elif line.startswith("| `"):
                name, _, registers, spilled = (cell.strip(" `") for cell in line.split("|")[1:-1])
                found[capability, name] = int(registers), int(spilled)
        return found

    committed = rows((ROOT / "benchmarks" / "results" / "registers-cuda.md").read_text())
    assert {capability for capability, _ in committed} == {"sm_80", "sm_90", "sm_100"}
    ours = rows(run(sys.executable, "-m", "benchmarks.registers", "cuda", "80", "90", "100"))
    assert ours.keys() == committed.keys()
    for kernel, (registers, spilled) in ours.items():
        assert spilled == 0, kernel
        assert registers <= committed[kernel][0], kernel


LOADED = """
import sys, torch, sslfast.ops
from sslfast.ops.registry import OPS
from torch._subclasses import FakeTensorMode
torch.ops.load_library(sys.argv[1])
missing = [n for n in OPS if not torch._C._dispatch_has_kernel_for_dispatch_key(f"sslfast::{n}", "CUDA")]
assert OPS and not missing, missing
ops = torch.ops.sslfast
with FakeTensorMode(allow_non_fake_inputs=True):
    logits, features = (torch.empty(3, c, 5, 6, 7, device="cuda") for c in (3, 8))
    threshold, flags = ops.reliability(logits, None, torch.empty((), dtype=torch.float64, device="cuda"))
    assert flags.shape == (3, 5, 6, 7) and flags.device.type == "cuda"
    assert ops.dual_supervised(logits, None, logits, None, flags, 0.6, -1).shape == (7 + 5 * 3,)
    assert ops.rectified_consistency(logits, None, logits, None, flags).shape == (4 + 3 * 3,)
    assert [tuple(t.shape) for t in ops.class_prototypes(features, flags, 3)] == [(3, 8), (3,)]
print("loaded")
"""


@needs_nvcc
def test_the_library_loads_without_a_gpu(tmp_path: Path) -> None:
    run(sys.executable, "-m", "sslfast.build", "--output", str(tmp_path), "--cuda", "9.0")
    assert "loaded" in run(sys.executable, "-c", LOADED, str(tmp_path / "sslfast_cuda.so"))


def test_compute_capabilities_are_checked() -> None:
    assert cuda_architecture("9.0") == ["-gencode", "arch=compute_90,code=sm_90"]
    assert cuda_architecture("8.6+PTX")[-1] == "arch=compute_86,code=compute_86"
    with pytest.raises(BuildError, match="no compute capability"):
        cuda_architecture("hopper")


def test_a_missing_nvcc_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(BuildError, match=r"no nvcc .*the Triton kernels need none"):
        find_nvcc()
