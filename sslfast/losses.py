"""The dual contrastive loss as a module for any training loop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from sslfast.ops.check import check_batch, check_choice, check_num_classes, check_pair, check_range, described
from sslfast.ops.class_gate import first_running
from sslfast.ops.dual_contrastive import Options, dual_contrastive
from sslfast.ops.dual_supervised import DiscrepancyOver
from sslfast.ops.linear_logits import Logits, linear_logits
from sslfast.ops.reduce import Reducer
from sslfast.renamed import LOSS_OPTIONS

PresetName = Literal["recommended", "paper"]


@dataclass(frozen=True)
class Preset:
    """The options in which the presets differ."""

    percentile: tuple[float, float]
    rectified: bool
    pseudo_dice_weight: float
    discrepancy_over: DiscrepancyOver
    class_balance: bool
    gate: tuple[float, float]
    contrast_weight: float


PRESETS: dict[PresetName, Preset] = {
    "recommended": Preset(
        (20.0, 20.0),
        rectified=True,
        pseudo_dice_weight=1.0,
        discrepancy_over="labelled",
        class_balance=True,
        gate=(0.3, 0.7),
        contrast_weight=0.0,
    ),
    "paper": Preset(
        (80.0, 100.0),
        rectified=False,
        pseudo_dice_weight=0.0,
        discrepancy_over="mask",
        class_balance=False,
        gate=(0.0, 0.0),
        contrast_weight=0.1,
    ),
}


@dataclass(frozen=True)
class DualLoss:
    """The losses of one step of a dual-network method."""

    loss_a: Tensor  # [] loss of network a
    loss_b: Tensor  # [] loss of network b
    terms: Mapping[str, Tensor]  # the single terms by name, detached

    @property
    def loss(self) -> Tensor:
        """loss_a + loss_b, to call `backward` on."""
        return self.loss_a + self.loss_b


class DualContrastiveLoss(nn.Module):
    """Supervised, discrepancy, pseudo-label and contrastive loss of two networks (arXiv 2311.12617).

    The labelled volumes come first in the batch. On them each network has cross-entropy + Dice + `discrepancy_weight` x
    discrepancy loss. The network with the lower Dice loss is the winner, the other the loser.

    On the unlabelled volumes both networks learn from a teacher. `sslfast.teacher_view` makes one, and gives the best
    results; without it, each network is the teacher of the other. A voxel is reliable if its teacher's entropy is below
    a percentile. On reliable voxels a network learns the teacher's class, with less weight where the two differ (arXiv
    2505.17690). On all voxels it learns the teacher's probabilities, by cosine and Dice.

    With `contrast_weight`, a contrastive loss (InfoNCE) acts on the loser's features. It pulls a sample of unreliable
    voxels towards the prototype of their class, and pushes them away from the other prototypes and from sampled
    reliable voxels of other classes. Here the teacher, or the winner if there is none, decides which class a voxel has,
    and by its entropy whether it is reliable.

    With preset="paper" only the loser learns from unlabelled volumes, by contrast and from its teacher, the winner: it
    learns the winner's class by cross-entropy on the reliable voxels. docs/results.md compares these choices.

        criterion = DualContrastiveLoss(num_classes=2)
        result = criterion(logits_a, logits_b, features_a, features_b, labels, step=step)
        result.loss.backward()

    Args:
        num_classes: C, 2 to 32; class 0 is background.
        preset: "recommended" or "paper". It sets the options whose default is None, unless they are given.
        percentile: entropy percentile below which a voxel is reliable: a number, or a pair (first, last) for a linear
            change over `ramp_steps`. Default 20; in the paper (80, 100).
        discrepancy_weight: weight of the discrepancy loss.
        pseudo_weight: weight of the pseudo-labels' cross-entropy and of the cosine loss at the end of the ramp.
        pseudo_dice_weight: weight of Dice with the teacher ("paper": with the pseudo-labels) at the end of the ramp.
            Most voxels are background, and without Dice a small structure counts little. Default 1; in the paper 0.
        class_balance: with more than two classes, weight them in the cross-entropy: for network a by how rare they are,
            for network b by how difficult (`sslfast.ops.class_balance`, after DHC, arXiv 2307.11960). Default True; in
            the paper False.
        gate: a pair (low, high). A class counts in the unlabelled losses as far as the networks have learned it: its
            weight is 0 below a running Dice of `low` on the labelled volumes, and 1 from `high` on. Dice with a teacher
            that does not know a structure yet would keep both networks from learning it. So would Dice with one that
            only suspects it in unlabelled volumes of another kind; so the weight is multiplied by the share of the
            class that the teacher decides for (the term `found`). Losses over all classes are weighted by the mean over
            the classes that labels have had. Default (0.3, 0.7); in the paper (0, 0), which is no gate. The running
            averages are state: use one loss for one run, `state_dict` for a checkpoint, and `eval()` for losses of
            validation volumes, which must not change them.
        contrast_weight: weight of the contrastive loss at the end of the ramp. With 0 it costs nothing. Default 0,
            because it gained nothing that could be told from chance (docs/results.md); in the paper 0.1.
        ramp_steps: length of the ramp exp(-5 (1 - step / ramp_steps)^2) of these weights.
        temperature: temperature of the InfoNCE softmax.
        anchors: unreliable voxels sampled per class and step.
        negatives: reliable voxels of other classes sampled per class and step; with 0 only the prototypes are keys.
        seed: seed of the voxel sample, which depends only on (seed, step, flags).
        ignore_index: label of voxels that are not annotated.
        group: process group of a data-parallel run, such as `torch.distributed.group.WORLD`. Percentiles, prototypes,
            samples, class counts and Dice sums are then computed over all ranks, and the loss is that of the whole
            batch. This is exact if all ranks hold the same number of unlabelled volumes; otherwise the contrast samples
            other voxels. The gradient is for DistributedDataParallel, which averages over ranks. None: one process.

    Raises:
        ValueError: an option is out of range.
        TypeError: an option of the wrong kind, or an unknown one; for an option of an earlier version the message names
            its replacement.
    """

    running: Tensor  # [4, C] averages that the gate and the class weights are made of, see `sslfast.ops.class_gate`

    def __init__(
        self,
        num_classes: int,
        *,
        preset: PresetName = "recommended",
        percentile: float | tuple[float, float] | None = None,
        discrepancy_weight: float = 0.5,
        pseudo_weight: float = 1.0,
        pseudo_dice_weight: float | None = None,
        class_balance: bool | None = None,
        gate: tuple[float, float] | None = None,
        contrast_weight: float | None = None,
        ramp_steps: int = 6000,
        temperature: float = 0.1,
        anchors: int = 256,
        negatives: int = 512,
        seed: int = 1337,
        ignore_index: int = -1,
        group: ProcessGroup | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        for name in unknown:
            instead = f" any more: {LOSS_OPTIONS[name]}" if name in LOSS_OPTIONS else ""
            raise TypeError(f"DualContrastiveLoss has no option {name!r}{instead}")
        earlier = {
            "corrected": "'paper' is its name",
            "as-released": "use sslfast.methods.as_released.as_released_loss",
        }
        check_choice("preset", preset, tuple(PRESETS), earlier)
        chosen = PRESETS[preset]
        span = chosen.percentile if percentile is None else percentile
        self.percentile = tuple(span) if isinstance(span, (tuple, list)) else (span, span)
        if len(self.percentile) != 2:
            raise ValueError(f"percentile is {span}; it must be a number or a pair (first, last)")
        for q in self.percentile:
            check_range("percentile", q, 0, 100)
        check_num_classes("num_classes", num_classes)
        check_range("temperature", temperature, 1e-6, 1e6)
        check_range("anchors", anchors, 0, math.inf, whole=True)
        check_range("negatives", negatives, 0, math.inf, whole=True)
        check_range("seed", seed, -(2**63), 2**64 - 1, whole=True)
        check_range("ignore_index", ignore_index, -(2**63), 2**63 - 1, whole=True)
        check_range("ramp_steps", ramp_steps, 1, math.inf)
        gate = chosen.gate if gate is None else gate
        if not isinstance(gate, (tuple, list)):
            raise TypeError(f"gate is {described(gate)}; it must be a pair (low, high)")
        if len(gate) != 2:
            raise ValueError(f"gate is {gate}; it must be a pair (low, high)")
        low, high = gate
        check_range("the second number of gate", high, 0, 1)
        check_range("the first number of gate", low, 0, high)
        contrast_weight = chosen.contrast_weight if contrast_weight is None else contrast_weight
        pseudo_dice_weight = chosen.pseudo_dice_weight if pseudo_dice_weight is None else pseudo_dice_weight
        check_range("discrepancy_weight", discrepancy_weight, 0, 1e6)
        check_range("pseudo_weight", pseudo_weight, 0, 1e6)
        check_range("pseudo_dice_weight", pseudo_dice_weight, 0, 1e6)
        check_range("contrast_weight", contrast_weight, 0, 1e6)
        if not isinstance(class_balance, bool | None):
            raise TypeError(f"class_balance is {described(class_balance)}; it must be True, False or None")
        if not isinstance(group, ProcessGroup | None):
            raise TypeError(f"group is {described(group)}; it must be a torch.distributed.ProcessGroup or None")
        self.num_classes = num_classes
        self.reducer = Reducer(group)
        self.discrepancy_weight = discrepancy_weight
        self.rising_weights = {  # at the end of the ramp
            "pseudo": pseudo_weight,
            "pseudo_dice": pseudo_dice_weight,
            "contrast": contrast_weight,
        }
        self.ramp_steps = ramp_steps
        self.options = Options(
            rectified=chosen.rectified,
            discrepancy_over=chosen.discrepancy_over,
            class_balance=num_classes > 2 and (chosen.class_balance if class_balance is None else class_balance),
            gate=(low, high),
            ignore_index=ignore_index,
            contrast=contrast_weight != 0,
            temperature=temperature,
            anchors=anchors,
            negatives=negatives,
            seed=seed,
        )
        self.register_buffer("running", first_running(torch.zeros(num_classes)))

    def forward(
        self,
        logits_a: Logits,
        logits_b: Logits,
        features_a: Tensor,
        features_b: Tensor,
        labels: Tensor,
        step: int | Tensor = 0,
        teacher: Tensor | None = None,
    ) -> DualLoss:
        """The losses of one batch of N volumes, the first L = len(labels) labelled.

        Args:
            logits_a, logits_b: [N, C, D, H, W] float32, bfloat16, float16 or float64; or `LinearLogits`.
            features_a, features_b: [N, K, D, H, W], the classifiers' inputs, read by the contrastive loss alone, which
                needs the same K of both; in CUDA K is at most 256.
            labels: [L, D, H, W] integers in 0..C-1 or `ignore_index`, 1 <= L <= N.
            step: training step, for the ramps and the voxel sample. A CUDA graph needs it as a tensor [] int64 on the
                device, to change it between replays.
            teacher: [N - L, C, D, H, W] logits or log-probabilities of the teacher of both networks on the unlabelled
                volumes, such as that of `sslfast.teacher_view`. Pseudo-labels and reliable voxels are the teacher's; it
                gets no gradient. None: each network is the teacher of the other. In a process group, either all ranks
                give a teacher or none does.

        Returns:
            loss_a, loss_b, their sum `loss`, and `terms` by name:
            `ce`, `dice`, `discrepancy`, `pseudo` and `pseudo_dice` [2], of networks a and b;
            `winner` [], 0 for a and 1 for b;
            `thresholds` [2], entropies at the percentile, nats;
            `class_dice` [C], of the better network on the labelled volumes; -1 for the background and absent classes;
            `class_voxels` [C], labelled voxels;
            `kept_fraction` [], the share of unlabelled voxels that are reliable;
            `foreground` [], the share of unlabelled voxels that the teacher, or the winner, finds in the foreground;
            `mask_voxels` [], voxels in the discrepancy mask;
            `reliable` [C], numbers of such voxels per class;
            `running_dice` [C], the average of `class_dice`, and `gate` [C], the factor of each class; both -1 before
            its first label;
            `found` [C], the voxels of a class by the teacher over the sum of its squared probabilities, at most 1; both
            are running averages;
            with a contrastive loss, `contrast` [] and `anchors` [C], numbers of such voxels per class.
            Terms over an empty set of voxels are exactly 0. A NaN or infinite logit makes the terms NaN that its voxel
            counts in; of voxels that are not annotated, and with a teacher where no term reads them, none matters.

        Raises:
            TypeError: an argument of the wrong kind: not a dense tensor, or of another dtype.
            ValueError: wrong shape or device; a label out of range; no labelled volume.
            RuntimeError: a CUDA graph is being captured and step is a number; every replay would reuse it.
        """
        batch = logits_a, logits_b, features_a, features_b, labels
        check_batch(*batch, step, teacher, self.reducer, contrast=self.options.contrast)
        if logits_a.shape[1] != self.num_classes:
            raise ValueError(
                f"logits_a has {logits_a.shape[1]} classes (dimension 1); this loss was made for {self.num_classes}"
            )
        progress = ramp_progress(step, self.ramp_steps)
        ramp = ramp_up(step, self.ramp_steps)
        weights = {name: ramp * weight for name, weight in self.rising_weights.items()}
        weights["discrepancy"] = self.discrepancy_weight
        first, last = self.percentile
        self.running = self.running.to(logits_a.device)  # a loss is seldom moved to the networks' device
        losses, terms, running = dual_contrastive(
            *(*batch, self.options, weights),
            *(first + (last - first) * progress, step, self.reducer, teacher, self.running),
        )
        if self.training:
            self.running.copy_(running)
        return DualLoss(losses[0], losses[1], terms)


class DualContrastiveHead(nn.Module):
    """Both networks' 1x1x1 classifiers and `DualContrastiveLoss` in one module, so that training stores no logits.

    On a CPU the loss computes the logits from the features wherever it reads them. It writes the gradient of the
    features once, the classifier's and the contrastive loss's together. On a GPU the logits are stored. The results are
    those of classifier and loss one after the other, up to rounding.

        head = DualContrastiveHead(num_classes=2, channels=16, dropout=0.5)
        result = head(features_a, features_b, labels, step=step)
        result.loss.backward()

    In evaluation, `head.classifier_a(features_a)` gives the logits.

    Args:
        num_classes: C, 2 to 32.
        channels: K, the channels of each network's features.
        dropout: rate of the channel dropout (Dropout3d) between features and classifier. The contrastive loss uses the
            features before dropout.
        options: options of `DualContrastiveLoss`.
    """

    def __init__(self, num_classes: int, channels: int, *, dropout: float = 0.0, **options: Any) -> None:
        super().__init__()
        check_num_classes("num_classes", num_classes)
        check_range("channels", channels, 1, math.inf, whole=True)
        check_range("dropout", dropout, 0, 1)
        self.classifier_a = nn.Conv3d(channels, num_classes, 1)
        self.classifier_b = nn.Conv3d(channels, num_classes, 1)
        self.dropout = nn.Dropout3d(dropout)
        self.criterion = DualContrastiveLoss(num_classes, **options)

    def forward(
        self,
        features_a: Tensor,
        features_b: Tensor,
        labels: Tensor,
        step: int | Tensor = 0,
        teacher: Tensor | None = None,
    ) -> DualLoss:
        """`DualContrastiveLoss` from features [N, K, D, H, W]; the first L = len(labels) volumes are labelled."""
        check_pair("features_a", features_a, "features_b", features_b)
        logits_a = linear_logits(self.classifier_a, features_a, self.dropout)
        logits_b = linear_logits(self.classifier_b, features_b, self.dropout)
        result: DualLoss = self.criterion(
            logits_a, logits_b, features_a, features_b, labels, step=step, teacher=teacher
        )
        return result


@overload
def ramp_up(step: int, steps: int) -> float: ...
@overload
def ramp_up(step: int | Tensor, steps: int) -> float | Tensor: ...
def ramp_up(step: int | Tensor, steps: int) -> float | Tensor:
    """Ramp of the unlabelled losses, exp(-5 (1 - step / steps)^2), and 1 from `steps` on (Laine & Aila, ICLR 2017).

    Returns:
        A number if `step` is a number, a tensor [] float64 if it is a tensor.
    """
    left = 1 - ramp_progress(step, steps)
    return (-5 * left * left).exp() if isinstance(left, Tensor) else math.exp(-5 * left * left)


def ramp_progress(step: int | Tensor, steps: int) -> float | Tensor:
    """step / steps, at most 1."""
    return (step.double() / steps).clamp_max(1) if isinstance(step, Tensor) else min(step / steps, 1)
