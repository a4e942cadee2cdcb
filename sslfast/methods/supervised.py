"""`supervised`: the baseline, which uses only the labelled volumes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sslfast.losses import DualLoss
from sslfast.methods.method import Method
from sslfast.ops.class_balance import class_weights
from sslfast.ops.class_gate import first_running, update_running
from sslfast.ops.dual_supervised import dual_supervised
from sslfast.options import MethodOptions


class Supervised(Method):
    """Cross-entropy + Dice of each network, with the class weights of `ssl-contrastive`."""

    @dataclass(frozen=True)
    class Options(MethodOptions):
        """Options of supervised."""

        class_balance: Literal["on", "off"] = "on"
        """on: with more than two classes, weight them in the cross-entropy, for one network by how rare they are, for
        the other by how difficult."""

    uses_unlabelled = False
    running: Tensor  # [4, C] averages that the class weights are made of

    def __init__(self, num_classes: int, steps: int, seed: int, options: Options) -> None:
        super().__init__(num_classes, steps, seed, options)
        self.balanced = options.class_balance == "on" and num_classes > 2
        self.register_buffer("running", first_running(torch.zeros(num_classes)))

    def step(self, network_a: nn.Module, network_b: nn.Module, images: Tensor, labels: Tensor, step: int) -> DualLoss:
        labelled = images[: len(labels)]
        (logits_a, _), (logits_b, _) = network_a(labelled, linear=True), network_b(labelled, linear=True)
        weights = class_weights(self.running) if self.balanced else None
        terms = dual_supervised(logits_a, logits_b, labels, class_weights=weights, reducer=self.reducer)
        nothing = torch.zeros_like(terms.class_dice)  # on unlabelled volumes
        self.running = update_running(self.running, terms.class_dice, nothing, nothing, terms.class_voxels)
        losses = terms.ce + terms.dice
        return DualLoss(losses[0], losses[1], terms.learned)
