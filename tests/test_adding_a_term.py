"""docs/adding-a-term.md: its change, applied to a copy of the sources, is a term that every backend computes."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

from helpers.options import ROOT
from helpers.processes import run_python

DIFFS = re.findall(r"^```diff\n(.*?)^```$", (ROOT / "docs" / "adding-a-term.md").read_text(), re.MULTILINE | re.DOTALL)

CHECK = """
import sys
import torch
import sslfast

torch.manual_seed(0)
size, classes = (5, 6, 7), 3
maps = [2 * torch.randn(4, channels, *size) for channels in (classes, classes, 8, 8)]
labels, teacher = torch.randint(0, classes, (2, *size)), 2 * torch.randn(2, classes, *size)
options = {"percentile": 50, "focal_weight": 0.5, "gate": (0, 0), "ramp_steps": 1, "anchors": 5, "negatives": 5}
criterion = sslfast.DualContrastiveLoss(classes, **options).eval()  # so that no call changes the averages


def compute(backend, dtype):
    leaves = [m.to(dtype).requires_grad_() for m in maps]
    with sslfast.backend(backend):
        result = criterion(*leaves, labels, step=1, teacher=teacher.to(dtype))
        return result, torch.autograd.grad(result.loss, leaves[:2])


exact, gradients = compute("reference", torch.float64)
log_p = maps[0][2:].double().log_softmax(1).gather(1, teacher.double().argmax(1, keepdim=True)).squeeze(1)
h = torch.distributions.Categorical(logits=teacher.double().movedim(1, -1)).entropy()
focal = (-(1 - log_p.exp()).square() * log_p)[h < exact.terms["thresholds"][0]].mean()
torch.testing.assert_close(exact.terms["focal"][0], focal)
for backend in sys.argv[1:]:
    result, computed = compute(backend, torch.float32)
    torch.testing.assert_close(result.loss.double(), exact.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(result.terms["focal"].double(), exact.terms["focal"], rtol=1e-5, atol=0)
    for mine, truth in zip(computed, gradients):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-4, atol=1e-7)
print("equal")
"""


def test_it_takes_at_most_six_files_and_twelve_places() -> None:
    files = {line.split()[1] for diff in DIFFS for line in diff.splitlines() if line.startswith("+++ ")}
    assert 0 < len(files) <= 6
    assert sum(line.startswith("@@") for diff in DIFFS for line in diff.splitlines()) <= 12


def test_the_change_applies_and_every_backend_computes_the_new_term(tmp_path: Path) -> None:
    for folder in ("sslfast", "csrc", "kernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    patch = tmp_path / "change.diff"
    patch.write_text("".join(DIFFS))
    applied = subprocess.run(["git", "apply", patch.name], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert applied.returncode == 0, applied.stderr
    backends = ["cpu", *(["triton"] if find_spec("triton") else [])]
    run_python(
        "-c", CHECK, *backends, cwd=tmp_path, PYTHONPATH=str(tmp_path), TRITON_INTERPRET="1", SSLFAST_PREBUILT=""
    )
