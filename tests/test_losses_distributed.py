"""Two processes with half the batch each against one with all of it; torchrun, and a rank that dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_cases

from sslfast.ops.reduce import ALONE, exact_percentiles

# argv: rank, rendezvous, backend, options
RANK = """
import sys, torch, torch.distributed as dist, sslfast
rank, size = int(sys.argv[1]), 2
options = eval(sys.argv[4])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=size)
torch.manual_seed(5)
labelled, unlabelled = 2, 4  # of both ranks together
whole = [3 * torch.randn(labelled + unlabelled, c, 6, 7, 5) for c in (3, 3, 8, 8)]
labels = torch.randint(-1, 3, (labelled, 6, 7, 5))
if "empty" in options:  # the second rank has no label and nothing reliable
    del options["empty"]
    labels[1:] = -1
    for m in whole[:2]:
        m[-2:] = 0

linear = options.pop("linear", False)  # the first maps are a classifier's inputs, not its outputs
weights = torch.randn(3, 4)
teacher = torch.randn(unlabelled, 3, 6, 7, 5) if options.pop("taught", False) else None

def run(maps, labels, group, teacher):
    leaves = [m.clone().requires_grad_() for m in maps]
    criterion = sslfast.DualContrastiveLoss(3, ramp_steps=1, anchors=40, negatives=50, group=group, **options)
    with sslfast.backend(sys.argv[3]):
        logits = [sslfast.LinearLogits(m, weights.expand(len(m), 3, 4)) if linear else m for m in leaves[:2]]
        result = criterion(*logits, *leaves[2:], labels, step=3, teacher=teacher)
        result.loss.backward()
    return result, [torch.zeros_like(m) if m.grad is None else m.grad for m in leaves]

expected, expected_grads = run(whole, labels, None, teacher)
mine = [rank, *range(labelled + rank * 2, labelled + rank * 2 + 2)]
my_teacher = None if teacher is None else teacher[rank * 2 : rank * 2 + 2]
result, grads = run([m[mine] for m in whole], labels[rank : rank + 1], dist.group.WORLD, my_teacher)
torch.testing.assert_close(result.loss, expected.loss, rtol=2e-6, atol=1e-6)
for name, value in expected.terms.items():
    torch.testing.assert_close(result.terms[name], value, rtol=2e-6, atol=1e-6, msg=lambda m: f"{name}: {m}")
for found, whole_grad in zip(grads, expected_grads):
    scale = whole_grad.abs().max()
    torch.testing.assert_close(found / size, whole_grad[mine], rtol=1e-4, atol=float(2e-6 * scale) + 1e-12)
print("rank", rank, "equal", flush=True)
dist.barrier()
"""

METHOD_RANK = """
import sys, torch, torch.distributed as dist
from sslfast.methods import find_method
from sslfast.ops.reduce import ALONE, Ranks
rank, size = int(sys.argv[1]), 2
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=size)
torch.manual_seed(5)
whole = [3 * torch.randn(6, c, 6, 7, 5) for c in (3, 3, 8, 8)]
labels = torch.randint(0, 3, (2, 6, 7, 5))

class Given(torch.nn.Module):
    def __init__(self, *outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, images, linear=False):
        return self.outputs

def run(maps, labels, ranks):
    leaves = [m.clone().requires_grad_() for m in maps]
    method = find_method(sys.argv[3])
    options = method.Options(**({"views": "none"} if sys.argv[3] == "ssl-contrastive" else {}))  # each rank draws its own
    method = method(3, 10, 1, options)
    method.count_as_one(ranks)
    result = method.step(Given(*leaves[::2]), Given(*leaves[1::2]), torch.zeros(len(maps[0]), 1, 6, 7, 5), labels, step=8)
    result.loss.backward()
    return result, [torch.zeros_like(m) if m.grad is None else m.grad for m in leaves]

expected, expected_grads = run(whole, labels, ALONE)
mine = [rank, 2 + 2 * rank, 3 + 2 * rank]
result, grads = run([m[mine] for m in whole], labels[rank : rank + 1], Ranks(dist.group.WORLD))
torch.testing.assert_close(result.loss, expected.loss, rtol=2e-6, atol=1e-6)
for found, whole_grad in zip(grads, expected_grads):
    scale = whole_grad.abs().max()
    torch.testing.assert_close(found / size, whole_grad[mine], rtol=1e-4, atol=float(2e-6 * scale) + 1e-12)
