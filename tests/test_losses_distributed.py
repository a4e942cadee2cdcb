"""The loss and the methods in two processes with half the batch each, against one process with all of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.processes import run_two_ranks

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
teacher = torch.randn(unlabelled, 3, 6, 7, 5) if options.pop("with_teacher", False) else None

def run(maps, labels, group, teacher):
    leaves = [m.clone().requires_grad_() for m in maps]
    fixed = {"gate": (0, 0), "ramp_steps": 1, "anchors": 40, "negatives": 50}
    criterion = sslfast.DualContrastiveLoss(3, group=group, **{**fixed, **options})
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
for local_grad, whole_grad in zip(grads, expected_grads):
    scale = whole_grad.abs().max()
    torch.testing.assert_close(local_grad / size, whole_grad[mine], rtol=1e-4, atol=float(2e-6 * scale) + 1e-12)
print("rank", rank, "equal", flush=True)
dist.barrier()
"""

METHOD_RANK = """
import sys, torch, torch.distributed as dist
from sslfast.methods import find_method
from sslfast.ops.reduce import SINGLE_PROCESS, Reducer
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
    views = {"views": "none"} if sys.argv[3] == "ssl-contrastive" else {}  # each rank would draw its own
    options = method.Options(**views)
    method = method(3, 10, 1, options)
    method.set_process_group(ranks)
    images = torch.zeros(len(maps[0]), 1, 6, 7, 5)
    result = method.step(Given(*leaves[::2]), Given(*leaves[1::2]), images, labels, step=8)
    result.loss.backward()
    return result, [torch.zeros_like(m) if m.grad is None else m.grad for m in leaves]

expected, expected_grads = run(whole, labels, SINGLE_PROCESS)
mine = [rank, 2 + 2 * rank, 3 + 2 * rank]
result, grads = run([m[mine] for m in whole], labels[rank : rank + 1], Reducer(dist.group.WORLD))
torch.testing.assert_close(result.loss, expected.loss, rtol=2e-6, atol=1e-6)
for local_grad, whole_grad in zip(grads, expected_grads):
    scale = whole_grad.abs().max()
    torch.testing.assert_close(local_grad / size, whole_grad[mine], rtol=1e-4, atol=float(2e-6 * scale) + 1e-12)
print("rank", rank, "equal", flush=True)
dist.barrier()
"""

OPTIONS: list[dict[str, object]] = [
    {},
    {"with_teacher": True},
    {"preset": "paper"},
    {"preset": "paper", "with_teacher": True},
    {"percentile": 80.0, "empty": True, "gate": (0.1, 0.9)},  # a class may be on one rank alone
    {"with_teacher": True, "gate": (0.1, 0.9)},
    {"percentile": 60.0, "linear": True},
    {"preset": "paper", "with_teacher": True, "linear": True, "percentile": 63.7},
]


@pytest.mark.parametrize(
    ("backend", "options"),
    [*(("auto", o) for o in OPTIONS), *(("reference", o) for o in OPTIONS[:4])],
    ids=lambda o: o if isinstance(o, str) else " ".join(map(str, o)) or "defaults",
)
def test_two_ranks_compute_what_one_process_does(backend: str, options: dict[str, object], tmp_path: Path) -> None:
    run_two_ranks(tmp_path, RANK, backend, repr(options))


@pytest.mark.parametrize("method", ["ssl-contrastive", "dual-networks", "mcf", "cps"])
def test_two_ranks_of_a_method_compute_what_one_process_does(method: str, tmp_path: Path) -> None:
    run_two_ranks(tmp_path, METHOD_RANK, method)


DDP_RANK = """
import os, sys, torch, torch.distributed as dist, sslfast
from torch import nn

class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.classifier, self.projection = nn.Conv3d(1, 5, 1), nn.Conv3d(5, 2, 1), nn.Conv3d(5, 4, 1)
    def forward(self, x):
        features = self.body(x).relu()
        return self.classifier(features), self.projection(features)

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
torch.manual_seed(0)
networks = [nn.parallel.DistributedDataParallel(Network()) for _ in range(2)]
criterion = sslfast.DualContrastiveLoss(2, ramp_steps=1, percentile=50)
torch.manual_seed(rank)
for step in (1, 2, 3):
    images = torch.randn(3, 1, 6, 7, 5)
    labels = torch.randint(0, 2, (1, 6, 7, 5))
    if rank == 1:  # nothing annotated, and a constant volume: no anchor
        images, labels = images * 0, labels * 0 - 1
    (za, fa), (zb, fb) = (network(images) for network in networks)
    result = criterion(za, zb, fa, fb, labels, step=step)
    result.loss.backward()
    gradient = torch.cat([p.grad.flatten() for network in networks for p in network.parameters()])
    both = [torch.empty_like(gradient) for _ in range(2)]
    dist.all_gather(both, gradient)
    assert torch.equal(*both) and torch.isfinite(gradient).all() and gradient.any()
print("rank", rank, "equal", flush=True)
dist.barrier()
"""


def test_ddp_averages_gradients_even_of_a_rank_without_anchors(tmp_path: Path) -> None:
    run_two_ranks(tmp_path, DDP_RANK)


NORM_RANK = """
import copy, sys, torch, torch.distributed as dist, sslfast
from sslfast.networks import NormAct, normalise_over_processes
from sslfast.ops.reduce import Reducer
rank, size = int(sys.argv[1]), 2
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=size)
torch.manual_seed(5)
x, residual, upstream = (torch.randn(6, 4, 5, 6, 7) + torch.arange(6).view(6, 1, 1, 1, 1) for _ in range(3))
cut = int(sys.argv[4])
mine = slice(0, cut) if rank == 0 else slice(cut, 6)  # batches of different sizes

def run(norm, reducer, part):
    layer = NormAct(4, norm)
    normalise_over_processes(layer, reducer)
    layer = copy.deepcopy(layer)
    leaves = [t[part].clone().requires_grad_() for t in (x, residual)]
    with sslfast.backend(sys.argv[3]):
        y = layer(leaves[0], residual=leaves[1])
        y.backward(upstream[part])
    return y, *(leaf.grad for leaf in leaves), layer

*expected, whole = run("batch", Reducer(), slice(0, 6))
*result, layer = run("sync-batch", Reducer(dist.group.WORLD), mine)
for ours, theirs in zip(result, expected):
    torch.testing.assert_close(ours, theirs[mine], rtol=1e-4, atol=1e-4)
torch.testing.assert_close(layer.running_mean, whole.running_mean)
torch.testing.assert_close(layer.running_var, whole.running_var)
for name in ("weight", "bias"):
    total = getattr(layer, name).grad.clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total, getattr(whole, name).grad, rtol=1e-4, atol=1e-3)
print("rank", rank, "equal", flush=True)
dist.barrier()
"""


@pytest.mark.parametrize(("backend", "cut"), [("cpu", "2"), ("cpu", "0"), ("reference", "2")])
def test_sync_batch_norm_is_that_of_the_whole_batch(tmp_path: Path, backend: str, cut: str) -> None:
    run_two_ranks(tmp_path, NORM_RANK, backend, cut)
