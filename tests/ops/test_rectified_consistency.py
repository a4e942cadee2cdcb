"""What a student learns from a teacher: the consistency ops against plain formulas. Kernels against references: test_backends.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from test_backends import (
    BACKEND,
    fused,  # noqa: F401
    limit_between,
    random_flags,
    random_map,
    with_gradients,
)
from torch import Tensor

from sslfast.ops import masked_consistency, rectified_consistency
from sslfast.ops.backend import backend
from sslfast.ops.flags import is_reliable

SIZE = (4, 5, 6)


class Formulas(NamedTuple):
    """Of a student."""

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


def rectified(flags: Tensor) -> Callable[..., list[Tensor]]:
    return lambda a, b: list(rectified_consistency(a, b, flags))


def masked(max_entropy: float = math.inf) -> Callable[..., list[Tensor]]:
    return lambda a, b: list(masked_consistency(a, b, temperature=0.5, max_entropy=max_entropy))


def pair() -> tuple[Tensor, Tensor, Tensor]:
    return random_map(2, 3, SIZE), random_map(2, 3, SIZE), random_flags(2, 3, SIZE)


@pytest.mark.parametrize("name", [BACKEND, "reference"])
def test_rectified_by_hand(name: str) -> None:
    a, b, flags = pair()
    with backend(name):
        found = rectified_consistency(a, b, flags)
    for ours, expected in zip(found, by_hand(a.double(), b.double(), flags)):
        assert float(ours) == pytest.approx(float(expected), rel=1e-5)
    assert found.taught_voxels == is_reliable(flags).count_nonzero()


@pytest.mark.parametrize("name", [BACKEND, "reference"])
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


@pytest.mark.parametrize("name", [BACKEND, "reference"])
def test_masked_by_hand(name: str) -> None:
    student, teacher, _ = pair()
    limit = limit_between(teacher)
    with backend(name):
        everywhere = masked_consistency(student, teacher)
        sharp = masked_consistency(student, teacher, temperature=0.1)
        certain = masked_consistency(student, teacher, max_entropy=limit)
    p, q = student.softmax(1), teacher.softmax(1)
    assert float(everywhere.loss) == pytest.approx(float(F.mse_loss(p, q)), rel=1e-5)
    powers = q**10
    assert float(sharp.loss) == pytest.approx(float(F.mse_loss(p, powers / powers.sum(1, keepdim=True))), rel=1e-4)
    kept = torch.special.entr(q).sum(1) < limit
    assert int(certain.certain_voxels) == kept.count_nonzero()
    assert float(certain.loss) == pytest.approx(float((p - q).square().mean(1)[kept].mean()), rel=1e-5)


def test_gradcheck() -> None:
    a, b = (2 * torch.randn(2, 3, 3, 2, 2, dtype=torch.float64) for _ in range(2))
    flags = random_flags(2, 3, (3, 2, 2))
    a.requires_grad_()
    with backend("reference"):
        assert torch.autograd.gradcheck(lambda a: rectified_consistency(a, b, flags)[:3], (a,))
        assert torch.autograd.gradcheck(lambda a: masked_consistency(a, b, temperature=0.5, max_entropy=0.9).loss, (a,))


@pytest.mark.parametrize("name", [BACKEND, "reference"])
def test_no_voxel_gives_zero_attached(name: str) -> None:
    with backend(name):
        for volumes in (0, 2):
            a, b = (torch.randn(volumes, 2, 3, 3, 3, requires_grad=True) for _ in range(2))
            found = rectified_consistency(a, b, torch.zeros(volumes, 3, 3, 3, dtype=torch.uint8))
            nobody = masked_consistency(a, b, max_entropy=0.0)
            assert found.rectified.item() == nobody.loss.item() == 0
            assert volumes or found.cosine.item() == found.dice.item() == 0
            (found.rectified + nobody.loss).backward()
            assert not a.grad.any()
            assert b.grad is None


@pytest.mark.parametrize("name", [BACKEND, "reference"])
def test_huge_logits_stay_finite_and_nan_is_heard(name: str) -> None:
    a, b = (1e4 * torch.randn(2, 3, *SIZE).sign() for _ in range(2))
    flags = random_flags(2, 3, SIZE)
    with backend(name):
        found = with_gradients(rectified(flags), a, b) + with_gradients(masked(0.5), a, b)
        assert all(torch.isfinite(t).all() for t in found)
        a[0, 0, 0, 0, 0] = float("nan")
        for student, teacher in ((a, b), (b, a)):
            assert masked_consistency(student, teacher, max_entropy=math.inf if student is a else 0.5).loss.isnan()
            assert rectified_consistency(student, teacher, flags).cosine.isnan()
            assert rectified_consistency(student, teacher, flags).dice.isnan()


def test_runs_and_threads_give_the_same_bits() -> None:
    a, b, flags = random_map(2, 3, (33, 20, 40)), random_map(2, 3, (33, 20, 40)), random_flags(2, 3, (33, 20, 40))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(with_gradients(rectified(flags), a, b) + with_gradients(masked(0.7), a, b))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *found))


def test_compiles_to_one_graph() -> None:
    a, b, flags = pair()

    def losses(a: Tensor, b: Tensor) -> list[Tensor]:
        found = rectified_consistency(a, b, flags)
        return [found.rectified + found.dice + masked_consistency(a, b).loss]

    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    for ours, plain in zip(with_gradients(compiled, a, b), with_gradients(losses, a, b)):
        torch.testing.assert_close(ours, plain)


def test_refusals_name_the_argument() -> None:
    a, b, flags = pair()
    with pytest.raises(TypeError, match=r"flags has dtype torch\.int64"):
        rectified_consistency(a, b, flags.long())
    with pytest.raises(ValueError, match="flags has shape"):
        rectified_consistency(a, b, flags[:1])
    with pytest.raises(ValueError, match="teacher has shape"):
        masked_consistency(a, b[:, :, 1:])
    with pytest.raises(ValueError, match="temperature is 0"):
        masked_consistency(a, b, temperature=0)
