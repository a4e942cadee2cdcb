"""`ua-mt` (Yu et al., MICCAI 2019): a mean teacher whose uncertain voxels teach nothing."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sslfast.losses import ramp_up
from sslfast.methods.mean_teacher import MeanTeacher, noisy

PASSES = 8  # of the teacher, with dropout


class UAMT(MeanTeacher):
    """As `mean-teacher`, on the voxels where the entropy of the mean of the teacher's passes lies below
    (3/4 + ramp / 4) ln C (its equation 3).
    """

    def consistency(self, student: Tensor, teacher: nn.Module, images: Tensor, step: int) -> Tensor:
        if not len(images):
            return student.sum()
        with torch.no_grad():
            target = torch.zeros_like(student)
            for _ in range(PASSES):
                target += teacher(noisy(images))[0].float().softmax(1) / PASSES
            entropy = -(target * target.clamp_min(1e-12).log()).sum(1)
            limit = (0.75 + 0.25 * ramp_up(step, self.ramp_steps)) * math.log(self.num_classes)
            certain = entropy < limit
        apart = (student - target).square().mean(1)
        return torch.where(certain, apart, 0).sum() / certain.sum().clamp_min(1)
