"""`forward_apart`: unlabelled volumes do not enter the statistics of labelled ones."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from helpers.methods import make_method
from helpers.processes import run_ranks
from sslfast import VNet, WithFeatures, forward_apart
from sslfast.ops.linear_logits import materialize

BATCH_NORM = {
    "VNet": lambda: VNet(3, width=4, depth=2, dropout=0.0, norm="batch"),
    "torch's layer": lambda: WithFeatures(
        nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4, 3, 1))
    ),
}


def averages(network: nn.Module) -> list[Tensor]:
    return [
        value.clone() for name, value in network.named_buffers() if name.rpartition(".")[2] != "num_batches_tracked"
    ]


@pytest.mark.parametrize("name", BATCH_NORM)
def test_each_part_is_normalised_by_itself_and_only_the_labelled_one_is_averaged(name: str) -> None:
    network = BATCH_NORM[name]()
    network(torch.randn(1, 1, 4, 4, 4))  # finds the classifier
    other = copy.deepcopy(network)
    images = torch.randn(3, 1, 4, 6, 8)
    images[1:] += 5
    outputs = forward_apart(network, images, 1)
    expected, known = other(images[:1]), averages(other)
    expected = [torch.cat(parts) for parts in zip(expected, other(images[1:]), strict=True)]
    torch.testing.assert_close([*outputs], expected, rtol=0, atol=0)
    torch.testing.assert_close(averages(network), known, rtol=0, atol=0)
    weight = torch.randn_like(outputs[0])
    gradients = [
        torch.autograd.grad((weight * logits).sum(), [*of.parameters()])
        for of, logits in ((network, outputs[0]), (other, expected[0]))
    ]
    torch.testing.assert_close(*gradients)
    network(images)
    assert not any(torch.equal(*pair) for pair in zip(averages(network), known, strict=True))  # they go on


def test_linear_logits_are_those_of_both_parts() -> None:
    network = BATCH_NORM["VNet"]()
    images = torch.randn(3, 1, 4, 6, 8)
    linear, features = forward_apart(network, images, 2, linear=True)
    torch.testing.assert_close(materialize(linear), forward_apart(network, images, 2)[0])
    assert linear.features is features


@pytest.mark.parametrize(
    ("norm", "num_labelled", "training"),
    [("instance", 1, True), ("batch", 0, True), ("batch", 3, True), ("batch", 1, False)],
)
def test_where_there_is_nothing_to_keep_apart_the_network_runs_once(
    norm: str, num_labelled: int, training: bool
) -> None:
    network = VNet(3, width=4, depth=2, dropout=0.0, norm=norm).train(training)
    calls: list[int] = []
    network.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    forward_apart(network, torch.randn(3, 1, 4, 6, 8), num_labelled)
    assert calls == [3]


@pytest.mark.parametrize(
    ("name", "preset", "apart"),
    [("ssl-contrastive", "recommended", True), ("ssl-contrastive", "paper", False), ("dual-networks", "", False)],
)
def test_the_default_leaves_the_averages_to_the_labelled_volumes(name: str, preset: str, apart: bool) -> None:
    networks = [BATCH_NORM["VNet"]() for _ in range(2)]
    alone = copy.deepcopy(networks)
    images, labels = torch.randn(4, 1, 4, 6, 8), torch.randint(0, 3, (2, 4, 6, 8))
    images[2:] = 100 * torch.rand(2, 1, 4, 6, 8)
    make_method(name, 3, 10, 1, preset=preset).step(*networks, images, labels, step=5)
    make_method("supervised", 3, 10, 1).step(*alone, images, labels, step=5)
    for network, other in zip(networks, alone, strict=True):
        same = all(torch.equal(*pair) for pair in zip(averages(network), averages(other), strict=True))
        assert same == apart


RANKS = """
import copy, sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from sslfast import VNet, forward_apart
from sslfast.networks import normalise_over_processes
from sslfast.ops.reduce import Reducer

rank, size, meeting = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
torch.manual_seed(0)
whole = VNet(2, width=2, depth=2, dropout=0.0, norm="sync-batch").double()
network = copy.deepcopy(whole)
normalise_over_processes(network, Reducer(dist.group.WORLD))
images = torch.randn(2 * size, 1, 4, 4, 4, dtype=torch.float64)
images[size:] += 5
parallel = DistributedDataParallel(network)
logits = forward_apart(parallel, images[[rank, size + rank]], 1)[0]
logits.square().sum().backward()
expected = forward_apart(whole, images, size)[0]
expected.square().sum().backward()
torch.testing.assert_close(logits, expected[[rank, size + rank]])
for (_, a), (_, b) in zip(network.named_buffers(), whole.named_buffers(), strict=True):
    torch.testing.assert_close(a, b)
for a, b in zip(network.parameters(), whole.parameters(), strict=True):
    torch.testing.assert_close(size * a.grad, b.grad)
print(f"rank {rank} equal")
dist.destroy_process_group()
"""


def test_processes_normalise_each_kind_over_all_of_them(tmp_path: Path) -> None:
    run_ranks(tmp_path, RANKS)
