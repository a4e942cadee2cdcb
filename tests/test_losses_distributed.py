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

# further: list of method and options
METHOD = """
from sslfast import views
from sslfast.methods import find_method, mean_teacher, u2pl, ua_mt
from sslfast.networks import NormAct, normalise_over_processes
from sslfast.ops.reduce import SINGLE_PROCESS, Reducer
from sslfast.ops.sample_voxels import VoxelSample, sample_voxels
from torch import nn

def of_rank(r):  # two labelled and two unlabelled volumes
    return [2 * r, 2 * r + 1, 2 * size + 2 * r, 2 * size + 2 * r + 1]

# What a rank draws, it draws in training from a seed of its own. Here each draws for all ranks and keeps its part, so
# that one process draws the same: views, noise, and which of its memory an anchor of u2pl meets.
parts = 1  # ranks of the run that is computed

def for_all(draw):
    def part(images, *arguments):
        everyone = draw(images.repeat(parts, 1, 1, 1, 1), *arguments)
        return everyone.chunk(parts)[rank % parts]
    return part

views.random_affine_grid = for_all(views.random_affine_grid)
mean_teacher.noisy = ua_mt.noisy = for_all(mean_teacher.noisy)

# u2pl samples voxels of both kinds of volumes by their place in the batch; one process takes the order of the ranks.
anchors_before = 0  # [C] those of the ranks before this one

def sample_in_order_of_ranks(flags, quotas, seed, step, *, reducer):
    global anchors_before
    if reducer.size == 1:
        order, voxels = torch.tensor([v for r in range(size) for v in of_rank(r)]), flags[0].numel()
        ordered = sample_voxels(flags[order], quotas, seed, step)
        indices = order[ordered.indices.clamp_min(0) // voxels] * voxels + ordered.indices % voxels
        sample = VoxelSample(torch.where(ordered.indices < 0, -1, indices), ordered.counts)
    else:
        sample = sample_voxels(flags, quotas, seed, step, reducer=reducer)
    if quotas == [u2pl.ANCHORS] * 3:
        anchors_before = reducer.gather(sample.counts)[: reducer.rank].sum(0)
    return sample

def draw_for_all(self, anchors):
    negatives, filled = draw(self, anchors)
    places = (torch.arange(anchors) + torch.as_tensor(anchors_before).view(-1, 1)).clamp_max(anchors - 1)
    return negatives[torch.arange(3).view(-1, 1), places], filled

u2pl.sample_voxels, draw, u2pl.Memory.draw = sample_in_order_of_ranks, u2pl.Memory.draw, draw_for_all

class Network(nn.Module):
    width = 5

    def __init__(self):
        super().__init__()
        self.body, self.norm = nn.Conv3d(1, 6, 1), NormAct(6, "sync-batch")
        self.classifier, self.projection = nn.Conv3d(6, 3, 1), nn.Conv3d(6, 5, 1)

    def forward(self, x, linear=False):
        features = self.norm(self.body(x))
        return 3 * self.classifier(features), self.projection(features)

def compare(name, options):
    global parts
    torch.manual_seed(5)
    images = 3 * torch.randn(4 * size, 1, 6, 7, 5)
    labels = torch.randint(0, 3, (2 * size, 6, 7, 5))

    def run(images, labels, reducer):
        torch.manual_seed(6)
        networks = [Network(), Network()]
        cls = find_method(name)
        method = cls(3, 10, 1, cls.Options(**options))
        method.spacing = (1.0, 1.0, 2.0)
        method.set_process_group(reducer)
        method.prepare(*networks)
        for module in (*networks, method):
            normalise_over_processes(module, reducer)
        parameters = [p for network in networks for p in network.parameters()]
        for step in (7, 8):  # the second with other weights, and with averages and memories of the first
            torch.manual_seed(step)
            result = method.step(*networks, images, labels, step)
            for p in parameters:
                p.grad = None
            result.loss.backward()
            losses = {"loss a": result.loss_a.detach(), "loss b": result.loss_b.detach(), **result.terms}
            values = {"network a": networks[0].state_dict(), "network b": networks[1].state_dict()}
            state = {f"{part} {key}": v for part, of in values.items() for key, v in of.items()} | method.state_dict()
            copy = {key: value.clone() for key, value in state.items()}
            yield losses, [p.grad for p in parameters], copy
            with torch.no_grad():
                for p in parameters:
                    p.mul_(0.9)

    parts = 1
    expected = [*run(images, labels, SINGLE_PROCESS)]
    parts = size
    ranks = [*run(images[of_rank(rank)], labels[of_rank(rank)[:2]], Reducer(dist.group.WORLD))]
    for (losses, grads, state), (expected_losses, expected_grads, expected_state) in zip(ranks, expected, strict=True):
        assert losses.keys() == expected_losses.keys() and state.keys() == expected_state.keys()
        for key, value in expected_losses.items():
            torch.testing.assert_close(losses[key], value, rtol=2e-6, atol=1e-6, msg=lambda m: f"{key}: {m}")
        for key, value in expected_state.items():
            torch.testing.assert_close(state[key], value, rtol=1e-5, atol=1e-6, msg=lambda m: f"{key}: {m}")
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            assert (grad is None) == (expected_grad is None)
            if grad is not None:
                dist.all_reduce(grad)
                torch.testing.assert_close(grad / size, expected_grad, rtol=1e-4, atol=1e-6)
        for key, value in state.items():  # what a checkpoint keeps is that of every rank
            first = value.clone()
            dist.broadcast(first, 0)
            assert torch.equal(first, value), key

for name, options in eval(sys.argv[4]):
    try:
        compare(name, options)
    except Exception as error:
        raise AssertionError(name, options) from error
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


RUNS: list[tuple[str, dict[str, object]]] = [
    *((name, {}) for name in METHODS),
    ("ssl-contrastive", {"gate": (0.0, 0.0), "contrast_weight": 0.1}),
]


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_of_a_method_compute_what_one_process_does(size: int, tmp_path: Path) -> None:
    run_ranks(tmp_path, START + METHOD + END, repr(RUNS), size=size)


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
