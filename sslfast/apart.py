"""Labelled and unlabelled volumes in one network whose batch normalisation must not mix them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sslfast.networks.norm_act import NormAct
from sslfast.ops.linear_logits import LinearLogits, Logits


def forward_apart(network: nn.Module, images: Tensor, num_labelled: int, **options: Any) -> tuple[Logits, Tensor]:
    """What `network(images, **options)` returns, with batch normalisation of labelled and unlabelled volumes apart.

    Each part is normalised by its own statistics, and only the labelled part counts in the averages that evaluation
    uses, so that unlabelled volumes of another kind cannot spoil them. A network without such averages computes all
    volumes at once. With several processes, all of them must have volumes of both kinds, or all of one kind only.
    Layers of batch normalisation must not be within `torch.utils.checkpoint`, which would compute them otherwise when
    it recomputes them.

    Args:
        network: returns (logits, features).
        images: [N, M, D, H, W]; the first `num_labelled` are labelled.
        options: of the network's forward pass.
    """
    layers = [
        module
        for module in network.modules()
        if isinstance(module, (NormAct, _BatchNorm))
        and module.training
        and module.track_running_stats
        and module.running_mean is not None
    ]
    if not layers or not 0 < num_labelled < len(images):
        whole: tuple[Logits, Tensor] = network(images, **options)
        return whole
    logits, features = network(images[:num_labelled], **options)
    try:
        for layer in layers:
            layer.track_running_stats = False
        others, other_features = network(images[num_labelled:], **options)
    finally:
        for layer in layers:
            layer.track_running_stats = True
    features = torch.cat((features, other_features))
    if isinstance(logits, LinearLogits):
        return LinearLogits(features, torch.cat((logits.weights, others.weights))), features
    return torch.cat((logits, others)), features
