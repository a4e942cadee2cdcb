"""Mean teacher: teachers that average their students."""

from __future__ import annotations

import torch

from helpers.methods import SIZE, Given
from sslfast.methods.mean_teacher import MeanTeacher


def test_teachers_are_the_average_of_the_students_and_nobody_trains_them() -> None:
    students = Given(2), Given(2)
    method = MeanTeacher(2, 10, 1, MeanTeacher.Options())
    method.prepare(*students)
    before = [p.clone() for p in students[0].parameters()]
    with torch.no_grad():
        for p in students[0].parameters():
            p += 1
    method.step(*students, torch.zeros(4, 1, *SIZE), torch.zeros(2, *SIZE, dtype=torch.int64), step=1).loss.backward()
    for average, old in zip(method.teachers[0].parameters(), before):
        torch.testing.assert_close(average, old + 0.5)  # the second step: half of each
        assert average.grad is None
