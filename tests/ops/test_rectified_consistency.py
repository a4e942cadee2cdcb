"""What a student learns from a teacher: the rectified pseudo-label loss, cosine and Dice, against plain formulas."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.compare import Compute, with_gradients
from helpers.maps import random_flags, random_map
from helpers.options import kernels_and_reference, on_every_backend
from sslfast.ops import rectified_consistency
from sslfast.ops.backend import backend
from sslfast.ops.flags import is_reliable

pytestmark = on_every_backend
SIZE = (4, 5, 6)


class Formulas(NamedTuple):
    """Losses of a student, by their formulas."""

    rectified: Tensor
    cosine: Tensor
    dice: Tensor


def by_hand(student: Tensor, teacher: Tensor, flags: Tensor) -> Formulas:
    """The terms in torch's own functions."""
    sure = is_reliable(flags)
    rows, targets = (t.movedim(1, -1)[sure] for t in (student, teacher))
    kl = F.kl_div(rows.log_softmax(1), targets.log_softmax(1), reduction="none", log_target=True).sum(1)
    ce = F.cross_entropy(rows, targets.argmax(1), reduction="none")
    p, q = (t.softmax(1).movedim(1, -1).flatten(0, -2) for t in (student, teacher))
    cosine = 1 - (p * q).sum(1) / (p.norm(dim=1) * q.norm(dim=1))
    dice = (2 * (p * q).sum(0) + 1e-5) / (p.square().sum(0) + q.square().sum(0) + 1e-5)
    return Formulas(((-kl).exp() * ce + kl).mean(), cosine.mean(), 1 - dice[1:].mean())


def rectified(flags: Tensor) -> Compute:
    return lambda a, b: list(rectified_consistency(a, b, flags))


def pair() -> tuple[Tensor, Tensor, Tensor]:
    return random_map(2, 3, SIZE), random_map(2, 3, SIZE), random_flags(2, 3, SIZE)


@kernels_and_reference()
def test_losses_are_those_of_the_formulas(name: str) -> None:
    a, b, flags = pair()
    with backend(name):
        result = rectified_consistency(a, b, flags)
    for ours, expected in zip(result, by_hand(a.double(), b.double(), flags)):
        assert float(ours) == pytest.approx(float(expected), rel=1e-5)
    assert result.reliable_voxels == is_reliable(flags).count_nonzero()


@kernels_and_reference()
def test_two_networks_teach_each_other_in_two_calls(name: str) -> None:
    """Cosine and Dice are the same in both; each network has the gradient of its own call, and the teacher none."""
    a, b, flags_a = pair()
    flags_b = random_flags(2, 3, SIZE)
    with backend(name):
        to_a, to_b = with_gradients(rectified(flags_b), a, b), with_gradients(rectified(flags_a), b, a)
    torch.testing.assert_close(to_a[1:3], to_b[1:3])
    for (*_, grad, of_teacher), student, teacher, flags in ((to_a, a, b, flags_b), (to_b, b, a, flags_a)):
        leaf = student.double().requires_grad_()
        (expected,) = torch.autograd.grad(sum(by_hand(leaf, teacher.double(), flags)), leaf)
        torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-6)
        assert not of_teacher.any()


def test_gradients_are_those_of_finite_differences() -> None:
    a, b = (2 * torch.randn(2, 3, 3, 2, 2, dtype=torch.float64) for _ in range(2))
    flags = random_flags(2, 3, (3, 2, 2))
    with backend("reference"):
        assert torch.autograd.gradcheck(lambda a: rectified_consistency(a, b, flags)[:3], (a.requires_grad_(),))


@pytest.mark.parametrize("volumes", [0, 2])
@kernels_and_reference()
def test_no_reliable_voxel_gives_zero_attached_to_the_graph(name: str, volumes: int) -> None:
    a, b = (torch.randn(volumes, 2, 3, 3, 3, requires_grad=True) for _ in range(2))
    with backend(name):
        result = rectified_consistency(a, b, torch.zeros(volumes, 3, 3, 3, dtype=torch.uint8))
        assert result.rectified.item() == 0
        assert volumes or result.cosine.item() == result.dice.item() == 0
        result.rectified.backward()
    assert not a.grad.any()
    assert b.grad is None


@kernels_and_reference()
def test_huge_logits_stay_finite(name: str) -> None:
    a, b = (1e4 * torch.randn(2, 3, *SIZE).sign() for _ in range(2))
    with backend(name):
        result = with_gradients(rectified(random_flags(2, 3, SIZE)), a, b)
    assert all(torch.isfinite(t).all() for t in result)


@kernels_and_reference()
def test_a_nan_of_student_or_teacher_makes_the_losses_nan(name: str) -> None:
    a, b, flags = pair()
    a[0, 0, 0, 0, 0] = float("nan")
    with backend(name):
        for student, teacher in ((a, b), (b, a)):
            assert rectified_consistency(student, teacher, flags).cosine.isnan()
            assert rectified_consistency(student, teacher, flags).dice.isnan()


def test_refusals_name_the_argument() -> None:
    a, b, flags = pair()
    with pytest.raises(TypeError, match=r"flags has dtype torch\.int64"):
        rectified_consistency(a, b, flags.long())
    with pytest.raises(ValueError, match="flags has shape"):
        rectified_consistency(a, b, flags[:1])
