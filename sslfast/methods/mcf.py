"""`mcf`: mutual correction (Wang et al., CVPR 2023): correct where the networks disagree; the loser follows the winner."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sslfast.losses import DualLoss, ramp_up
from sslfast.methods.method import Method
from sslfast.ops.dual_supervised import dual_supervised
from sslfast.options import MethodOptions

SHARPENING = 0.1  # temperature of the winner's probabilities


class MCF(Method):
    """CE + Dice + alpha R on the labelled volumes, R where the predicted classes differ; on the unlabelled ones the loser,
    which has the higher Dice loss, learns the winner's sharpened probabilities by mean squared error.
    """

    def __init__(self, num_classes: int, steps: int, seed: int, options: MethodOptions) -> None:
        super().__init__(num_classes, steps, seed, options)
        self.alpha = options.discrepancy_weight
        self.weight = options.consistency_weight
        self.ramp_steps = max(1, round(options.ramp * steps))

    def step(self, network_a: nn.Module, network_b: nn.Module, images: Tensor, labels: Tensor, step: int) -> DualLoss:
        logits_a, logits_b = network_a(images)[0], network_b(images)[0]
        first = len(labels)
        supervised = dual_supervised(logits_a[:first], logits_b[:first], labels, threshold=0.0, ranks=self.ranks)
        winner = (supervised.dice[1] < supervised.dice[0]).long()
        p_a, p_b = (logits[first:].float().softmax(1) for logits in (logits_a, logits_b))
        consistency = torch.stack((distance(p_a, p_b), distance(p_b, p_a)))  # [2]: a follows b, b follows a
        is_loser = torch.stack((winner == 1, winner == 0))
        losses = (
            supervised.ce
            + supervised.dice
            + self.alpha * supervised.discrepancy
            + self.weight * ramp_up(step, self.ramp_steps) * is_loser * consistency
        )
        terms = {**supervised._asdict(), "winner": winner, "consistency": consistency}
        del terms["sums"]
        return DualLoss(losses[0], losses[1], {name: value.detach() for name, value in terms.items()})


def distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of probabilities [U, C, *spatial] from the teacher's sharpened ones; 0 for no volume."""
    sharp = teacher.detach().pow(1 / SHARPENING)
    sharp = sharp / sharp.sum(1, keepdim=True)
    return (student - sharp).square().sum() / max(student.numel(), 1)
