"""Uncertainty-aware mean teacher."""

from __future__ import annotations

import torch

from helpers.methods import SIZE, Given
from sslfast.methods.ua_mt import UAMT


def test_uncertain_voxels_of_the_teacher_teach_nothing() -> None:
    method = UAMT(2, 10**7, 1, UAMT.Options())
    students = Given(2), Given(2)
    method.prepare(Given(2), Given(2))
    with torch.no_grad():
        for teacher in method.teachers:
            teacher.logits.zero_()
            teacher.logits[:, 0, 0] = 9
    labels = torch.full((2, *SIZE), -1)
    method.step(*students, torch.zeros(4, 1, *SIZE), labels, step=1000).loss.backward()  # 1 % of the students
    for student in students:
        assert student.logits.grad[2:, :, 0].all()
        assert not student.logits.grad[2:, :, 1:].any()
