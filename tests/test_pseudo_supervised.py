"""The pseudo-label losses against plain formulas on the reliable voxels alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sslfast.ops import pseudo_supervised
from sslfast.ops.state import RELIABLE


def random_case(classes: int, size: tuple[int, ...] = (3, 5, 2)):
    a, b = (2 * torch.randn(2, classes, *size, dtype=torch.float64) for _ in range(2))
    label = torch.randint(0, classes, (2, *size))
    reliable = torch.rand(2, *size) < 0.6
    return a, b, label, reliable, (label + RELIABLE * reliable).to(torch.uint8)


@pytest.mark.parametrize("classes", [2, 4, 14, 32])
def test_equals_cross_entropy_of_the_reliable_voxels(classes: int) -> None:
    a, b, label, reliable, state = random_case(classes)
    result = pseudo_supervised(a, b, state)
    assert int(result.reliable_voxels) == reliable.sum()
    for ours, logits in zip(result.ce, (a, b)):
        expected = F.cross_entropy(logits.movedim(1, -1)[reliable], label[reliable])
        assert ours.item() == pytest.approx(expected.item(), rel=1e-12)


def test_each_network_learns_the_others_class() -> None:
    a, b, _, reliable, state = random_case(3)
    result = pseudo_supervised(a, b, state, target="other")
    expected = F.cross_entropy(a.movedim(1, -1)[reliable], b.argmax(1)[reliable])
    assert result.ce[0].item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("target", ["state", "other"])
def test_equals_dice_of_the_reliable_voxels(target: str) -> None:
    a, b, label, reliable, state = random_case(4)
    result = pseudo_supervised(a, b, state, target=target)
    for ours, logits, other in zip(result.dice, (a, b), (b, a)):
        taught = (label if target == "state" else other.argmax(1))[reliable]
        p, y = logits.softmax(1).movedim(1, -1)[reliable], F.one_hot(taught, 4).double()
        dice = (2 * (p * y).sum(0) + 1e-5) / (p.square().sum(0) + y.sum(0) + 1e-5)
        assert ours.item() == pytest.approx(1 - dice[1:].mean().item(), rel=1e-12)


@pytest.mark.parametrize("term", ["ce", "dice"])
def test_gradcheck(term: str) -> None:
    a, b, _, _, state = random_case(3)
    a.requires_grad_()
    b.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: getattr(pseudo_supervised(a, b, state), term), (a, b))


def test_no_reliable_voxel_gives_zero_attached() -> None:
    a, b, _, _, state = random_case(2)
    a.requires_grad_()
    b.requires_grad_()
    result = pseudo_supervised(a, b, state & ~RELIABLE)
    assert result.ce.tolist() == result.dice.tolist() == [0, 0]
    (result.ce + result.dice).sum().backward()
    assert not a.grad.any()
    assert not b.grad.any()


def test_no_unlabelled_volume() -> None:
    a = torch.zeros(0, 2, 3, 3, 3, requires_grad=True)
    result = pseudo_supervised(a, a, torch.zeros(0, 3, 3, 3, dtype=torch.uint8))
    assert result.ce.tolist() == result.dice.tolist() == [0, 0]
    (result.ce + result.dice).sum().backward()


def test_refusals_name_the_argument() -> None:
    a, b, label, _, state = random_case(2)
    with pytest.raises(TypeError, match=r"state has dtype torch.int64; it must be uint8"):
        pseudo_supervised(a, b, label)
    with pytest.raises(ValueError, match="state has shape"):
        pseudo_supervised(a, b, state[:1])
    with pytest.raises(ValueError, match="target is 'both'"):
        pseudo_supervised(a, b, state, target="both")
