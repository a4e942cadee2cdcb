"""How many kernels a step of the default loss launches, counted by their emulation."""

from __future__ import annotations

from benchmarks.gpu.rehearsal import emulated_library
from helpers.processes import run_python

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


def test_the_default_step_is_6_launches_forward_and_3_backward() -> None:
    # forward: dual_supervised, reliability 3, rectified_consistency 2
    # backward: dual_supervised, rectified_consistency 2
    library = emulated_library()
    assert run_python("-c", LAUNCHES, library, SSLFAST_PREBUILT=str(library.parent)).split() == ["6", "3"]
