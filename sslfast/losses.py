"""The dual contrastive loss as a module for anyone's training loop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from sslfast.ops.check import MAX_CLASSES, check_logits, check_pair, check_range
from sslfast.ops.dual_contrastive import Options, PseudoLabel, Weights, dual_contrastive
from sslfast.ops.linear_logits import Logits, classify
from sslfast.ops.ranks import Ranks
from sslfast.ops.reliability import MODES

Preset = Literal["recommended", "corrected", "as-released"]

PRESETS: dict[str, dict[str, Any]] = {
    "recommended": {
        "percentile": 20.0,
        "mode": "winner",
        "pseudo_label": "rectified",
        "students": "both",
        "pseudo_dice_weight": 1.0,
        "contrast_weight": 0.1,
        "contrast": "infonce",
        "rescale": False,
    },
    "corrected": {
        "percentile": (80.0, 100.0),
        "mode": "winner",
        "pseudo_label": "winner",
        "students": "loser",
        "pseudo_dice_weight": 0.0,
        "contrast_weight": 0.1,
        "contrast": "infonce",
        "rescale": False,
    },
    "as-released": {
        "percentile": 20.0,
        "mode": "union",
        "pseudo_label": "union",
        "students": "both",
        "pseudo_dice_weight": 0.0,
        "contrast_weight": 0.1,
        "contrast": "distance",
        "rescale": True,
    },
}


@dataclass(frozen=True)
class DualLoss:
    """What one step of a dual-network method gives."""

    loss_a: Tensor  # [] for network a
    loss_b: Tensor  # [] for network b
    terms: Mapping[str, Tensor]  # every part, detached

    @property
    def loss(self) -> Tensor:
        """The sum to call backward on."""
        return self.loss_a + self.loss_b


class DualContrastiveLoss(nn.Module):
    """Supervised, discrepancy, pseudo-label and contrastive loss of two networks (arXiv 2311.12617).

    The labelled volumes come first in the batch. On them each network has cross-entropy + Dice + `alpha` x discrepancy
    loss; the network with the lower Dice loss is the winner, the other the loser. On the unlabelled volumes each network
    learns the other's class where the other's entropy lies below a percentile, the less the more they differ (arXiv
    2505.17690), and cosine and Dice between their probabilities draw them together everywhere; given a teacher, both learn
    from it in place of each other (`sslfast.taught_view` makes one, and gains most). A voxel is unreliable where
    the winner's entropy lies above: a sample of such voxels is pulled to the prototype of its class and away from the other
    prototypes and from sampled reliable voxels of other classes (InfoNCE), in the loser's features. In the paper the loser
    alone learns, the winner's class by cross-entropy on the reliable voxels (preset="corrected"); benchmarks/NOTES.md says
    what each of these choices gains.

        criterion = DualContrastiveLoss(num_classes=2)
        result = criterion(logits_a, logits_b, features_a, features_b, labels, step=step)
        result.loss.backward()

    Args:
        num_classes: C, 2 to 32; class 0 is background.
        percentile: entropy percentile below which a voxel is reliable: a number, or (first, last) to go linearly from
            one to the other within `ramp_steps`. Default 20; as in the paper (80, 100).
        threshold: probability from which a foreground prediction is confident, for the discrepancy mask.
        temperature: of the InfoNCE softmax.
        anchors: unreliable voxels drawn for each class and step.
        negatives: reliable voxels of other classes drawn for each class and step; 0 leaves the prototypes alone.
        seed: of the voxel sample; the draw depends on (seed, step, masks) and on nothing else.
        preset: "recommended"; "corrected": as in the paper; or "as-released": what the published code computes, in which
            no unlabelled voxel gives a gradient, for comparison only. A preset sets the options whose default is None; one
            given explicitly wins.
        alpha: weight of the discrepancy loss.
        pseudo_weight: weight of the pseudo-labels' cross-entropy, and of the cosine, at the end of the ramp.
        pseudo_dice_weight: weight of their Dice loss, or of Dice between the networks, at the end of the ramp. Most voxels
            are background: without it a small structure has little say. Default 1; as in the paper 0.
        contrast_weight: weight of the contrastive loss at the end of the ramp. Default 0.1.
        ramp_steps: length of the ramp exp(-5 (1 - step / ramp_steps)^2) of these weights.
        ignore_index: label of voxels that nobody annotated.
        mode: whose entropy decides what is reliable, for the contrast and plain pseudo-labels: the "winner"'s, either network's ("union") or "both"'s;
            with a teacher always the teacher's.
        pseudo_label: "rectified" (each network learns the other's class where the other is sure, weighed by agreement, and
            both are drawn together); or plain cross-entropy and Dice on the reliable voxels against the class of the
            "winner", the higher class ("union") or the other network's ("cross"). A teacher takes the place of all these.
        students: who learns pseudo-labels: the "loser" or "both"; of "rectified" ones always both.
        winner: decided by this "batch" or by the "ema" of the Dice losses of the steps before.
        ema_decay: of that average.
        contrast: "infonce" or "distance" (mean distance to the own prototype, plus the distance between the
            prototypes of classes 0 and 1, as released).
        anchor_label: an anchor's class is the "winner"'s or the "loser"'s prediction.
        grad_keys: lets gradients through prototypes and negatives.
        per_class_percentile: a percentile for each predicted class. With one for all, a class that is not among the surest
            voxels has no prototype, and where that leaves background alone the contrastive loss is 0.
        rescale: multiplies the pseudo-label loss by voxels / reliable voxels, as released; not of "rectified" ones.
        group: the processes of a data-parallel run whose batches count as one, such as `torch.distributed.group.WORLD`: the
            percentiles, prototypes, samples, class counts and Dice sums go over all of them, and the loss is that of the
            whole batch. Its gradient suits DistributedDataParallel, which averages over the processes. None: each its own.

    Raises:
        ValueError: an option out of range, or options that exclude each other: rectified pseudo-labels teach both students, so
            that with preset="corrected" they need students="both" too.
    """

    dice_ema: Tensor  # [2] average Dice loss of network a and b over the previous steps
    ema_steps: Tensor  # [] int64

    def __init__(
        self,
        num_classes: int,
        *,
        percentile: float | tuple[float, float] | None = None,
        threshold: float = 0.6,
        temperature: float = 0.1,
        anchors: int = 256,
        negatives: int = 512,
        seed: int = 1337,
        preset: Preset = "recommended",
        alpha: float = 0.5,
        pseudo_weight: float = 1.0,
        pseudo_dice_weight: float | None = None,
        contrast_weight: float | None = None,
        ramp_steps: int = 6000,
        ignore_index: int = -1,
        mode: Literal["winner", "union", "both"] | None = None,
        pseudo_label: Literal["winner", "union", "cross", "rectified"] | None = None,
        students: Literal["loser", "both"] | None = None,
        winner: Literal["batch", "ema"] = "batch",
        ema_decay: float = 0.99,
        contrast: Literal["infonce", "distance"] | None = None,
        anchor_label: Literal["winner", "loser"] = "winner",
        grad_keys: bool = False,
        per_class_percentile: bool = False,
        rescale: bool | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        _check_choice("preset", preset, tuple(PRESETS))
        chosen = dict(PRESETS[preset])
        given = {
            "percentile": percentile,
            "mode": mode,
            "pseudo_label": pseudo_label,
            "students": students,
            "pseudo_dice_weight": pseudo_dice_weight,
            "contrast_weight": contrast_weight,
            "contrast": contrast,
            "rescale": rescale,
        }
        chosen.update({name: value for name, value in given.items() if value is not None})
        span = chosen["percentile"]
        self.percentile = tuple(span) if isinstance(span, (tuple, list)) else (span, span)
        if len(self.percentile) != 2:
            raise ValueError(f"percentile is {span}; it must be a number or a pair (first, last)")
        for q in self.percentile:
            check_range("percentile", q, 0, 100)
        check_range("num_classes", num_classes, 2, MAX_CLASSES)
        check_range("threshold", threshold, 0, 1)
        check_range("temperature", temperature, 1e-6, 1e6)
        check_range("anchors", anchors, 0, math.inf)
        check_range("negatives", negatives, 0, math.inf)
        check_range("ramp_steps", ramp_steps, 1, math.inf)
        check_range("ema_decay", ema_decay, 0, 1)
        _check_choice("mode", chosen["mode"], MODES)
        _check_choice("pseudo_label", chosen["pseudo_label"], get_args(PseudoLabel))
        _check_choice("students", chosen["students"], ("loser", "both"))
        _check_choice("winner", winner, ("batch", "ema"))
        _check_choice("contrast", chosen["contrast"], ("infonce", "distance"))
        _check_choice("anchor_label", anchor_label, ("winner", "loser"))
        one_sided = chosen["students"] != "both" or chosen["rescale"] or preset == "as-released"
        if chosen["pseudo_label"] == "rectified" and one_sided:
            raise ValueError(
                "pseudo_label='rectified' needs students='both', rescale=False and another preset than 'as-released'"
            )
        self.num_classes = num_classes
        self.ranks = Ranks(group)
        self.alpha = alpha
        self.pseudo_weight = pseudo_weight
        self.pseudo_dice_weight = chosen["pseudo_dice_weight"]
        self.contrast_weight = chosen["contrast_weight"]
        self.ramp_steps = ramp_steps
        self.winner = winner
        self.ema_decay = ema_decay
        self.options = Options(
            threshold=threshold,
            ignore_index=ignore_index,
            mode=chosen["mode"],
            pseudo_label=chosen["pseudo_label"],
            anchor_label=anchor_label,
            students=chosen["students"],
            per_class_percentile=per_class_percentile,
            rescale=chosen["rescale"],
            contrast=chosen["contrast"],
            temperature=temperature,
            anchors=anchors,
            negatives=negatives,
            grad_keys=grad_keys,
            seed=seed,
            released=preset == "as-released",
        )
        self.register_buffer("dice_ema", torch.zeros(2))
        self.register_buffer("ema_steps", torch.zeros((), dtype=torch.int64))

    def forward(
        self,
        logits_a: Logits,
        logits_b: Logits,
        features_a: Tensor,
        features_b: Tensor,
        labels: Tensor,
        step: int = 0,
        teacher: Tensor | None = None,
    ) -> DualLoss:
        """The losses of one batch of N volumes, the first L = len(labels) labelled.

        Args:
            logits_a, logits_b: [N, C, D, H, W] float32, bfloat16, float16 or float64; or `LinearLogits`, never stored.
            features_a, features_b: [N, K, D, H, W], the classifiers' inputs; in CUDA K is at most 256.
            labels: [L, D, H, W] integers in 0..C-1 or `ignore_index`, 1 <= L <= N.
            step: training step, for the ramps and the voxel sample.
            teacher: [N - L, C, D, H, W] logits or log-probabilities of who teaches both networks on the unlabelled volumes,
                where else they teach each other, such as that of `sslfast.taught_view`. Its entropy and its class decide
                what is reliable; no gradient flows to it. Of several processes in `group` all give one, or none does.

        Returns:
            loss_a, loss_b, their sum `loss`, and `terms`, by name: `ce`, `dice`, `discrepancy`, `pseudo` and `pseudo_dice` [2], of
            network a and b; `contrast` []; `winner` [], 0 for a and 1 for b; `thresholds` [2] or [2, C], the entropies, nats, at
            the percentile; `kept_fraction` [] of the unlabelled voxels that teach; and numbers of voxels: `mask_voxels` []
            where confident predictions disagree, `reliable` [C] and `anchors` [C] by class.
            A mean over no voxel, be it that nobody is sure or reliable, that there is no anchor or no unlabelled volume, is
            exactly 0. NaN or infinite logits give a NaN loss; with a teacher, where a part of the loss reads them.

        Raises:
            ValueError, TypeError: an argument's shape, dtype or device; a label out of range; no labelled volume.
            RuntimeError: a CUDA graph is being captured: every replay would repeat this step's sample and weights.
        """
        self._check(logits_a, logits_b, features_a, features_b, labels)
        if teacher is not None:
            if not teacher.is_floating_point():
                raise TypeError(f"teacher has dtype {teacher.dtype}; it must be floating: logits or log-probabilities")
            teacher = teacher.detach().to(logits_a.dtype)
            if self.options.released:
                raise ValueError('preset="as-released" takes no teacher: in it nothing teaches the unlabelled volumes')
            check_pair("the unlabelled logits_a", logits_a[len(labels) :], "teacher", teacher)
        progress = min(step / self.ramp_steps, 1)
        ramp = ramp_up(step, self.ramp_steps)
        rising = (ramp * w for w in (self.pseudo_weight, self.pseudo_dice_weight, self.contrast_weight))
        weights = Weights(self.alpha, *rising)
        percentile = self.percentile[0] + (self.percentile[1] - self.percentile[0]) * progress
        winner = (self.dice_ema[1] < self.dice_ema[0]).long() if self.winner == "ema" else None
        losses, terms = dual_contrastive(
            *(logits_a, logits_b, features_a, features_b, labels, self.options, weights, percentile, winner, step),
            self.ranks,
            teacher,
        )
        if self.winner == "ema" and self.training:
            self._follow(terms["dice"])
        return DualLoss(losses[0], losses[1], terms)

    @torch.no_grad()
    def _follow(self, dice: Tensor) -> None:
        """Moves the average of the Dice losses [2] on by one step."""
        decay = torch.where(self.ema_steps == 0, 0.0, self.ema_decay)
        self.dice_ema.copy_(torch.where(dice.isfinite(), decay * self.dice_ema + (1 - decay) * dice, self.dice_ema))
        self.ema_steps += 1

    def _check(
        self, logits_a: Logits, logits_b: Logits, features_a: Tensor, features_b: Tensor, labels: Tensor
    ) -> None:
        check_logits(logits_a, logits_b)
        check_pair("features_a", features_a, "features_b", features_b)
        if logits_a.shape[1] != self.num_classes:
            raise ValueError(
                f"logits_a has {logits_a.shape[1]} classes (dimension 1); this loss was made for {self.num_classes}"
            )
        if features_a.shape[0] != logits_a.shape[0] or features_a.shape[2:] != logits_a.shape[2:]:
            raise ValueError(
                f"features_a has shape {tuple(features_a.shape)}; for logits_a {tuple(logits_a.shape)} it must be "
                f"[{logits_a.shape[0]}, K, {', '.join(map(str, logits_a.shape[2:]))}]"
            )
        if features_a.device != logits_a.device:
            raise ValueError(
                f"features_a is on {features_a.device}; it must be on the device of logits_a, {logits_a.device}"
            )
        least = 1 if self.ranks.size == 1 else 0  # another process may have some
        if labels.ndim != logits_a.ndim - 1 or not least <= len(labels) <= len(logits_a):
            raise ValueError(
                f"labels has shape {tuple(labels.shape)}; for logits_a {tuple(logits_a.shape)} it must be [L, "
                f"{', '.join(map(str, logits_a.shape[2:]))}] with 1 to {len(logits_a)} labelled volumes"
            )


class DualContrastiveHead(nn.Module):
    """Both networks' 1x1x1 classifiers and `DualContrastiveLoss` in one, so that training stores no logits.

    The loss computes them from the features wherever it reads them, and writes the gradient of the features once: that of
    the classifier and that of the contrast together. The results are those of classifier and loss, to rounding. On a GPU, and
    with `grad_keys`, `rescale`, contrast="distance" or preset="as-released", the logits are stored.

        head = DualContrastiveHead(num_classes=2, channels=16, dropout=0.5)
        result = head(features_a, features_b, labels, step=step)
        result.loss.backward()

    In evaluation, `head.classifier_a(features_a)` gives the logits.

    Args:
        num_classes: C, 2 to 32.
        channels: K, of each network's features.
        dropout: rate of the channel dropout (Dropout3d) between features and classifier; the contrast sees the features
            before it.
        options: of `DualContrastiveLoss`.
    """

    def __init__(self, num_classes: int, channels: int, *, dropout: float = 0.0, **options: Any) -> None:
        super().__init__()
        self.classifier_a = nn.Conv3d(channels, num_classes, 1)
        self.classifier_b = nn.Conv3d(channels, num_classes, 1)
        self.dropout = nn.Dropout3d(dropout)
        self.criterion = DualContrastiveLoss(num_classes, **options)

    def forward(
        self, features_a: Tensor, features_b: Tensor, labels: Tensor, step: int = 0, teacher: Tensor | None = None
    ) -> DualLoss:
        """As `DualContrastiveLoss`, of features [N, K, D, H, W]; the first L = len(labels) volumes are labelled."""
        check_pair("features_a", features_a, "features_b", features_b)
        logits_a = classify(self.classifier_a, features_a, self.dropout)
        logits_b = classify(self.classifier_b, features_b, self.dropout)
        return self.criterion(logits_a, logits_b, features_a, features_b, labels, step=step, teacher=teacher)


def ramp_up(step: int, steps: int) -> float:
    """exp(-5 (1 - step / steps)^2), 1 from `steps` on: the weight of what unlabelled volumes teach (Laine & Aila, ICLR 2017)."""
    return math.exp(-5 * (1 - min(step / steps, 1)) ** 2)


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
