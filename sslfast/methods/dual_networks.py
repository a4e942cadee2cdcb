"""`dual-networks`: cross pseudo supervision rectified by agreement, cosine consistency and contrast (arXiv 2505.17690, 2509.13084)."""

from __future__ import annotations

from torch import Tensor, nn

from sslfast.losses import DualContrastiveLoss, DualLoss, ramp_up
from sslfast.methods.method import Method
from sslfast.ops.rectified_consistency import rectified_consistency
from sslfast.ops.reliability import reliability
from sslfast.options import MethodOptions


class DualNetworks(Method):
    """On the labelled volumes CE + Dice + alpha R; on the voxels whose teacher is sure, e^-KL CE(student, teacher's class) + KL
    with KL = sum p_teacher log(p_teacher / p_student), both networks teaching each other; 1 - cos(p_a, p_b) everywhere; and
    the contrast of `ssl-contrastive`.
    """

    dice_weight = 0.0  # of Dice between the networks

    def __init__(self, num_classes: int, steps: int, seed: int, options: MethodOptions) -> None:
        super().__init__(num_classes, steps, seed, options)
        self.percentile = options.percentile or (20.0, 20.0)
        self.weight = options.pseudo_weight
        self.ramp_steps = max(1, round(options.ramp * steps))
        self.criterion = DualContrastiveLoss(
            num_classes,
            preset="corrected",
            percentile=self.percentile,
            alpha=options.discrepancy_weight,
            pseudo_weight=0.0,
            contrast_weight=options.contrast_weight,
            ramp_steps=self.ramp_steps,
            temperature=options.temperature,
            anchors=options.anchors,
            negatives=options.negatives,
            seed=seed,
        )

    def step(self, network_a: nn.Module, network_b: nn.Module, images: Tensor, labels: Tensor, step: int) -> DualLoss:
        (logits_a, features_a), (logits_b, features_b) = network_a(images), network_b(images)
        result = self.criterion(logits_a, logits_b, features_a, features_b, labels, step=step)
        first = len(labels)
        a, b = logits_a[first:], logits_b[first:]
        low, high = self.percentile
        percentile = low + (high - low) * min(step / self.ramp_steps, 1)
        states = [reliability(a, b, percentile, winner=teacher, ranks=self.ranks).state for teacher in (1, 0)]
        found = rectified_consistency(a, b, *states, ranks=self.ranks)
        taught = self.weight * (found.rectified + found.cosine / 2) + self.dice_weight * found.dice / 2  # [2]
        taught = ramp_up(step, self.ramp_steps) * taught
        terms = {"pseudo": found.rectified, "cosine": found.cosine, "consistency_dice": found.dice}
        return DualLoss(
            result.loss_a + taught[0],
            result.loss_b + taught[1],
            {**result.terms, **{name: value.detach() for name, value in terms.items()}},
        )
