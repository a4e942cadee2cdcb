"""`forward_apart`: unlabelled volumes do not enter the statistics of labelled ones."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from helpers.methods import make_method
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
    logits, features = forward_apart(network, images, 1)
    expected, known = other(images[:1]), averages(other)
    expected = [torch.cat(parts) for parts in zip(expected, other(images[1:]), strict=True)]
    torch.testing.assert_close([logits, features], expected, rtol=0, atol=0)
    torch.testing.assert_close(averages(network), known, rtol=0, atol=0)
    network(images)
    assert not any(torch.equal(*pair) for pair in zip(averages(network), known, strict=True))  # they go on


def test_linear_logits_are_those_of_both_parts() -> None:
    network = BATCH_NORM["VNet"]().eval()
    images = torch.randn(3, 1, 4, 6, 8)
    linear, features = forward_apart(network, images, 2, linear=True)
    torch.testing.assert_close(materialize(linear), network(images)[0])
    assert linear.features is features


@pytest.mark.parametrize(("norm", "num_labelled"), [("instance", 1), ("batch", 0), ("batch", 3)])
def test_where_there_is_nothing_to_keep_apart_the_network_runs_once(norm: str, num_labelled: int) -> None:
    network = VNet(3, width=4, depth=2, dropout=0.0, norm=norm)
    calls: list[int] = []
    network.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    forward_apart(network, torch.randn(3, 1, 4, 6, 8), num_labelled)
    assert calls == [3]


@pytest.mark.parametrize(("preset", "apart"), [("recommended", True), ("paper", False)])
def test_the_default_leaves_the_averages_to_the_labelled_volumes(preset: str, apart: bool) -> None:
    networks = [BATCH_NORM["VNet"]() for _ in range(2)]
    alone = copy.deepcopy(networks)
    images, labels = torch.randn(4, 1, 4, 6, 8), torch.randint(0, 3, (2, 4, 6, 8))
    images[2:] = 100 * torch.rand(2, 1, 4, 6, 8)
    make_method("ssl-contrastive", 3, 10, 1, preset=preset).step(*networks, images, labels, step=5)
    make_method("supervised", 3, 10, 1).step(*alone, images, labels, step=5)
    for network, other in zip(networks, alone, strict=True):
        same = all(torch.equal(*pair) for pair in zip(averages(network), averages(other), strict=True))
        assert same == apart
