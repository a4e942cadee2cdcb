"""`ua-mt` (Yu et al., MICCAI 2019): a mean teacher without its uncertain voxels."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sslfast.losses import ramp_up
from sslfast.methods.mean_teacher import MeanTeacher, noisy

PASSES = 8  # forward passes of the teacher, with dropout


class UAMT(MeanTeacher):
    """`mean-teacher` with the teacher's probabilities averaged over `PASSES` passes, on the voxels where their
    entropy is below (3/4 + ramp / 4) ln C (its equation 3).
    """

    @torch.no_grad()
    def teach(self, teacher: nn.Module, images: Tensor) -> Tensor:
        passes = [teacher(noisy(images))[0] for _ in range(PASSES)]
        mean = sum(logits.float().softmax(1) for logits in passes) / PASSES
        return mean.clamp_min(1e-12).log().to(passes[0].dtype)

    def max_entropy(self, step: int) -> float:
        return (0.75 + 0.25 * ramp_up(step, self.ramp_steps(self.options.ramp))) * math.log(self.num_classes)
