"""`dual-networks`: cross pseudo supervision rectified by agreement, cosine consistency and contrast (arXiv 2505.17690, 2509.13084)."""

from __future__ import annotations

from dataclasses import replace

from sslfast.methods.ssl_contrastive import SSLContrastive
from sslfast.options import MethodOptions


class DualNetworks(SSLContrastive):
    """On the labelled volumes CE + Dice + discrepancy_weight R; on the voxels whose teacher is sure, e^-KL CE(student, teacher's class) + KL
    with KL = sum p_teacher log(p_teacher / p_student), both networks teaching each other; 1 - cos(p_a, p_b) everywhere; and
    the contrast. It is `ssl-contrastive` without views and without Dice between the networks.
    """

    def __init__(self, num_classes: int, steps: int, seed: int, options: MethodOptions) -> None:
        super().__init__(
            num_classes,
            steps,
            seed,
            replace(options, preset="recommended", pseudo_dice_weight=0.0, views=False),
        )
        self.criterion.options = replace(self.criterion.options, discrepancy_over="mask")  # as published
