"""`dual-networks` (arXiv 2505.17690, 2509.13084): rectified cross pseudo supervision, cosine consistency, contrast."""

from __future__ import annotations

from dataclasses import asdict, replace

from sslfast.losses import PRESETS
from sslfast.methods.ssl_contrastive import DualContrastiveOptions, SSLContrastive


class DualNetworks(SSLContrastive):
    """`ssl-contrastive` without views, without a gate, and without Dice between the networks.

    Labelled volumes: CE + Dice + discrepancy_weight R. Unlabelled volumes: each network is the teacher of the other. On
    reliable voxels e^-KL CE(student, teacher's class) + KL, with KL = sum p_teacher log(p_teacher / p_student); on all
    voxels 1 - cos(p_a, p_b); and the contrast.
    """

    Options = DualContrastiveOptions  # type: ignore[assignment]  # the parent's other options are fixed below

    def __init__(self, num_classes: int, steps: int, seed: int, options: DualContrastiveOptions) -> None:
        fixed = SSLContrastive.Options(**asdict(options), pseudo_dice_weight=0.0, views="none", gate=(0.0, 0.0))
        if options.contrast_weight is None:
            fixed = replace(fixed, contrast_weight=PRESETS["paper"].contrast_weight)
        super().__init__(num_classes, steps, seed, fixed)
        # as published
        self.normalises_apart = False
        self.criterion.options = replace(self.criterion.options, discrepancy_over="mask")
