"""The gate: what the networks have not learned from labels does not count on unlabelled volumes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sslfast.losses import DualContrastiveLoss
from sslfast.ops.class_gate import DICE

SIZE = (4, 6, 5)


def random_batch() -> tuple[list[Tensor], Tensor]:
    """Logits and features of both networks on two labelled and two unlabelled volumes, and labels."""
    maps = [2 * torch.randn(4, channels, *SIZE, dtype=torch.float64) for channels in (3, 3, 6, 6)]
    return maps, torch.randint(0, 3, (2, *SIZE))


def agreeing_batch(dice: float) -> tuple[list[Tensor], Tensor]:
    """Networks whose soft Dice of class 1 is near `dice`, and of class 2 near 1; class 0 elsewhere."""
    inputs = [t.detach() for t in random_batch()[0]]
    labels = torch.zeros(2, *inputs[0].shape[2:], dtype=torch.long)
    labels[:, 0], labels[:, 1] = 1, 2
    for logits in inputs[:2]:
        sure = 20 * torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).to(logits)
        found = dice / (2 - dice)  # the share of class 1 that is found, without a false voxel
        missed = torch.rand(labels.shape) > found
        sure[:, 0][(labels == 1) & missed] = 40
        logits[:2] = sure
    return inputs, labels


def test_a_class_that_is_not_learned_yet_does_not_count_on_unlabelled_voxels() -> None:
    inputs, labels = agreeing_batch(0.0)
    leaves = [t.requires_grad_() for t in inputs]
    criterion = DualContrastiveLoss(3, percentile=50, pseudo_weight=0, contrast_weight=0, ramp_steps=1)
    teacher = torch.randn_like(inputs[0][2:])
    gated = criterion(*leaves, labels, 1, teacher)
    assert gated.terms["gate"].tolist() == [-1, 0, 1]
    student = leaves[0].detach()[2:]
    p, q = student.softmax(1)[:, 2], teacher.softmax(1)[:, 2]
    only_class_2 = (1 - 2 * (p * q).sum() / (p.square().sum() + q.square().sum())) / 2
    assert float(gated.terms["pseudo_dice"][0]) == pytest.approx(float(only_class_2), rel=1e-4)


def test_untrained_networks_learn_nothing_from_unlabelled_voxels() -> None:
    """Else the first guess, which is background nearly everywhere, would be confirmed before there is a better one."""
    inputs, labels = random_batch()
    leaves = [t.detach() for t in inputs]
    for logits in leaves[:2]:
        logits[:2, 0] += 9  # background alone on the labelled volumes
    for leaf in leaves:
        leaf.requires_grad_()
    result = DualContrastiveLoss(3, percentile=50, ramp_steps=1)(*leaves, labels, 1, torch.randn_like(inputs[0][2:]))
    assert result.terms["gate"].tolist() == [-1, 0, 0]
    result.loss.backward()
    assert not any(leaf.grad[2:].any() for leaf in leaves if leaf.grad is not None)


def test_the_gate_follows_the_running_dice_and_remembers_absent_classes() -> None:
    criterion = DualContrastiveLoss(3, percentile=50, gate=(0.2, 0.6), ramp_steps=1)
    inputs, labels = agreeing_batch(0.0)
    criterion(*inputs, labels, 1)
    before = criterion.running.clone()
    assert before[DICE, 0] == -1
    inputs, labels = agreeing_batch(1.0)
    labels[labels == 2] = 0
    gates = [float(criterion(*inputs, labels, 1).terms["gate"][1]) for _ in range(10)]
    assert gates == sorted(gates)
    assert gates[0] == 0
    assert gates[2] == pytest.approx((1 - 0.9**3 - 0.2) / 0.4, abs=0.02)
    assert gates[-1] == 1
    assert criterion.running[DICE, 2] == before[DICE, 2]
    assert criterion.running[DICE, 1] == pytest.approx(1 - 0.9**10, rel=0.05)
    criterion.eval()
    after = criterion.running.clone()
    inputs, labels = agreeing_batch(0.0)
    criterion(*inputs, labels, 1)
    assert torch.equal(criterion.running, after)
    resumed = DualContrastiveLoss(3)
    resumed.load_state_dict(criterion.state_dict())
    assert torch.equal(resumed.running, after)


def test_a_structure_that_the_teacher_only_suspects_does_not_count() -> None:
    """Else Dice with a haze of small probabilities would teach the networks that there is nothing."""
    inputs, labels = agreeing_batch(1.0)
    logits = torch.tensor([3.0, 0.0, 0.0]).view(1, 3, 1, 1, 1).expand(2, -1, *SIZE).double()  # p = 0.91, 0.05, 0.05
    finds_class_1 = logits.clone()
    finds_class_1[:, 1, 0] = 9
    criterion = DualContrastiveLoss(3, percentile=50, ramp_steps=1)
    terms = criterion(*inputs, labels, 1, finds_class_1).terms
    assert terms["found"].tolist() == pytest.approx([1, 1, 0], abs=0.01)
    assert terms["gate"].tolist() == pytest.approx([-1, 1, 0], abs=0.01)
    found = [float(criterion(*inputs, labels, 1, logits).terms["found"][1]) for _ in range(20)]
    assert found == sorted(found, reverse=True)
    assert found[-1] < 1
    assert DualContrastiveLoss(3, gate=(0, 0))(*inputs, labels, 1, logits).terms["gate"].tolist() == [-1, 1, 1]


def test_the_paper_has_no_gate() -> None:
    inputs, labels = agreeing_batch(0.0)
    assert DualContrastiveLoss(3, preset="paper")(*inputs, labels).terms["gate"].tolist() == [-1, 1, 1]


@pytest.mark.parametrize("volume", [0, 3])
def test_a_step_with_infinite_logits_spoils_no_later_step(volume: int) -> None:
    criterion, other = (DualContrastiveLoss(3, percentile=50, ramp_steps=1) for _ in range(2))
    inputs, labels = random_batch()
    assert criterion(*inputs, labels, 1).loss == other(*inputs, labels, 1).loss
    broken, other_labels = random_batch()
    broken[0][volume, 1, 0, 0, 0] = torch.inf
    assert not criterion(*broken, other_labels, 1).loss.isfinite()
    assert torch.equal(criterion.running, other.running)
    assert criterion(*inputs, labels, 1).loss == other(*inputs, labels, 1).loss


def test_a_class_that_no_label_has_does_not_hold_back_the_others() -> None:
    inputs, labels = agreeing_batch(1.0)
    wider = [torch.cat((t, torch.full_like(t[:, :1], -9)), 1) for t in inputs[:2]] + inputs[2:]
    of_three, of_four = (
        DualContrastiveLoss(c, percentile=50, pseudo_dice_weight=0, contrast_weight=0, ramp_steps=1)(*maps, labels, 1)
        for c, maps in ((3, inputs), (4, wider))
    )
    assert of_four.terms["gate"].tolist() == [-1, 1, 1, -1]
    unlabelled = [r.loss_a - r.terms["ce"][0] - r.terms["dice"][0] for r in (of_three, of_four)]
    supervised_part = 0.5 * of_three.terms["discrepancy"][0]
    assert float(unlabelled[0] - supervised_part) == pytest.approx(float(of_three.terms["pseudo"][0]), rel=1e-6)
    assert float(of_four.terms["pseudo"][0]) == pytest.approx(float(of_three.terms["pseudo"][0]), rel=1e-2)


@pytest.mark.parametrize(("gate", "error"), [(0.5, TypeError), ((0.1, 0.2, 0.3), ValueError)])
def test_a_gate_that_is_no_pair_is_refused(gate: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"gate is .*; it must be a pair \(low, high\)"):
        DualContrastiveLoss(2, gate=gate)
