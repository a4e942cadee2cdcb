"""Bidirectional copy-paste: mixed volumes and their labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from helpers.methods import SIZE, Given
from sslfast.methods.bcp import BCP, box, largest_components


def test_volumes_are_mixed_within_a_box_of_two_thirds_of_each_axis() -> None:
    inside = box(torch.Size((9, 12, 6)), torch.device("cpu"))
    assert int(inside.sum()) == 6 * 8 * 4


def test_a_guess_keeps_the_largest_component_of_each_class() -> None:
    classes = np.zeros((8, 8, 8), np.int64)
    classes[:3, :3, :3], classes[6, 6, 6], classes[5:8, :2, :2] = 1, 1, 2
    kept = largest_components(classes)
    assert kept[6, 6, 6] == 0
    classes[6, 6, 6] = 0
    assert np.array_equal(kept, classes)


def test_labelled_voxels_learn_their_label_and_others_a_guess() -> None:
    networks = [Given(2), Given(2)]
    method = BCP(2, 10, 1, BCP.Options())
    method.prepare(Given(2), Given(2))
    images = torch.cat((torch.ones(2, 1, *SIZE), -torch.ones(2, 1, *SIZE)))
    labels = torch.zeros(2, *SIZE, dtype=torch.int64)
    result = method.step(*networks, images, labels, step=5)
    known = networks[0].shown[-1][0][:, 0] > 0
    assert {int(k.sum()) for k in known} == {4 * 5 * 5, 6 * 7 * 8 - 4 * 5 * 5}
    result.loss.backward()
    logits = networks[0].logits.detach()[:2]
    ce = nn.functional.cross_entropy(logits, torch.where(known, 0, -1), ignore_index=-1)
    assert float(result.terms["ce"][0]) == pytest.approx(float(ce), rel=1e-5)
    assert result.terms["class_dice"].shape == (2,)
    a = result.terms["ce"][0] + result.terms["dice"][0] + 0.5 * result.terms["pseudo"][0]
    assert float(result.loss_a.detach()) == pytest.approx(float(a) / 2, rel=1e-6)
    before = method.step(*networks, images, labels, step=0)  # labelled crops alone
    assert not before.terms["pseudo"].any()
    assert (networks[0].shown[-1][0] > 0).all()
