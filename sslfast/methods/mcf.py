"""`mcf`: mutual correction (Wang et al., CVPR 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from sslfast.losses import DualLoss, ramp_up
from sslfast.methods.method import ConsistencyOptions, Method
from sslfast.ops.dual_supervised import dual_supervised
from sslfast.ops.masked_consistency import masked_consistency
from sslfast.ranges import Range

SHARPENING = 0.1  # temperature of the winner's probabilities


class MCF(Method):
    """Labelled volumes: CE + Dice + discrepancy_weight R, with R on the voxels where the predicted classes differ.
    Unlabelled volumes: the network with the higher Dice loss (the loser) learns the other's sharpened probabilities by
    mean squared error.
    """

    @dataclass(frozen=True)
    class Options(ConsistencyOptions):
        """Options of mcf."""

        discrepancy_weight: Annotated[float, Range(0, 10**6)] = 0.5
        """Weight of the loss on labelled voxels where the predicted classes of the two networks differ."""

    def step(self, network_a: nn.Module, network_b: nn.Module, images: Tensor, labels: Tensor, step: int) -> DualLoss:
        logits_a, logits_b = network_a(images)[0], network_b(images)[0]
        num_labelled = len(labels)
        supervised = dual_supervised(
            logits_a[:num_labelled], logits_b[:num_labelled], labels, threshold=0.0, reducer=self.reducer
        )
        winner = (supervised.dice[1] < supervised.dice[0]).long()
        a, b = logits_a[num_labelled:], logits_b[num_labelled:]
        consistency = torch.stack(
            [
                masked_consistency(student, teacher, temperature=SHARPENING, reducer=self.reducer).loss
                for student, teacher in ((a, b), (b, a))
            ]
        )  # [2]: a follows b, b follows a
        loser_mask = torch.stack((winner == 1, winner == 0))
        weight = self.options.consistency_weight * ramp_up(step, self.ramp_steps(self.options.ramp))
        losses = (
            supervised.ce
            + supervised.dice
            + self.options.discrepancy_weight * supervised.discrepancy
            + weight * loser_mask * consistency
        )
        terms = {**supervised._asdict(), "winner": winner, "consistency": consistency}
        return DualLoss(losses[0], losses[1], {name: value.detach() for name, value in terms.items()})
