"""Labelled and unlabelled volumes in one network whose batch normalisation must not mix them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sslfast.ops.linear_logits import LinearLogits, Logits


def forward_apart(network: nn.Module, images: Tensor, num_labelled: int, **options: Any) -> tuple[Logits, Tensor]:
    """What `network(images, **options)` returns, with batch normalisation of labelled and unlabelled volumes apart.

    Each part is normalised by its own statistics, and only the labelled part counts in the averages that evaluation
    uses, so that unlabelled volumes of another kind cannot spoil them. A network without such averages computes all
    volumes at once.

    Args:
        network: returns (logits, features).
        images: [N, M, D, H, W]; the first `num_labelled` are labelled.
        options: of the network's forward pass.
    """
    layers = [
        module
        for module in network.modules()
        if getattr(module, "track_running_stats", False) and getattr(module, "running_mean", None) is not None
    ]
    if not layers or not 0 < num_labelled < len(images):
        whole: tuple[Logits, Tensor] = network(images, **options)
        return whole
    logits, features = network(images[:num_labelled], **options)
    try:
        for layer in layers:
            layer.track_running_stats = False  # type: ignore[assignment]
        others, other_features = network(images[num_labelled:], **options)
    finally:
        for layer in layers:
            layer.track_running_stats = True  # type: ignore[assignment]
    features = torch.cat((features, other_features))
    if isinstance(logits, LinearLogits):
        return LinearLogits(features, torch.cat((logits.weights, others.weights))), features
    return torch.cat((logits, others)), features
