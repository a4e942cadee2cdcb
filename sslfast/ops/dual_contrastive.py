"""`dual_contrastive`: the whole step, composed of the ops; fused, its gradients are written once, into the whole batch."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sslfast.ops.backend import define, empty_like, fake, has_whole_step, kernels, runs_fused, zeros_like
from sslfast.ops.check import INTEGERS, check_step, check_voxels
from sslfast.ops.class_prototypes import ClassPrototypes, class_prototypes, unit
from sslfast.ops.dual_supervised import dual_supervised, dual_supervised_backward
from sslfast.ops.linear_logits import Logits, empty_gradient, join, readable, split, stored
from sslfast.ops.pseudo_supervised import pseudo_supervised, pseudo_supervised_backward
from sslfast.ops.ranks import ALONE, Ranks
from sslfast.ops.rectified_consistency import rectified_consistency, rectified_consistency_backward
from sslfast.ops.reliability import MODES, AnchorLabelOf, Mode, reliability
from sslfast.ops.sample_voxels import gather_over_ranks, gather_voxels, sample_voxels, signed
from sslfast.ops.voxel_infonce import prefers_dense, valid_anchors, voxel_infonce

SMOOTH = 1e-5  # Dice's epsilon

PseudoLabel = Literal["winner", "union", "cross", "rectified"]


@dataclass(frozen=True)
class Options:
    """What stays the same from step to step; `sslfast.DualContrastiveLoss` explains each."""

    threshold: float
    ignore_index: int
    mode: Mode
    pseudo_label: PseudoLabel
    anchor_label: AnchorLabelOf
    students: Literal["loser", "both"]
    per_class_percentile: bool
    rescale: bool
    contrast: Literal["infonce", "distance"]
    temperature: float
    anchors: int
    negatives: int
    grad_keys: bool
    seed: int
    released: bool

    @property
    def target(self) -> Literal["state", "other", "rectified"]:
        """What teaches unlabelled voxels: the byte map's class, the other network's, or `rectified_consistency`."""
        if self.pseudo_label == "rectified":
            return "rectified"
        return "other" if self.pseudo_label == "cross" else "state"


TARGETS = ("state", "other", "rectified")  # as the kernels count them


class Weights(NamedTuple):
    """Of the loss terms, at this step."""

    discrepancy: float
    pseudo: float
    pseudo_dice: float
    contrast: float


class DualContrastive(NamedTuple):
    """Both networks' losses and every part of them."""

    losses: Tensor  # [2]
    terms: Mapping[str, Tensor]  # detached


def dual_contrastive(
    logits_a: Logits,
    logits_b: Logits,
    features_a: Tensor,
    features_b: Tensor,
    labels: Tensor,
    options: Options,
    weights: Weights,
    percentile: float,
    winner: Tensor | None,
    step: int,
    ranks: Ranks = ALONE,
    teacher: Tensor | None = None,
) -> DualContrastive:
    """The losses of one batch of N volumes, the first L = len(labels) labelled (arXiv 2311.12617).

    Args:
        logits_a, logits_b: [N, C, *spatial].
        features_a, features_b: [N, K, *spatial].
        labels: [L, *spatial].
        options: what stays the same from step to step; `DualContrastiveLoss` says what each does.
        weights: of the losses at this step.
        percentile: entropy percentile of this step.
        winner: [] int64, 0 or 1; None: the network with the lower Dice loss on this batch.
        step: of the voxel sample.
        ranks: the processes whose batches count as one.
        teacher: [N - L, C, *spatial] logits of who teaches the unlabelled volumes in place of the other network.
    """
    check_step(step, logits_a.device)
    rest = labels, options, weights, percentile, winner, step, ranks, teacher
    plain = options.contrast == "infonce" and not (options.grad_keys or options.rescale or options.released)
    classes, width = logits_a.shape[1], features_a.shape[1]
    dense = prefers_dense(logits_a.device.type, classes * options.anchors, classes + options.negatives, width)
    if not plain or dense or not runs_fused(logits_a, logits_b, features_a, features_b):
        losses, terms, _ = dual_contrastive_ref(stored(logits_a), stored(logits_b), features_a, features_b, *rest)
        return DualContrastive(losses, {name: value.detach() for name, value in terms.items()})
    logits_a, logits_b = readable(logits_a), readable(logits_b)
    if ranks.size == 1 and teacher is None and has_whole_step(logits_a):
        losses, *values = _WholeStep.apply(stored(logits_a), stored(logits_b), features_a, features_b, *rest[:-2])
    else:
        losses, *values = _Fused.apply(
            *_with_features(logits_a, features_a), *_with_features(logits_b, features_b), *rest
        )
    return DualContrastive(losses, dict(zip(TERMS, values, strict=True)))


