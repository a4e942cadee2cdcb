"""Building the CUDA kernels without a GPU: for devices that are not there, and without nvcc."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.nvcc import needs_nvcc
from helpers.processes import run_python
from sslfast.kernel_library import BuildError, compile_cuda, cuda_architecture, find_nvcc

LOADED = """
import sys, torch, sslfast.ops
from sslfast.ops.registry import OPS
from torch._subclasses import FakeTensorMode
torch.ops.load_library(sys.argv[1])
with_cuda = [n for n in OPS if not n.startswith("norm_")]  # Triton has those
missing = [n for n in with_cuda if not torch._C._dispatch_has_kernel_for_dispatch_key(f"sslfast::{n}", "CUDA")]
assert OPS and not missing, missing
ops = torch.ops.sslfast
with FakeTensorMode(allow_non_fake_inputs=True):
    logits, features = (torch.empty(3, c, 5, 6, 7, device="cuda") for c in (3, 8))
    threshold, flags = ops.reliability(logits, None, torch.empty((), dtype=torch.float64, device="cuda"))
    assert flags.shape == (3, 5, 6, 7) and flags.device.type == "cuda"
    assert ops.dual_supervised(logits, None, logits, None, flags, 0.6, -1).shape == (7 + 7 * 3,)
    assert ops.rectified_consistency(logits, None, logits, None, flags).shape == (4 + 4 * 3,)
    assert [tuple(t.shape) for t in ops.class_prototypes(features, flags, 3)] == [(3, 8), (3,)]
print("loaded")
"""


@needs_nvcc
def test_the_library_loads_without_a_gpu(tmp_path: Path) -> None:
    run_python("-m", "sslfast.build", "--output", str(tmp_path), "--cuda", "9.0")
    assert "loaded" in run_python("-c", LOADED, str(tmp_path / "sslfast_cuda.so"))


def test_a_compute_capability_becomes_flags_of_nvcc_and_anything_else_is_refused() -> None:
    assert cuda_architecture("9.0") == ["-gencode", "arch=compute_90,code=sm_90"]
    assert cuda_architecture("8.6+PTX")[-1] == "arch=compute_86,code=compute_86"
    with pytest.raises(BuildError, match="no compute capability"):
        cuda_architecture("hopper")


def test_a_missing_nvcc_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(BuildError, match=r"no nvcc .*the Triton kernels need none"):
        find_nvcc()


def test_an_nvcc_of_another_cuda_than_torchs_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.8, V11.8.89'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr("torch.version.cuda", "12.8")
    with pytest.raises(BuildError, match=r"nvcc belongs to CUDA 11\.8, but torch was built for CUDA 12\.8; install"):
        compile_cuda(["9.0"])
