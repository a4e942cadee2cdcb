"""Mean teacher, and the methods built on it: teachers that average their students."""

from __future__ import annotations

import pytest
import torch

from helpers.methods import SIZE, Given, make_method
from sslfast.methods.mean_teacher import WithTeachers


@pytest.mark.parametrize("name", ["mean-teacher", "ua-mt", "u2pl"])
def test_teachers_are_the_average_of_the_students_and_nobody_trains_them(name: str) -> None:
    students = Given(2), Given(2)
    method = make_method(name, 2, 10, 1)
    assert isinstance(method, WithTeachers)
    method.prepare(*students)
    averages = [p.detach().clone() for p in students[0].parameters()]
    labels = torch.zeros(2, *SIZE, dtype=torch.int64)
    for step, decay in ((0, 0), (1, 1 / 2), (2, 2 / 3), (98, 98 / 99), (500, 0.99)):
        with torch.no_grad():
            for p in students[0].parameters():
                p += torch.randn_like(p)
        method.step(*students, torch.zeros(4, 1, *SIZE), labels, step=step).loss.backward()
        averages = [decay * old + (1 - decay) * p.detach() for old, p in zip(averages, students[0].parameters())]
        for teacher, average in zip(method.teachers[0].parameters(), averages, strict=True):
            torch.testing.assert_close(teacher.detach(), average)
            assert teacher.grad is None
