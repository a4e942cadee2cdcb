"""The loss and the methods in several processes with a part of the batch each, against one with all of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.processes import run_ranks
from sslfast.methods import METHODS

# argv: rank, number of ranks, rendezvous
START = """
import sys, torch, torch.distributed as dist
rank, size = int(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", init_method="file://" + sys.argv[3], rank=rank, world_size=size)
torch.set_num_threads(1)
"""
END = """
print("rank", rank, "equal", flush=True)
dist.barrier()
"""

# further: backend, list of options
LOSS = """
import sslfast

def compare(options):
    torch.manual_seed(5)
    labelled, unlabelled = size, 2 * size  # of all ranks together
    whole = [3 * torch.randn(labelled + unlabelled, c, 6, 7, 5) for c in (3, 3, 8, 8)]
    labels = torch.randint(-1, 3, (labelled, 6, 7, 5))
    if options.pop("empty", False):  # the last rank has no label and nothing reliable
        labels[-1:] = -1
        for m in whole[:2]:
            m[-2:] = 0

    linear = options.pop("linear", False)  # the first maps are a classifier's inputs, not its outputs
    weights = torch.randn(3, 4)
    teacher = torch.randn(unlabelled, 3, 6, 7, 5) if options.pop("with_teacher", False) else None

    def run(maps, labels, group, teacher):
        leaves = [m.clone().requires_grad_() for m in maps]
        fixed = {"gate": (0, 0), "ramp_steps": 1, "anchors": 40, "negatives": 50}
        criterion = sslfast.DualContrastiveLoss(3, group=group, **{**fixed, **options})
        with sslfast.backend(sys.argv[4]):
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

for options in eval(sys.argv[5]):
    try:
        compare(dict(options))
    except Exception as error:
        raise AssertionError(options) from error
"""

# further: names of methods
METHOD = """
from sslfast.methods import find_method, mean_teacher, u2pl
from sslfast.ops.reduce import SINGLE_PROCESS, Reducer
from torch import nn

mean_teacher.NOISE = 0  # of the teacher's input: each rank draws its own
u2pl.ANCHORS, u2pl.NEW = 4096, 8192  # all that there are: which of them are drawn depends on the order of the volumes
u2pl.Memory.draw = lambda self, anchors: (
    (self.rows.sum(1, keepdim=True) / self.written.view(-1, 1, 1).clamp_min(1)).unsqueeze(1).expand(-1, anchors, 3, -1),
    self.written > 0,
)

class Network(nn.Module):
    width = 5

    def __init__(self):
        super().__init__()
        self.body, self.classifier, self.projection = nn.Conv3d(1, 6, 1), nn.Conv3d(6, 3, 1), nn.Conv3d(6, 5, 1)

    def forward(self, x, linear=False):
        features = self.body(x).relu()
        return 3 * self.classifier(features), self.projection(features)

def compare(name):
    torch.manual_seed(5)
    images = 3 * torch.randn(4 * size, 1, 6, 7, 5)  # two labelled and two unlabelled of each rank
    labels = torch.randint(0, 3, (2 * size, 6, 7, 5))

    def run(images, labels, reducer):
        torch.manual_seed(6)
        networks = [Network(), Network()]
        views = {"views": "none"} if name == "ssl-contrastive" else {}  # each rank draws its own
        cls = find_method(name)
        method = cls(3, 10, 1, cls.Options(**views))
        method.set_process_group(reducer)
        method.prepare(*networks)
        for step in (7, 8):  # the second with averages and memories of the first
            torch.manual_seed(step)
            result = method.step(*networks, images, labels, step)
        result.loss.backward()
        return result, [p.grad for network in networks for p in network.parameters()], method.state_dict()

    expected, expected_grads, expected_state = run(images, labels, SINGLE_PROCESS)
    two = torch.arange(2) + 2 * rank
    result, grads, state = run(images[torch.cat((two, two + 2 * size))], labels[two], Reducer(dist.group.WORLD))
    torch.testing.assert_close(result.loss, expected.loss, rtol=2e-6, atol=1e-6)
    for key, value in expected_state.items():
        if not key.endswith("rows"):  # whose order is that of the ranks
            torch.testing.assert_close(state[key], value, rtol=1e-5, atol=1e-6, msg=lambda m: f"{key}: {m}")
    for grad, expected_grad in zip(grads, expected_grads):
        assert (grad is None) == (expected_grad is None)
        if grad is not None:
            dist.all_reduce(grad)
            torch.testing.assert_close(grad / size, expected_grad, rtol=1e-4, atol=1e-6)
    for key, value in state.items():  # what a checkpoint keeps is that of every rank
        first = value.clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, value), key

for name in sys.argv[4:]:
    try:
        compare(name)
    except Exception as error:
        raise AssertionError(name) from error
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
    ("size", "backend", "options"), [(2, "auto", OPTIONS), (3, "auto", OPTIONS), (2, "reference", OPTIONS[:4])]
)
def test_ranks_compute_what_one_process_does(
    size: int, backend: str, options: list[dict[str, object]], tmp_path: Path
) -> None:
    run_ranks(tmp_path, START + LOSS + END, backend, repr(options), size=size)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_of_a_method_compute_what_one_process_does(size: int, tmp_path: Path) -> None:
    run_ranks(tmp_path, START + METHOD + END, *METHODS, size=size)


DDP = """
import sslfast
from torch import nn

class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.classifier, self.projection = nn.Conv3d(1, 5, 1), nn.Conv3d(5, 2, 1), nn.Conv3d(5, 4, 1)
    def forward(self, x):
        features = self.body(x).relu()
        return self.classifier(features), self.projection(features)

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
"""


def test_ddp_averages_gradients_even_of_a_rank_without_anchors(tmp_path: Path) -> None:
    run_ranks(tmp_path, START + DDP + END)


NORM = """
import copy, sslfast
from sslfast.networks import NormAct, normalise_over_processes
from sslfast.ops.reduce import Reducer
torch.manual_seed(5)
x, residual, upstream = (torch.randn(6, 4, 5, 6, 7) + torch.arange(6).view(6, 1, 1, 1, 1) for _ in range(3))
cut = int(sys.argv[5])
mine = slice(0, cut) if rank == 0 else slice(cut, 6)  # batches of different sizes

def run(norm, reducer, part):
    layer = NormAct(4, norm)
    normalise_over_processes(layer, reducer)
    layer = copy.deepcopy(layer)
    leaves = [t[part].clone().requires_grad_() for t in (x, residual)]
    with sslfast.backend(sys.argv[4]):
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
"""


@pytest.mark.parametrize(("backend", "cut"), [("cpu", "2"), ("cpu", "0"), ("reference", "2")])
def test_sync_batch_norm_is_that_of_the_whole_batch(tmp_path: Path, backend: str, cut: str) -> None:
    run_ranks(tmp_path, START + NORM + END, backend, cut)