TERMS = (
    "ce",  # [2]
    "dice",  # [2]
    "discrepancy",  # [2]
    "mask_voxels",  # []
    "winner",  # []
    "thresholds",  # [2] or [2, C]
    "pseudo",  # [2]
    "pseudo_dice",  # [2]
    "contrast",  # []
    "kept_fraction",  # []
    "reliable",  # [C]
    "anchors",  # [C]
)


def dual_contrastive_ref(
    logits_a: Logits,
    logits_b: Logits,
    features_a: Tensor,
    features_b: Tensor,
    labels: Tensor,
    options: Options,
    weights: Weights,
    percentile: float,
    winner: Tensor | None,
    step: int,
    ranks: Ranks = ALONE,
    teacher: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor], _Kept]:
    """The specification: the ops one after the other, each as the backend computes it."""
    labelled = len(labels)
    supervised = dual_supervised(
        logits_a[:labelled],
        logits_b[:labelled],
        labels,
        threshold=options.threshold,
        ignore_index=options.ignore_index,
        smooth=SMOOTH,
        ranks=ranks,
    )
    if winner is None:
        winner = (supervised.dice[1] < supervised.dice[0]).long()
    is_loser = torch.stack((winner == 1, winner == 0)).to(supervised.ce.dtype)  # [2]

    unlabelled = targets = logits_a[labelled:], logits_b[labelled:]
    if options.released:  # the published code computes all that follows on detached probabilities
        p_a, p_b = (stored(z).detach().softmax(1) for z in unlabelled)
        unlabelled, targets = (p_a.log(), p_b.log()), (p_a, p_b)
    thresholds, state = reliability(
        *(unlabelled if teacher is None else (teacher, teacher)),
        percentile,
        mode=options.mode,
        winner=winner,
        label="union" if options.pseudo_label == "union" else "winner",
        anchor_label=options.anchor_label,
        per_class=options.per_class_percentile,
        ranks=ranks,
    )
    target = options.target if teacher is None or options.target == "rectified" else "state"
    if target == "rectified":
        agree = functools.partial(rectified_consistency, state=state, smooth=SMOOTH, ranks=ranks)
        if teacher is None:
            agreed = agree(*targets)
            pseudo, pseudo_dice = _shared(agreed.rectified, agreed.cosine, agreed.dice)
            taught, pseudo_sums = agreed.voxels, agreed.products
            kept = taught[:2].sum() / (2 * taught[2]).clamp_min(1)
        else:
            each = [agree(student, teacher) for student in targets]
            pseudo = torch.stack([found.rectified[0] + found.cosine for found in each])
            pseudo_dice = torch.stack([found.dice for found in each])
            taught, pseudo_sums = (torch.stack(sums) for sums in zip(*(found[3:] for found in each), strict=True))
            kept = taught[0, 0] / taught[0, 2].clamp_min(1)
    else:
        pseudo, pseudo_dice, taught, pseudo_sums = pseudo_supervised(
            *targets, state, target=target, smooth=SMOOTH, ranks=ranks
        )
        voxels = ranks.sum(taught.new_full((), state.numel())).clamp_min(1)
        kept = taught / voxels
        if options.rescale:
            pseudo = pseudo * (voxels / taught.clamp_min(1))

    features = _Loser.of(winner, features_a[labelled:], features_b[labelled:])
    if options.released:
        features = features.detach()
    keys = features if options.grad_keys else features.detach()
    num_classes = logits_a.shape[1]
    sums, reliable = keys.prototypes(state, num_classes, ranks)
    drawn = functools.partial(sample_voxels, state, seed=options.seed, step=step, ranks=ranks)
    anchor_sample = drawn([options.anchors] * num_classes, role="anchors")
    anchors = features.gather(anchor_sample.indices)
    if options.contrast == "distance":
        negatives, negative_counts = anchors[:, :0], anchor_sample.counts
        contrast = _distance(anchors, anchor_sample.counts, sums, reliable, ranks)
        lse = share = sums
    else:
        sample = drawn([options.negatives] * num_classes, role="negatives")
        negatives, negative_counts = gather_over_ranks(keys.gather(sample.indices), sample.counts, ranks)
        contrast, lse, share = voxel_infonce(
            anchors,
            anchor_sample.counts,
            sums,
            reliable,
            negatives,
            negative_counts,
            temperature=options.temperature,
            ranks=ranks,
        )

    learns = is_loser if options.students == "loser" else torch.ones_like(is_loser)
    unseen = thresholds.sum().to(supervised.ce.dtype) * 0  # NaN if a logit is NaN or infinite, else 0
    losses = (
        supervised.ce
        + supervised.dice
        + weights.discrepancy * supervised.discrepancy
        + learns * (weights.pseudo * pseudo + weights.pseudo_dice * pseudo_dice)
        + weights.contrast * is_loser * contrast
        + unseen
    )  # [2]
    terms = dict(
        zip(
            TERMS,
            (
                *(*supervised[:4], winner, thresholds, pseudo, pseudo_dice),
                *(contrast, kept, reliable, ranks.sum(anchor_sample.counts)),
            ),
            strict=True,
        )
    )
    of_pseudo = state, taught, pseudo_sums
    infonce = lse, anchors, anchor_sample.counts, sums, reliable, negatives, negative_counts
    kept_values = _Kept(supervised.sums, *of_pseudo, is_loser, learns, share, anchor_sample.indices, *infonce)
    return losses, terms, kept_values


