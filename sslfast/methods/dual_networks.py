"""`dual-networks`: cross pseudo supervision rectified by agreement, cosine consistency and contrast (arXiv 2505.17690, 2509.13084)."""

from __future__ import annotations

from dataclasses import asdict, replace

from sslfast.methods.ssl_contrastive import DualContrastiveOptions, SSLContrastive


class DualNetworks(SSLContrastive):
    """On the labelled volumes CE + Dice + discrepancy_weight R; on the voxels whose teacher is sure, e^-KL CE(student, teacher's class) + KL
    with KL = sum p_teacher log(p_teacher / p_student), both networks teaching each other; 1 - cos(p_a, p_b) everywhere; and
    the contrast. It is `ssl-contrastive` without views and without Dice between the networks.
    """

    Options = DualContrastiveOptions  # type: ignore[assignment]  # fewer than the parent's, which are fixed here

    def __init__(self, num_classes: int, steps: int, seed: int, options: DualContrastiveOptions) -> None:
        fixed = SSLContrastive.Options(**asdict(options), pseudo_dice_weight=0.0, views="none")
        super().__init__(num_classes, steps, seed, fixed)
        self.criterion.options = replace(self.criterion.options, discrepancy_over="mask")  # as published
