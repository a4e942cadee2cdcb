"""`cps`: cross pseudo supervision (Chen et al., CVPR 2021).

Each network learns the other's class on every unlabelled voxel.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sslfast.losses import DualLoss, ramp_up
from sslfast.methods.method import ConsistencyOptions, Method
from sslfast.ops.dual_supervised import dual_supervised
from sslfast.ops.flags import RELIABLE
from sslfast.ops.pseudo_supervised import pseudo_supervised


class CPS(Method):
    """L_a = CE + Dice + weight(t) CE(z_a, argmax z_b), and the reverse for b (its equations 1 to 3)."""

    Options = ConsistencyOptions

    def step(self, network_a: nn.Module, network_b: nn.Module, images: Tensor, labels: Tensor, step: int) -> DualLoss:
        logits_a, logits_b = network_a(images)[0], network_b(images)[0]
        num_labelled = len(labels)
        supervised = dual_supervised(logits_a[:num_labelled], logits_b[:num_labelled], labels, reducer=self.reducer)
        a, b = logits_a[num_labelled:], logits_b[num_labelled:]
        cross = torch.stack(
            [
                pseudo_supervised(student, (other.argmax(1) + RELIABLE).to(torch.uint8), reducer=self.reducer).ce
                for student, other in ((a, b), (b, a))
            ]
        )
        weight = self.options.consistency_weight * ramp_up(step, self.ramp_steps(self.options.ramp))
        losses = supervised.ce + supervised.dice + weight * cross
        terms = {**supervised.learned, "pseudo": cross}
        return DualLoss(losses[0], losses[1], {name: value.detach() for name, value in terms.items()})