class _Kept(NamedTuple):
    """What the gradient needs besides the arguments."""

    supervised_sums: Tensor
    state: Tensor
    taught: Tensor  # voxels: [], or [3] of `rectified_consistency`, with a teacher [2, 3]
    pseudo_sums: Tensor
    is_loser: Tensor  # [2]
    learns: Tensor  # [2]
    share: Tensor  # [] of the anchors
    anchor_indices: Tensor
    lse: Tensor
    anchors: Tensor
    anchor_counts: Tensor
    prototypes: Tensor
    prototype_counts: Tensor
    negatives: Tensor
    negative_counts: Tensor


class _Loser(NamedTuple):
    """The loser's features: `other` where `second` is not 0. The host may know: then there is no `other`."""

    features: Tensor  # [U, K, *spatial]
    other: Tensor | None
    second: Tensor | None  # []

    @classmethod
    def of(cls, winner: Tensor, a: Tensor, b: Tensor) -> _Loser:
        if _is_known(winner):
            return cls(a if winner else b, None, None)
        return cls(b, a, winner)

    def detach(self) -> _Loser:
        return _Loser(self.features.detach(), None if self.other is None else self.other.detach(), self.second)

    def prototypes(self, state: Tensor, num_classes: int, ranks: Ranks) -> ClassPrototypes:
        return class_prototypes(self.features, state, num_classes, other=self.other, second=self.second, ranks=ranks)

    def gather(self, indices: Tensor) -> Tensor:
        rows = gather_voxels(self.features, indices)
        if self.other is None or self.second is None:
            return rows
        return torch.where(self.second != 0, gather_voxels(self.other, indices), rows)


