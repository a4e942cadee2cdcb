"""The pseudo-label losses against plain formulas on the reliable voxels alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sslfast.ops import pseudo_supervised
from sslfast.ops.flags import RELIABLE


def random_case(classes: int, size: tuple[int, ...] = (3, 5, 2)) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = (2 * torch.randn(2, classes, *size, dtype=torch.float64)).requires_grad_()
    label = torch.randint(0, classes, (2, *size))
    reliable = torch.rand(2, *size) < 0.6
    return logits, label, reliable, (label + RELIABLE * reliable).to(torch.uint8)


@pytest.mark.parametrize("classes", [2, 4, 14, 32])
def test_losses_are_cross_entropy_and_dice_of_the_reliable_voxels(classes: int) -> None:
    logits, label, reliable, flags = random_case(classes)
    result = pseudo_supervised(logits, flags)
    assert int(result.reliable_voxels) == reliable.sum()
    rows, label = logits.movedim(1, -1)[reliable], label[reliable]
    p, y = rows.softmax(1), F.one_hot(label, classes).double()
    dice = (2 * (p * y).sum(0) + 1e-5) / (p.square().sum(0) + y.sum(0) + 1e-5)
    assert result.ce.item() == pytest.approx(F.cross_entropy(rows, label).item(), rel=1e-12)
    assert result.dice.item() == pytest.approx(1 - dice[1:].mean().item(), rel=1e-12)


@pytest.mark.parametrize("loss", ["ce", "dice"])
def test_the_gradient_of_each_loss_is_that_of_finite_differences(loss: str) -> None:
    logits, _, _, flags = random_case(3)
    assert torch.autograd.gradcheck(lambda z: getattr(pseudo_supervised(z, flags), loss), (logits,))


@pytest.mark.parametrize("volumes", [0, 2])
def test_no_reliable_voxel_gives_zero_attached_to_the_graph(volumes: int) -> None:
    logits, _, _, flags = random_case(2)
    result = pseudo_supervised(logits[:volumes], flags[:volumes] & ~RELIABLE)
    assert result.ce.item() == result.dice.item() == 0
    (result.ce + result.dice).backward()
    assert not logits.grad.any()


def test_refusals_name_the_argument() -> None:
    logits, label, _, flags = random_case(2)
    with pytest.raises(TypeError, match=r"flags has dtype torch.int64; it must be uint8"):
        pseudo_supervised(logits, label)
    with pytest.raises(ValueError, match="flags has shape"):
        pseudo_supervised(logits, flags[:1])
