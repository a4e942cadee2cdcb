"""The default method: its views, its presets, and what it adds to dual-networks."""

from __future__ import annotations

import pytest
import torch

from helpers.methods import SIZE, Given, step
from sslfast.methods.ssl_contrastive import SSLContrastive
from sslfast.views import teacher_view


def test_without_views_ssl_contrastive_is_dual_networks_and_dice_between_the_networks() -> None:
    networks, labels = [Given(4), Given(4)], torch.randint(0, 4, (2, *SIZE))
    weights = {
        "pseudo_weight": 0.5,
        "pseudo_dice_weight": 0.3,
        "contrast_weight": 0.0,
        "discrepancy_weight": 0.0,
    }  # whose normaliser differs too
    with_dice = step("ssl-contrastive", 4, labels, networks, **weights, views=False)
    without = step("dual-networks", 4, labels, networks, **weights)  # which has no views
    p, q = (network.logits[2:].softmax(1).transpose(0, 1).flatten(1) for network in networks)
    dice = 2 * (p * q).sum(1) / (p.square() + q.square()).sum(1)
    assert float((with_dice.loss - without.loss).detach()) == pytest.approx(
        0.3 * (1 - float(dice[1:].mean().detach())), rel=1e-4
    )


def test_the_teacher_of_a_view_is_the_prediction_for_the_original_volume() -> None:
    networks = [Given(2), Given(2)]
    method = SSLContrastive(2, 10, 1, SSLContrastive.Options())
    images = torch.randn(4, 1, *SIZE)
    result = method.step(*networks, images, torch.randint(2, (2, *SIZE)), step=10)
    for network in networks:
        (original, *_), (batch, *_) = network.shown
        assert [modes for _, *modes in network.shown] == [[False, False], [True, True]]
        assert torch.equal(original, images[2:])
        assert torch.equal(batch[:2], images[:2])
        assert torch.equal(batch, networks[0].shown[1][0])
        assert not torch.allclose(batch[2:], images[2:])
    assert float(result.terms["kept_fraction"]) == pytest.approx(0.2, abs=0.01)


def test_views_are_turned_in_millimetres() -> None:
    networks, images, labels = [Given(2), Given(2)], torch.randn(4, 1, *SIZE), torch.randint(2, (2, *SIZE))
    method = SSLContrastive(2, 10, 1, SSLContrastive.Options())
    method.spacing = (3.0, 1.0, 1.0)
    torch.manual_seed(0)
    method.step(*networks, images, labels, step=10)
    for spacing, equal in ((method.spacing, True), ((1.0, 1.0, 1.0), False)):
        torch.manual_seed(0)
        view, _ = teacher_view(*networks, images[2:], spacing=spacing)
        assert torch.equal(networks[0].shown[1][0][2:], view) == equal


def test_the_papers_preset_takes_the_papers_percentile() -> None:
    networks = [Given(2), Given(2)]
    options = {"preset": "paper", "percentile": SSLContrastive.Options().percentile}
    result = step("ssl-contrastive", 2, torch.randint(2, (2, *SIZE)), networks, **options)
    assert float(result.terms["kept_fraction"]) > 0.7  # it begins at the 80th
