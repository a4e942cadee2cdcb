"""U2PL: its memory of negatives and its contrastive loss."""

from __future__ import annotations

import torch

from helpers.methods import SIZE, Given
from sslfast.methods.u2pl import U2PL, Memory


def test_the_memory_keeps_the_newest_negatives() -> None:
    memory = Memory(2, 3, 30_000)
    assert not memory.draw(4)[1].any()
    rows = torch.arange(512.0).view(-1, 1).expand(-1, 3)
    for i in range(100):
        memory.add(1, rows + 512 * i, torch.tensor(400))
    assert memory.written.tolist() == [0, 40_000]
    stored = memory.rows[1, :30_000, 0]
    kept = torch.cat([rows[:400, 0] + 512 * i for i in range(25, 100)])
    assert torch.equal(stored.sort().values, kept)
    drawn, filled = memory.draw(4)
    assert filled.tolist() == [False, True]
    assert drawn.shape == (2, 4, 50, 3)
    assert torch.isin(drawn[1, ..., 0], kept).all()


def test_without_a_memory_there_are_the_negatives_of_the_step_alone() -> None:
    memory = Memory(2, 3, 0)
    for i, count in enumerate((100, 50)):
        memory.add(1, torch.full((512, 3), float(i)), torch.tensor(count))
    drawn, _ = memory.draw(4)
    assert (drawn[1] == 1).all()


def test_anchors_of_labelled_and_unlabelled_volumes_are_pulled_to_their_class_and_from_the_memory() -> None:
    method = U2PL(2, 10, 1, U2PL.Options())
    networks = [Given(2), Given(2)]
    method.prepare(*networks)
    labels = torch.randint(0, 2, (2, *SIZE))
    images = torch.zeros(4, 1, *SIZE)
    for step in range(2):
        result = method.step(*networks, images, labels, step)
    assert all(result.terms["contrast"] > 0)
    assert all(int(written) > 0 for memory in method.memories for written in memory.written)
    result.loss.backward()
    for network in networks:
        assert network.features.grad.isfinite().all()
        assert network.features.grad[:2].any()
        assert network.features.grad[2:].any()
