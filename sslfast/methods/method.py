"""What a method is: one step of training two networks."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from sslfast.losses import DualContrastiveLoss, DualLoss
from sslfast.ops.ranks import ALONE, Ranks
from sslfast.options import MethodOptions


class Method(nn.Module, ABC):
    """One step of training two networks; state that a run must keep (averages, banks) lies in buffers.

    Args:
        num_classes: C.
        steps: length of the run.
        seed: of whatever the method draws.
        options: see `sslfast.options.MethodOptions`.
    """

    uses_unlabelled = True
    turns_unlabelled = False  # it rotates and zooms the unlabelled volumes itself: --augment affine leaves them to it
    ramp = 0.6  # share of a run in which what unlabelled volumes teach rises to its full weight, where the options do not say
    ranks: Ranks = ALONE  # the processes whose batches count as one

    def __init__(self, num_classes: int, steps: int, seed: int, options: MethodOptions) -> None:
        super().__init__()
        self.ramp_steps = max(1, round((self.ramp if options.ramp is None else options.ramp) * steps))

    def count_as_one(self, ranks: Ranks) -> None:
        """Called once, before `prepare`."""
        self.ranks = ranks
        for module in self.modules():
            if isinstance(module, DualContrastiveLoss):
                module.ranks = ranks

    def prepare(self, network_a: nn.Module, network_b: nn.Module) -> None:
        """Called once, before the first step or before a run goes on: makes what is derived from the networks (teachers,
        memories as wide as `network.classifier`)."""

    @abstractmethod
    def step(self, network_a: nn.Module, network_b: nn.Module, images: Tensor, labels: Tensor, step: int) -> DualLoss:
        """The losses of one batch.

        Args:
            network_a, network_b: give (logits, features); called with `linear=True`, the logits are `LinearLogits`.
            images: [N, 1, D, H, W]; the first len(labels) are labelled.
            labels: [L, D, H, W] int64, -1 where nobody annotated.
            step: 0, 1, …
        """
