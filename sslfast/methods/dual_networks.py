"""`dual-networks`: cross pseudo supervision rectified by agreement, cosine consistency and contrast (arXiv 2505.17690, 2509.13084)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslfast.losses import DualContrastiveLoss, DualLoss, ramp_up
from sslfast.methods.method import Method
from sslfast.ops.reliability import reliability
from sslfast.ops.state import is_reliable
from sslfast.options import MethodOptions


class DualNetworks(Method):
    """On the labelled volumes CE + Dice + alpha R; on the voxels whose teacher is sure, e^-KL CE(student, teacher's class) + KL
    with KL = sum p_teacher log(p_teacher / p_student), both networks teaching each other; 1 - cos(p_a, p_b) everywhere; and
    the contrast of `ssl-contrastive`.
    """

    def __init__(self, num_classes: int, steps: int, seed: int, options: MethodOptions) -> None:
        super().__init__(num_classes, steps, seed, options)
        self.percentile = options.percentile
        self.weight = options.pseudo_weight
        self.ramp_steps = max(1, round(options.ramp * steps))
        self.criterion = DualContrastiveLoss(
            num_classes,
            percentile=options.percentile,
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
        a, b = logits_a[first:].float(), logits_b[first:].float()
        low, high = self.percentile
        percentile = low + (high - low) * min(step / self.ramp_steps, 1)
        rectified = [
            rectified_cross_entropy(
                student, teacher, is_reliable(reliability(a, b, percentile, winner=who, ranks=self.ranks).state)
            )
            for student, teacher, who in ((a, b, 1), (b, a, 0))
        ]
        apart = 1 - F.cosine_similarity(a.softmax(1), b.softmax(1), dim=1)
        cosine = apart.sum() / max(apart.numel(), 1)
        weight = self.weight * ramp_up(step, self.ramp_steps)
        terms = {**result.terms, "pseudo": torch.stack(rectified).detach(), "cosine": cosine.detach()}
        return DualLoss(
            result.loss_a + weight * (rectified[0] + cosine / 2),
            result.loss_b + weight * (rectified[1] + cosine / 2),
            terms,
        )


def rectified_cross_entropy(student: Tensor, teacher: Tensor, reliable: Tensor) -> Tensor:
    """Mean over the reliable voxels [U, *spatial] of e^-KL CE(student, teacher's class) + KL; logits [U, C, *spatial]."""
    teacher = teacher.detach()
    log_p, log_q = student.log_softmax(1), teacher.log_softmax(1)
    kl = (log_q.exp() * (log_q - log_p)).sum(1)
    ce = -log_p.gather(1, teacher.argmax(1, keepdim=True)).squeeze(1)
    return torch.where(reliable, (-kl).exp() * ce + kl, 0).sum() / reliable.sum().clamp_min(1)
