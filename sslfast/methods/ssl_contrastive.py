"""`ssl-contrastive`: discrepancy correction, pseudo-labels and contrast between two networks (arXiv 2311.12617)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from sslfast.apart import forward_apart
from sslfast.losses import DualContrastiveLoss, DualLoss
from sslfast.methods.method import Method
from sslfast.options import MethodOptions
from sslfast.ranges import Range
from sslfast.views import teacher_view


@dataclass(frozen=True)
class DualContrastiveOptions(MethodOptions):
    """Options of the methods whose loss is `DualContrastiveLoss`."""

    percentile: Annotated[tuple[float, float] | None, Range(0, 100)] = None
    """A voxel is reliable if the teacher's entropy is below this percentile (start, end of the ramp).
    None: 20 20, or 80 100 with the preset paper."""
    discrepancy_weight: Annotated[float, Range(0, 10**6)] = 0.5
    """Weight of the loss on labelled voxels where confident predictions of the two networks disagree."""
    pseudo_weight: Annotated[float, Range(0, 10**6)] = 1.0
    """Weight of the pseudo-labels' cross-entropy and of the cosine loss at the end of the ramp."""
    contrast_weight: Annotated[float | None, Range(0, 10**6)] = None
    """Weight of the contrastive loss at the end of the ramp. None: 0; with the preset paper and in dual-networks
    0.1."""
    ramp: Annotated[float, Range(0, 1)] = 1.0
    """Fraction of the run over which these weights rise to their full value."""
    temperature: Annotated[float, Range(1e-6, 1e6)] = 0.1
    """Temperature of the contrastive softmax."""
    anchors: Annotated[int, Range(0, 2**16)] = 256
    """Unreliable voxels sampled per class and step."""
    negatives: Annotated[int, Range(0, 2**16)] = 512
    """Reliable voxels of other classes sampled per class and step."""


class SSLContrastive(Method):
    """`DualContrastiveLoss` on random views: on rotated and zoomed unlabelled volumes, both networks learn to reproduce
    their averaged prediction for the original volume.
    """

    @dataclass(frozen=True)
    class Options(DualContrastiveOptions):
        """Options of ssl-contrastive."""

        preset: Literal["recommended", "paper"] = "recommended"
        """recommended: both networks learn rectified pseudo-labels of their teacher.
        paper (arXiv 2311.12617): on reliable voxels, the network with the higher Dice loss learns the other's class.
        The discrepancy loss is then a mean over the voxels where the networks disagree.
        By default, paper has no views, no gate, percentile 80 100, and no Dice on pseudo-labels."""
        views: Literal["preset", "random", "none"] = "preset"
        """random: both networks see the unlabelled volumes rotated (up to 30 degrees) and zoomed (0.7 to 1.4).
        There, they learn to reproduce their averaged prediction for the original volume.
        none: each network learns from the other. preset: random with the preset recommended, none with paper."""
        pseudo_dice_weight: Annotated[float | None, Range(0, 10**6)] = None
        """Weight of Dice with the teacher (preset paper: with the pseudo-labels) at the end of the ramp.
        None: 1, or 0 with the preset paper."""
        class_balance: Literal["preset", "on", "off"] = "preset"
        """on: with more than two classes, weight them in the cross-entropy, for one network by how rare they are, for
        the other by how difficult. preset: on with the preset recommended, off with paper."""
        gate: Annotated[tuple[float, float] | None, Range(0, 1)] = None
        """A class counts on unlabelled volumes from the first of these Dice values on labelled patches, and fully from
        the second, as far as the teacher finds it there. None: 0.3 0.7, or 0 0 (always) with the preset paper."""

    def __init__(self, num_classes: int, steps: int, seed: int, options: Options) -> None:
        super().__init__(num_classes, steps, seed, options)
        by_preset = "random" if options.preset == "recommended" else "none"
        self.normalises_apart = options.preset == "recommended"
        self.augments_unlabelled = (by_preset if options.views == "preset" else options.views) == "random"
        self.criterion = DualContrastiveLoss(
            num_classes,
            preset=options.preset,
            percentile=options.percentile,
            discrepancy_weight=options.discrepancy_weight,
            pseudo_weight=options.pseudo_weight,
            pseudo_dice_weight=options.pseudo_dice_weight,
            class_balance=None if options.class_balance == "preset" else options.class_balance == "on",
            gate=options.gate,
            contrast_weight=options.contrast_weight,
            ramp_steps=self.ramp_steps(options.ramp),
            temperature=options.temperature,
            anchors=options.anchors,
            negatives=options.negatives,
            seed=seed,
        )
        self.uses_contrast = self.criterion.options.contrast

    def step(self, network_a: nn.Module, network_b: nn.Module, images: Tensor, labels: Tensor, step: int) -> DualLoss:
        teacher = None
        if self.augments_unlabelled and len(images) > len(labels):
            view, teacher = teacher_view(network_a, network_b, images[len(labels) :], spacing=self.spacing)
            images = torch.cat((images[: len(labels)], view))
        apart = len(labels) if self.normalises_apart else 0
        (logits_a, features_a), (logits_b, features_b) = (
            forward_apart(network, images, apart, linear=True) for network in (network_a, network_b)
        )
        return self.criterion(logits_a, logits_b, features_a, features_b, labels, step=step, teacher=teacher)
