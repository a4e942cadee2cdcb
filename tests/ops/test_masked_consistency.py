"""What a student learns from a teacher: the squared error to its sharpened probabilities, against plain formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from helpers.compare import with_gradients
from helpers.maps import limit_between, random_map
from helpers.options import kernels_and_reference, on_every_backend
from sslfast.ops import masked_consistency
from sslfast.ops.backend import backend

pytestmark = on_every_backend
SIZE = (4, 5, 6)


@kernels_and_reference()
def test_losses_are_those_of_the_formulas(name: str) -> None:
    student, teacher = random_map(2, 3, SIZE), random_map(2, 3, SIZE)
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


def test_gradients_are_those_of_finite_differences() -> None:
    a, b = (2 * torch.randn(2, 3, 3, 2, 2, dtype=torch.float64) for _ in range(2))
    a.requires_grad_()
    with backend("reference"):
        assert torch.autograd.gradcheck(lambda a: masked_consistency(a, b, temperature=0.5, max_entropy=0.9).loss, (a,))


@pytest.mark.parametrize("volumes", [0, 2])
@kernels_and_reference()
def test_no_certain_voxel_gives_zero_attached_to_the_graph(name: str, volumes: int) -> None:
    a, b = (torch.randn(volumes, 2, 3, 3, 3, requires_grad=True) for _ in range(2))
    with backend(name):
        loss = masked_consistency(a, b, max_entropy=0.0).loss
        assert loss.item() == 0
        loss.backward()
    assert not a.grad.any()
    assert b.grad is None


@kernels_and_reference()
def test_an_entropy_of_exactly_the_limit_is_not_certain(name: str) -> None:
    student, teacher = random_map(1, 3, SIZE), torch.zeros(1, 3, *SIZE)
    teacher[:, 1] = 1000  # an entropy of 0
    with backend(name):
        certain = [masked_consistency(student, teacher, max_entropy=limit).certain_voxels for limit in (0.0, 1e-6)]
        gradients = [
            with_gradients(
                lambda s, t, limit=limit: [masked_consistency(s, t, max_entropy=limit).loss], student, teacher
            )[1]
            for limit in (0.0, 1e-6)
        ]
    assert certain == [0, 120]
    assert [bool(gradient.any()) for gradient in gradients] == [False, True]


@kernels_and_reference()
def test_huge_logits_stay_finite(name: str) -> None:
    a, b = (1e4 * torch.randn(2, 3, *SIZE).sign() for _ in range(2))
    with backend(name):
        result = with_gradients(lambda a, b: list(masked_consistency(a, b, temperature=0.5, max_entropy=0.5)), a, b)
    assert all(torch.isfinite(t).all() for t in result)


@pytest.mark.parametrize(("of", "max_entropy"), [("student", math.inf), ("teacher", 0.5)])
@kernels_and_reference()
def test_a_nan_of_student_or_teacher_makes_the_loss_nan(name: str, of: str, max_entropy: float) -> None:
    student, teacher = (1e4 * torch.randn(2, 3, *SIZE).sign() for _ in range(2))
    (student if of == "student" else teacher)[0, 0, 0, 0, 0] = float("nan")
    with backend(name):
        assert masked_consistency(student, teacher, max_entropy=max_entropy).loss.isnan()


def test_refusals_name_the_argument() -> None:
    a, b = random_map(2, 3, SIZE), random_map(2, 3, SIZE)
    with pytest.raises(ValueError, match="teacher has shape"):
        masked_consistency(a, b[:, :, 1:])
    with pytest.raises(ValueError, match="temperature is 0"):
        masked_consistency(a, b, temperature=0)
