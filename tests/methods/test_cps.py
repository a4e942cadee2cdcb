"""Cross pseudo supervision."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.methods import SIZE, Given, step


def test_the_loss_is_the_cross_entropy_against_the_other_network() -> None:
    networks = [Given(3), Given(3)]
    result = step("cps", 3, torch.zeros(2, *SIZE, dtype=torch.int64), networks)
    a, b = (network.logits.detach()[2:] for network in networks)
    expected = [nn.functional.cross_entropy(a, b.argmax(1)), nn.functional.cross_entropy(b, a.argmax(1))]
    assert result.terms["pseudo"].tolist() == pytest.approx([float(e) for e in expected], rel=1e-5)