def _shared(rectified: Tensor, cosine: Tensor, dice: Tensor) -> tuple[Tensor, Tensor]:
    """Each network's pseudo-label and Dice loss [2] from `rectified_consistency`: what belongs to both is halved."""
    return rectified + cosine / 2, (dice / 2).expand(2)


def _is_known(value: Tensor) -> bool:
    """True if the host reads the value without waiting for a device or breaking a compiled graph."""
    return value.device.type == "cpu" and not torch.compiler.is_compiling()


def _distance(anchors: Tensor, anchor_counts: Tensor, sums: Tensor, prototype_counts: Tensor, ranks: Ranks) -> Tensor:
    """Mean distance of the anchors to their prototype, plus the distance of the first two prototypes, as released."""
    prototypes = unit(sums, dim=-1)  # [C, K]
    used = valid_anchors(anchor_counts, prototype_counts, anchors.shape[1])  # [C, A]
    apart = torch.linalg.vector_norm(unit(anchors.to(sums.dtype), dim=-1) - prototypes.unsqueeze(1), dim=-1)
    to_own = (ranks.sum(torch.where(used, apart, 0).sum(1)) / ranks.sum(used.sum(1)).clamp_min(1)).sum()
    both = (prototype_counts[:2] > 0).all()
    return to_own + torch.where(both, torch.linalg.vector_norm(prototypes[1] - prototypes[0]), 0)


