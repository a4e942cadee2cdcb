"""Other people's networks behind the adapter that gives their features."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets import SegResNet, UNet
from torch import nn

from sslfast import WithFeatures


def test_monai_networks_give_logits_and_features() -> None:
    images = torch.randn(1, 1, 16, 16, 16)
    unet = WithFeatures(UNet(3, 1, 2, (4, 8, 16), (2, 2)))
    logits, features = unet(images)
    assert logits.shape == (1, 2, 16, 16, 16)
    assert features.shape[2:] == logits.shape[2:]
    segresnet = WithFeatures(SegResNet(3, 8, 1, 2)).eval()
    logits, features = segresnet(images)
    assert features.shape == (1, 8, 16, 16, 16)
    classifier = dict(segresnet.network.named_modules())["conv_final.2.conv"]
    assert torch.allclose(classifier(features), logits)


def test_features_of_a_named_classifier_carry_gradients() -> None:
    body = nn.Sequential(nn.Conv3d(1, 5, 3, padding=1), nn.ReLU(), nn.Conv3d(5, 2, 1), nn.Conv3d(2, 2, 1))
    _, features = WithFeatures(body, classifier="2")(torch.randn(1, 1, 4, 4, 4))
    assert features.shape == (1, 5, 4, 4, 4)
    features.sum().backward()
    assert body[0].weight.grad.any()


def test_a_wrong_classifier_is_named() -> None:
    with pytest.raises(ValueError, match="no module 'head'; its convolutions are 0"):
        WithFeatures(nn.Sequential(nn.Conv3d(1, 2, 1)), classifier="head")
    with pytest.raises(ValueError, match="no 3D convolution"):
        WithFeatures(nn.Linear(1, 1))
