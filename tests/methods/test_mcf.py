"""Mutual correction: one network teaches, the other learns."""

from __future__ import annotations

import torch

from helpers.methods import SIZE, Given, step


def test_only_the_worse_network_learns_from_unlabelled_volumes() -> None:
    networks = [Given(2), Given(2)]
    result = step("mcf", 2, torch.randint(0, 2, (2, *SIZE)), networks)
    result.loss.backward()
    winner = int(result.terms["winner"])
    assert not networks[winner].logits.grad[2:].any()
    assert networks[1 - winner].logits.grad[2:].any()