def _with_features(logits: Logits, features: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(values, weights, features) for `_Fused`; features that are the values already: None, so that they get one gradient."""
    values, weights = split(logits)
    return values, weights, None if values is features else features


class _Fused(torch.autograd.Function):
    """The same values; the backward pass writes each gradient of the batch once, where autograd would fill and add slices."""

    @staticmethod
    def forward(
        ctx: Any,
        values_a: Tensor,
        weights_a: Tensor | None,
        features_a: Tensor | None,
        values_b: Tensor,
        weights_b: Tensor | None,
        features_b: Tensor | None,
        labels: Tensor,
        options: Options,
        weights: Weights,
        percentile: float,
        winner: Tensor | None,
        step: int,
        ranks: Ranks,
        teacher: Tensor | None,
    ) -> tuple[Tensor, ...]:
        losses, terms, kept = dual_contrastive_ref(
            join(values_a, weights_a),
            join(values_b, weights_b),
            values_a if features_a is None else features_a,
            values_b if features_b is None else features_b,
            *(labels, options, weights, percentile, winner, step, ranks, teacher),
        )
        ctx.save_for_backward(values_a, weights_a, features_a, values_b, weights_b, features_b, labels, teacher, *kept)
        ctx.options, ctx.weights, ctx.size = options, weights, ranks.size
        values = tuple(terms[name].clone() if terms[name] is winner else terms[name] for name in TERMS)
        ctx.mark_non_differentiable(*values)
        return losses, *values

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        values_a, weights_a, features_a, values_b, weights_b, features_b, labels, teacher, *rest = ctx.saved_tensors
        kept, options, weights, ops = _Kept(*rest), ctx.options, ctx.weights, kernels(values_a)
        logits_a, logits_b, first = join(values_a, weights_a), join(values_b, weights_b), len(labels)
        grad_a, grad_b = empty_gradient(logits_a), empty_gradient(logits_b)
        grad_losses = ctx.size * grad_losses
        dual_supervised_backward(
            torch.stack((grad_losses, grad_losses, weights.discrepancy * grad_losses)),
            logits_a[:first],
            logits_b[:first],
            labels,
            kept.supervised_sums,
            options.threshold,
            options.ignore_index,
            SMOOTH,
            grad_a[:first],
            grad_b[:first],
        )
        by_pseudo, by_dice = (w * grad_losses * kept.learns for w in (weights.pseudo, weights.pseudo_dice))  # [2] each
        students, to_students = (logits_a[first:], logits_b[first:]), (grad_a[first:], grad_b[first:])
        held = kept.state, kept.taught, kept.pseudo_sums
        if options.target != "rectified":
            by_losses, by_other = torch.stack((by_pseudo, by_dice)), options.target == "other" and teacher is None
            pseudo_supervised_backward(by_losses, *students, *held, by_other, SMOOTH, *to_students)
        elif teacher is None:
            by_both = torch.stack((by_pseudo, by_dice)).mean(1)
            rectified_consistency_backward(torch.cat((by_pseudo, by_both)), *students, *held, SMOOTH, *to_students)
        else:
            by_terms = torch.stack((by_pseudo, torch.zeros_like(by_pseudo), by_pseudo, by_dice), 1)  # [2, 4]
            unused = empty_like(teacher)  # its own gradient
            for n, (student, to_student) in enumerate(zip(students, to_students, strict=True)):
                pair = student, teacher, kept.state, kept.taught[n], kept.pseudo_sums[n]
                rectified_consistency_backward(by_terms[n], *pair, SMOOTH, to_student, unused)
        grad_rows, _, _ = ops.voxel_infonce_backward(
            (weights.contrast * kept.share * kept.is_loser * grad_losses).sum(), *kept[8:], options.temperature, False
        )
        found: list[Tensor | None] = []
        for features, grad_logits, is_loser in zip(
            (features_a, features_b), (grad_a, grad_b), kept.is_loser, strict=True
        ):
            values, grad_weights = split(grad_logits)
            grad = None
            if not _is_known(is_loser) or is_loser:
                grad = values if features is None else zeros_like(features)
                ops.gather_voxels_backward(grad_rows * is_loser, kept.anchor_indices, grad[first:])
            found += [values, grad_weights, None if features is None else grad]
        return *found, *(8 * [None])


define(
    "dual_contrastive(Tensor logits_a, Tensor logits_b, Tensor features_a, Tensor features_b, Tensor labels, Tensor? winner,"
    " float threshold, int ignore_index, float smooth, float percentile, int mode, bool union_label, bool loser_anchor,"
    " bool per_class, int target, bool loser_learns, int anchors, int negatives, int seed, int step, float temperature,"
    " float discrepancy, float pseudo, float pseudo_dice, float contrast) -> (Tensor losses, Tensor supervised,"
    " Tensor mask_voxels, Tensor sums, Tensor chosen_winner, Tensor thresholds, Tensor state, Tensor pseudo_losses,"
    " Tensor pseudo_voxels, Tensor pseudo_sums, Tensor kept, Tensor prototypes, Tensor reliable, Tensor anchor_indices, Tensor anchor_counts, Tensor anchor_rows,"
    " Tensor negative_counts, Tensor negative_rows, Tensor contrast_loss, Tensor lse)"
)
define(
    "dual_contrastive_backward(Tensor grad_losses, Tensor logits_a, Tensor logits_b, Tensor labels, Tensor sums,"
    " Tensor winner, Tensor state, Tensor pseudo_voxels, Tensor pseudo_sums, Tensor anchor_indices, Tensor lse, Tensor anchor_rows,"
    " Tensor anchor_counts, Tensor prototypes, Tensor reliable, Tensor negative_rows, Tensor negative_counts,"
    " float threshold, int ignore_index, float smooth, int target, bool loser_learns, float temperature, float discrepancy,"
    " float pseudo, float pseudo_dice, float contrast, Tensor(a!) grad_a, Tensor(b!) grad_b, Tensor(c!) grad_features_a,"
    " Tensor(d!) grad_features_b) -> ()"
)


@fake("dual_contrastive")
def _(
    logits_a: Tensor,
    logits_b: Tensor,
    features_a: Tensor,
    features_b: Tensor,
    labels: Tensor,
    winner: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:
    per_class, target, anchors, negatives = options[7], options[8], options[10], options[11]
    rectified = TARGETS[target] == "rectified"
    unlabelled, classes, width = logits_a.shape[0] - labels.shape[0], logits_a.shape[1], features_a.shape[1]

    def of(dtype: torch.dtype, *shape: int) -> Tensor:
        return logits_a.new_empty(shape, dtype=dtype)

    float32, int64 = torch.float32, torch.int64
    return (
        of(float32, 2),
        of(float32, 3, 2),
        of(int64),
        of(torch.float64, 5 + 5 * classes),
        of(int64),
        of(float32, 2, classes) if per_class else of(float32, 2),
        of(torch.uint8, unlabelled, *logits_a.shape[2:]),
        of(float32, 4) if rectified else of(float32, 2, 2),
        of(int64, 3) if rectified else of(int64),
        of(torch.float64, 3, classes) if rectified else of(torch.float64, 6 * classes),
        of(float32),
        of(float32, classes, width),
        of(int64, classes),
        of(int64, classes, anchors),
        of(int64, classes),
        of(float32, classes, anchors, width),
        of(int64, classes),
        of(float32, classes, negatives, width),
        of(float32),
        of(float32, classes, anchors),
    )


@fake("dual_contrastive_backward")
def _(*_: Any) -> None: ...


class _WholeStep(torch.autograd.Function):
    """The same by one op each way: the host starts a handful of kernels and reads nothing."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_a: Tensor,
        logits_b: Tensor,
        features_a: Tensor,
        features_b: Tensor,
        labels: Tensor,
        options: Options,
        weights: Weights,
        percentile: float,
        winner: Tensor | None,
        step: int,
    ) -> tuple[Tensor, ...]:
        check_voxels("labels", labels, "logits_a", logits_a[: len(labels)], INTEGERS)
        (
            losses,
            supervised,
            mask_voxels,
            sums,
            winner,
            thresholds,
            state,
            pseudo,
            pseudo_voxels,
            pseudo_sums,
            kept,
            prototypes,
            reliable,
            anchor_indices,
            anchor_counts,
            anchors,
            negative_counts,
            negatives,
            contrast,
            lse,
        ) = kernels(logits_a).dual_contrastive(
            logits_a,
            logits_b,
            features_a,
            features_b,
            labels,
            None if winner is None else winner.to(logits_a.device, torch.int64),
            options.threshold,
            options.ignore_index,
            SMOOTH,
            percentile,
            MODES.index(options.mode),
            options.pseudo_label == "union",
            options.anchor_label == "loser",
            options.per_class_percentile,
            TARGETS.index(options.target),
            options.students == "loser",
            options.anchors,
            options.negatives,
            signed(options.seed),
            step,
            options.temperature,
            *weights,
        )
        kept_for_backward = (
            *(sums, winner, state, pseudo_voxels, pseudo_sums, anchor_indices, lse, anchors, anchor_counts),
            *(prototypes, reliable, negatives, negative_counts),
        )
        ctx.save_for_backward(logits_a, logits_b, features_a, features_b, labels, *kept_for_backward)
        ctx.options, ctx.weights = options, weights
        shared = _shared(pseudo[:2], pseudo[2], pseudo[3]) if options.target == "rectified" else pseudo.clone().unbind()
        terms = (
            *(*supervised.clone().unbind(), mask_voxels, winner.clone(), thresholds, *shared),
            *(contrast, kept, reliable.clone(), anchor_counts.clone()),
        )
        ctx.mark_non_differentiable(*terms)
        return losses, *terms

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        logits_a, logits_b, features_a, features_b, labels, *kept = ctx.saved_tensors
        options = ctx.options
        gradients = [empty_like(m) for m in (logits_a, logits_b, features_a, features_b)]
        kernels(logits_a).dual_contrastive_backward(
            grad_losses,
            logits_a,
            logits_b,
            labels,
            *kept,
            options.threshold,
            options.ignore_index,
            SMOOTH,
            TARGETS.index(options.target),
            options.students == "loser",
            options.temperature,
            *ctx.weights,
            *gradients,
        )
        return *gradients, *(6 * [None])
