"""The running averages of the gate, step by step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sslfast.ops.class_gate import CHOSEN, DICE, SQUARE, VOXELS, update_running


def measured(*absent: int) -> list[Tensor]:
    """Dice, chosen voxels, squares and labelled voxels of four classes in a step; -1 is the Dice of the absent ones."""
    dice, chosen, square, voxels = torch.rand(4), 100 * torch.rand(4), 100 * torch.rand(4), torch.randint(1, 99, (4,))
    for c in (0, *absent):
        dice[c] = -1
    return [dice, chosen, square, voxels]


def test_averages_of_several_steps_weigh_the_last_by_a_tenth() -> None:
    steps = [measured(2), measured(), measured(1), measured(2), measured()]
    running = None
    for step in steps:
        running = update_running(running, *step)
    assert running is not None
    for c in range(4):
        dice = -1.0
        for now in (float(step[DICE][c]) for step in steps):
            if now >= 0:
                dice = now if dice < 0 else 0.9 * dice + 0.1 * now
        assert float(running[DICE, c]) == pytest.approx(dice, rel=1e-5)
        for row in (CHOSEN, SQUARE):
            weighted = sum(0.9 ** (4 - i) * 0.1 * float(step[row][c]) for i, step in enumerate(steps))
            assert float(running[row, c]) == pytest.approx(weighted, rel=1e-5)
        assert running[VOXELS, c] == sum(int(step[VOXELS][c]) for step in steps)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("row", [DICE, SQUARE])
def test_a_step_that_is_not_finite_leaves_all_averages_alone(row: int, bad: float) -> None:
    before = update_running(update_running(None, *measured(2)), *measured())
    broken = measured()
    broken[row][3] = bad
    assert torch.equal(update_running(before, *broken), before)
