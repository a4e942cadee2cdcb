"""`supervised`: the baseline, which uses only the labelled volumes."""

from __future__ import annotations

from torch import Tensor, nn

from sslfast.losses import DualLoss
from sslfast.methods.method import Method
from sslfast.ops.dual_supervised import dual_supervised


class Supervised(Method):
    """Cross-entropy + Dice of each network."""

    uses_unlabelled = False

    def step(self, network_a: nn.Module, network_b: nn.Module, images: Tensor, labels: Tensor, step: int) -> DualLoss:
        labelled = images[: len(labels)]
        (logits_a, _), (logits_b, _) = network_a(labelled, linear=True), network_b(labelled, linear=True)
        terms = dual_supervised(logits_a, logits_b, labels, reducer=self.reducer)
        losses = terms.ce + terms.dice
        return DualLoss(losses[0], losses[1], terms.learned)
