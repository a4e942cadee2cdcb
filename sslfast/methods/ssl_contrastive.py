"""`ssl-contrastive`: discrepancy correction, pseudo-labels and contrast between two networks (arXiv 2311.12617)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sslfast.losses import DualContrastiveLoss, DualLoss
from sslfast.methods.method import Method
from sslfast.options import MethodOptions
from sslfast.views import taught_view


class SSLContrastive(Method):
    """Everything is in `DualContrastiveLoss`, whose ramp takes the whole run. Both networks see the unlabelled volumes in random
    views, in which they are taught by what they say on average where they see them straight.
    """

    ramp = 1.0

    def __init__(self, num_classes: int, steps: int, seed: int, options: MethodOptions) -> None:
        super().__init__(num_classes, steps, seed, options)
        self.turns_unlabelled = options.preset == "recommended" if options.views is None else options.views
        self.criterion = DualContrastiveLoss(
            num_classes,
            preset=options.preset,
            percentile=options.percentile,
            discrepancy_weight=options.discrepancy_weight,
            pseudo_weight=options.pseudo_weight,
            pseudo_dice_weight=options.pseudo_dice_weight,
            contrast_weight=options.contrast_weight,
            ramp_steps=self.ramp_steps,
            temperature=options.temperature,
            anchors=options.anchors,
            negatives=options.negatives,
            seed=seed,
        )

    def step(self, network_a: nn.Module, network_b: nn.Module, images: Tensor, labels: Tensor, step: int) -> DualLoss:
        teacher = None
        if self.turns_unlabelled and len(images) > len(labels):
            view, teacher = taught_view(network_a, network_b, images[len(labels) :])
            images = torch.cat((images[: len(labels)], view))
        (logits_a, features_a), (logits_b, features_b) = network_a(images, linear=True), network_b(images, linear=True)
        return self.criterion(logits_a, logits_b, features_a, features_b, labels, step=step, teacher=teacher)
