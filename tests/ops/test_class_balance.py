"""The weights of the classes, and that they make a rare structure count."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from sslfast import DualContrastiveLoss
from sslfast.methods import find_method
from sslfast.ops.class_balance import class_weights
from sslfast.ops.class_gate import first_running, update_running


def random_batch() -> tuple[list[torch.Tensor], torch.Tensor]:
    """Logits and features of two networks for two labelled and two unlabelled volumes, and labels of three classes."""
    inputs = [torch.randn(4, channels, 5, 6, 4, dtype=torch.float64) for channels in (3, 3, 8, 8)]
    return inputs, torch.randint(-1, 3, (2, 5, 6, 4))


def running(dice: list[float], voxels: list[float]) -> torch.Tensor:
    nothing = torch.zeros(len(dice))
    return update_running(None, torch.tensor(dice), nothing, nothing, torch.tensor(voxels))


def test_rare_classes_weigh_more_for_one_network_and_difficult_ones_for_the_other() -> None:
    rare, difficult = class_weights(running([-1, 0.75, 0.0], [1000, 10, 100])).tolist()
    assert rare == pytest.approx([math.log(2), math.log(101), math.log(11)])
    assert difficult == pytest.approx([0.75, 0.5, 1.0])


def test_a_class_that_no_label_has_had_counts_as_one_voxel_and_as_unlearned() -> None:
    rare, difficult = class_weights(running([-1, 0.75, -1], [1000, 10, 0])).tolist()
    assert rare[2] == pytest.approx(math.log(1001))
    assert difficult == pytest.approx([0.75, 0.5, 1.0])


def test_before_the_first_step_all_classes_are_alike() -> None:
    weights = class_weights(first_running(torch.zeros(5)))
    assert (weights == weights[:, :1]).all()


def test_voxels_are_counted_over_all_steps_but_those_that_are_not_finite() -> None:
    now = running([-1, 0.5, 0.5], [10, 2, 3])
    assert update_running(now, now[0], now[1], now[2], torch.tensor([5.0, 0, 1]))[3].tolist() == [15, 2, 4]
    broken = torch.tensor([-1, torch.nan, 0.5])
    assert update_running(now, broken, now[1], now[2], torch.tensor([5.0, 0, 1]))[3].tolist() == [10, 2, 3]


def test_the_loss_weights_classes_from_the_second_step_on() -> None:
    inputs, labels = random_batch()
    labels[labels == 2] = 0
    labels[0, 0, 0, 0] = 2  # one voxel
    for z in inputs[:2]:
        z[:2, 1] += 8 * (labels == 1)  # learned, and rarer than the background
    criterion = DualContrastiveLoss(3)
    ce = [criterion(*inputs, labels).terms["ce"] for _ in range(2)]
    assert criterion.running[3].tolist() == [2 * int((labels == c).sum()) for c in range(3)]
    known = [z[: len(labels)].detach() for z in inputs[:2]]
    plain = [F.cross_entropy(z, labels, ignore_index=-1) for z in known]
    assert ce[0].tolist() == pytest.approx([float(x) for x in plain], rel=1e-9)
    once = criterion.running.clone()
    once[3] /= 2
    expected = [F.cross_entropy(z, labels, w.to(z.dtype), ignore_index=-1) for z, w in zip(known, class_weights(once))]
    assert ce[1].tolist() == pytest.approx([float(x) for x in expected], rel=1e-6)
    assert ce[1][0] < 0.99 * ce[0][0]  # weighted by rarity
    assert ce[1][1] > 1.01 * ce[0][1]  # weighted by difficulty


@pytest.mark.parametrize("options", [{"class_balance": False}, {"preset": "paper"}])
def test_without_balance_the_cross_entropy_is_the_mean(options: dict[str, object]) -> None:
    inputs, labels = random_batch()
    criterion = DualContrastiveLoss(3, **options)
    ce = [criterion(*inputs, labels).terms["ce"].tolist() for _ in range(2)]
    assert ce[0] == ce[1]


def test_two_classes_are_not_weighted() -> None:
    assert not DualContrastiveLoss(2, class_balance=True).options.class_balance
    method = find_method("supervised")
    assert not method(2, 10, 1, method.Options()).balanced
    assert method(3, 10, 1, method.Options()).balanced


def test_supervised_keeps_its_averages_in_its_state() -> None:
    inputs, labels = random_batch()

    class Known(torch.nn.Module):
        def __init__(self, logits: torch.Tensor) -> None:
            super().__init__()
            self.logits = logits

        def forward(self, images: torch.Tensor, linear: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
            return self.logits[: len(images)], images

    method = find_method("supervised")
    one, other = (method(3, 10, 1, method.Options()) for _ in range(2))
    networks = [Known(z.detach()) for z in inputs[:2]]
    one.step(*networks, inputs[2], labels, 0)
    other.load_state_dict(one.state_dict())
    first, second = (m.step(*networks, inputs[2], labels, 1) for m in (one, other))
    assert float(first.loss_a) == float(second.loss_a)
    assert one.running[3].sum() == 2 * labels.numel() - 2 * int((labels < 0).sum())