print("rank", rank, "equal", flush=True)
dist.barrier()
"""

OPTIONS: list[dict[str, object]] = [
    {},
    {"taught": True},
    {"preset": "paper"},
    {"preset": "paper", "taught": True},
    {"percentile": 80.0, "empty": True},
    {"percentile": 60.0, "linear": True},
    {"preset": "paper", "taught": True, "linear": True, "percentile": 63.7},
]


@pytest.mark.parametrize(
    ("backend", "options"),
    [*(("auto", o) for o in OPTIONS), *(("reference", o) for o in OPTIONS[:4])],
    ids=lambda o: o if isinstance(o, str) else "-".join(o) or "defaults",
)
def test_two_ranks_compute_what_one_process_does(backend: str, options: dict[str, object], tmp_path: Path) -> None:
    assert_both_equal(tmp_path, RANK, backend, repr(options))


@pytest.mark.parametrize("method", ["ssl-contrastive", "dual-networks", "mcf", "cps"])
def test_two_ranks_of_a_method_compute_what_one_process_does(method: str, tmp_path: Path) -> None:
    assert_both_equal(tmp_path, METHOD_RANK, method)


def assert_both_equal(folder: Path, script: str, *arguments: str) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(rank), str(folder / "rendezvous"), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank, process in enumerate(ranks):
        out, err = process.communicate(timeout=180)
        assert out == f"rank {rank} equal\n", err[-3000:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("percentile", [0, 12.5, 50, 99.9, 100])
def test_percentiles_by_counting_are_numpys(dtype: torch.dtype, percentile: float) -> None:
    values, wanted = torch.rand(1001, dtype=dtype), torch.tensor(percentile, dtype=torch.float64)
    values[::7] = values[3]  # ties
    expected = torch.tensor(np.percentile(values.double().numpy(), percentile)).to(dtype)
    assert exact_percentiles(values, wanted, ALONE) == expected
    assert exact_percentiles(values[:0], wanted, ALONE) == 0
    values[5] = torch.nan
    assert exact_percentiles(values, wanted, ALONE).isnan()


def arguments(data: Path, output: Path, restarts: int = 0) -> list[str]:
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        f"--max-restarts={restarts}",
        *(
            "-m",
            "sslfast.train",
            "--data",
            str(data),
            "--output",
            str(output),
            "--device",
            "cpu",
            "--precision",
            "fp32",
        ),
        *("--steps", "30", "--save-every", "3", "--log-every", "3", "--patch", "8", "8", "8", "--width", "4"),
        *("--depth", "2", "--labeled-batch", "1", "--unlabeled-batch", "1"),
    ]


def test_more_processes_than_volumes_are_refused(tmp_path: Path) -> None:
    write_cases(tmp_path / "data", cases=1, labelled=1)
    result = subprocess.run(
        arguments(tmp_path / "data", tmp_path / "run"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert "error: 2 processes train on 1 volumes; start no more than 1" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_rank_that_dies_is_restarted_and_changes_nothing(tmp_path: Path) -> None:
    write_cases(tmp_path / "data", cases=7, labelled=3)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole = subprocess.run(
        arguments(tmp_path / "data", tmp_path / "whole"), capture_output=True, text=True, check=False, env=environment
    )
    assert whole.returncode == 0, whole.stderr[-3000:]
    process = subprocess.Popen(
        arguments(tmp_path / "data", tmp_path / "killed", restarts=2),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    checkpoint = tmp_path / "killed" / "checkpoint_last.pt"
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.02)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout
    os.kill(int(workers.split()[-1]), signal.SIGKILL)
    report, _ = process.communicate(timeout=300)
    assert process.returncode == 0, report[-3000:]
    assert "(exitcode: -9)" in report, report  # it was killed in mid-run
    first, second = (
        torch.load(tmp_path / name / "checkpoint_last.pt", weights_only=True) for name in ("whole", "killed")
    )
    assert first["step"] == second["step"] == 30
    for network in ("network_a", "network_b"):
        for name, value in first["model"][network].items():
            assert torch.equal(value, second["model"][network][name]), name
