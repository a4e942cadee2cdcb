"""Activations that are recomputed: what is modified in place is noticed, and a block is that of its thread."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from sslfast.networks import NormAct
from sslfast.ops import recomputation
from sslfast.ops.recomputation import recompute_activations


def layers() -> tuple[nn.Module, nn.Module, nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Conv3d(1, 4, 3), NormAct(4), nn.Conv3d(4, 2, 3), torch.randn(2, 1, 8, 8, 8)


def test_an_output_that_is_modified_at_once_is_kept_as_it_then_is() -> None:
    first, norm, second, x = layers()
    gradients = []
    for recomputes in (False, True):
        with recompute_activations(2 if recomputes else 0):
            y = second(norm(first(x)).mul_(3))
        gradients.append(torch.autograd.grad(y.square().sum(), list(second.parameters())))
    for mine, other in zip(*gradients, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("which", ["image", "weight", "convolved"])
def test_a_change_after_the_forward_pass_raises(which: str) -> None:
    first, norm, second, x = layers()
    with recompute_activations():
        convolved = first(x)
        y = second(norm(convolved))
    changed = {"image": x, "weight": second.weight, "convolved": convolved}[which]
    with torch.no_grad():
        changed.add_(1)
    with pytest.raises(RuntimeError, match="modified in place"):
        y.sum().backward()


def test_blocks_of_two_threads_that_overlap_end_apart() -> None:
    inside, left = threading.Event(), threading.Event()

    def other() -> None:
        with recompute_activations():
            inside.set()
            left.wait(10)

    thread = threading.Thread(target=other)
    with recompute_activations():
        thread.start()
        inside.wait(10)
    assert recomputation._block.max_depth == 0
    left.set()
    thread.join()
    assert recomputation._block.max_depth == 0
