"""`dual_contrastive`: the losses of a whole step, composed of the ops.

The maps give sums and sampled rows, and these give the losses. There are two paths. The reference composes the
specifications under autograd. The kernels run within one autograd function, whose backward pass writes the gradient of
each map once; autograd would pad the gradients of slices with zeros and add them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslfast.ops.backend import ops_for, runs_fused
from sslfast.ops.buffers import zeros_like
from sslfast.ops.check import check_batch, check_range, compute_dtype
from sslfast.ops.class_balance import class_weights
from sslfast.ops.class_gate import DICE, class_gate, found_share, mean_gate, update_running
from sslfast.ops.contrast_rows import Loser, Rows, is_known
from sslfast.ops.dual_supervised import OP as SUPERVISED
from sslfast.ops.dual_supervised import (
    DiscrepancyOver,
    check_labels,
    supervised_terms,
)
from sslfast.ops.flags import CLASS, count_reliable
from sslfast.ops.linear_logits import Logits, empty_gradient, for_kernels, materialize, pack_logits, unpack_logits
from sslfast.ops.pseudo_supervised import OP as PSEUDO
from sslfast.ops.pseudo_supervised import pseudo_terms
from sslfast.ops.rectified_consistency import OP as RECTIFIED
from sslfast.ops.rectified_consistency import rectified_terms
from sslfast.ops.reduce import SINGLE_PROCESS, Reducer
from sslfast.ops.reliability import reliability
from sslfast.ops.sums import SMOOTH, SumsOp, unpack
from sslfast.ops.voxel_infonce import voxel_infonce
from sslfast.renamed import old_arguments


@dataclass(frozen=True)
class Options:
    """Options that do not change from step to step; `sslfast.DualContrastiveLoss` explains each."""

    rectified: bool  # both networks learn, by `rectified_consistency`; else only the loser, by `pseudo_supervised`
    discrepancy_over: DiscrepancyOver
    class_balance: bool  # whether the cross-entropy on labelled voxels has the weights of `class_weights`
    gate: tuple[float, float]  # running Dice from which a class counts on unlabelled voxels, and from which fully
    ignore_index: int
    contrast: bool  # whether the contrastive loss has a weight; else no row is drawn, and no feature is read
    temperature: float
    anchors: int
    negatives: int
    seed: int
    threshold: float = 0.6  # probability from which a foreground prediction is confident (the published code)
    smooth: float = SMOOTH

    @property
    def pseudo(self) -> SumsOp:
        """The op of the pseudo-label losses."""
        return RECTIFIED if self.rectified else PSEUDO


Weights = Mapping[str, float | Tensor]
"""Weights of the loss terms at this step, by name: numbers, or tensors [] on the device."""


class DualContrastive(NamedTuple):
    """Both networks' losses and their terms."""

    losses: Tensor  # [2]
    terms: Mapping[str, Tensor]  # by name, detached
    running: Tensor  # [4, C] averages that decide the gate and the class weights of the next step


@old_arguments(ranks="reducer")
def dual_contrastive(
    logits_a: Logits,
    logits_b: Logits,
    features_a: Tensor,
    features_b: Tensor,
    labels: Tensor,
    options: Options,
    weights: Weights,
    percentile: float | Tensor,
    step: int | Tensor,
    reducer: Reducer = SINGLE_PROCESS,
    teacher: Tensor | None = None,
    running: Tensor | None = None,
) -> DualContrastive:
    """The losses of one batch of N volumes, the first L = len(labels) labelled (arXiv 2311.12617).

    Args:
        logits_a, logits_b: [N, C, *spatial].
        features_a, features_b: [N, K, *spatial]; with a contrastive loss K must be the same.
        labels: [L, *spatial].
        options: options that do not change from step to step; `DualContrastiveLoss` explains each.
        weights: weights of the loss terms at this step.
        percentile: entropy percentile of this step.
        step: training step, for the voxel sample.
        reducer: process group over which sums are all-reduced.
        teacher: [N - L, C, *spatial] logits of the teacher of both networks on the unlabelled volumes; None: each
            network is the teacher of the other.
        running: [4, C] the result of this name of the previous step; None: there was none.
    """
    batch = logits_a, logits_b, features_a, features_b, labels
    check_batch(*batch, step, teacher, reducer, contrast=options.contrast)
    check_range("the threshold of the options", options.threshold, 0, 1)
    teacher = None if teacher is None else teacher.detach().to(logits_a.dtype)
    rest = labels, options, percentile, step, reducer, teacher
    if runs_fused(logits_a, logits_b, features_a, features_b):
        logits_a, logits_b = for_kernels(logits_a), for_kernels(logits_b)
        maps = *_with_features(logits_a, features_a), *_with_features(logits_b, features_b)
        measured = Measured.unflatten(_Kernels.apply(*maps, *rest))
    else:
        measured, _ = measure(materialize(logits_a), materialize(logits_b), features_a, features_b, *rest, fused=False)
    check_labels(measured.supervised, labels, logits_a.shape[1], options.ignore_index)
    return _losses(measured, options, weights, reducer, teacher is not None, running, compute_dtype(logits_a))


class Measured(NamedTuple):
    """Sums and sampled rows of a step. The first three and the anchors have a gradient."""

    supervised: Tensor  # sums of `dual_supervised`, of this process
    pseudo_a: Tensor  # sums of `Options.pseudo` for network a, of this process
    pseudo_b: Tensor
    winner: Tensor  # []
    thresholds: Tensor  # [2]
    reliable: Tensor  # [C] reliable voxels of all processes, as is the field below
    foreground: Tensor  # [] unlabelled voxels whose class is not 0
    rows: Rows | None  # None: there is no contrastive loss

    @property
    def loser_mask(self) -> Tensor:
        """Bool [2]."""
        return torch.stack((self.winner == 1, self.winner == 0))

    def flatten(self) -> tuple[Tensor, ...]:
        """All tensors; those of the rows, if there are any, come last."""
        *fields, rows = self
        return *fields, *(rows or ())

    @classmethod
    def unflatten(cls, tensors: tuple[Tensor, ...]) -> Measured:
        """From `flatten`."""
        rows = tensors[_ANCHORS:]
        return cls._make((*tensors[:_ANCHORS], Rows._make(rows) if rows else None))


_ANCHORS = len(Measured._fields) - 1  # where the rows begin in `Measured.flatten`


class _Kept(NamedTuple):
    """What the backward pass needs besides the maps."""

    flags_a: Tensor  # flags of network a's teacher
    flags_b: Tensor
    loser_mask: Tensor  # [2]
    anchor_indices: Tensor | None  # [C, A]


def measure(
    logits_a: Logits,
    logits_b: Logits,
    features_a: Tensor,
    features_b: Tensor,
    labels: Tensor,
    options: Options,
    percentile: float | Tensor,
    step: int | Tensor,
    reducer: Reducer,
    teacher: Tensor | None,
    fused: bool,
) -> tuple[Measured, _Kept]:
    """The sums and rows of a step, by the kernels (`fused`) or by the specifications under autograd."""
    num_labelled = len(labels)
    known = logits_a[:num_labelled], logits_b[:num_labelled]
    supervised = _sums(SUPERVISED, fused, known, labels, options.threshold, options.ignore_index)
    with torch.no_grad():
        dice = supervised_terms(reducer.sum(supervised), compute_dtype(logits_a), "mask", options.smooth).dice
        winner = (dice[1] < dice[0]).long()

    students = logits_a[num_labelled:], logits_b[num_labelled:]
    if teacher is None:
        teachers = students[::-1]
        (threshold_b, of_b), (threshold_a, of_a) = (reliability(z, percentile, reducer=reducer) for z in teachers)
        thresholds, flags = torch.stack((threshold_a, threshold_b)), _choose(winner, of_a, of_b)
        student_flags = (of_b, of_a) if options.rectified else (flags, flags)
    else:
        teachers = teacher, teacher
        threshold, flags = reliability(teacher, percentile, reducer=reducer)
        thresholds, student_flags = threshold.expand(2).clone(), (flags, flags)
    pseudo = []
    for student, its_teacher, sure in zip(students, teachers, student_flags, strict=True):
        maps = (student, its_teacher) if options.rectified else (student,)
        pseudo.append(_sums(options.pseudo, fused, maps, sure))

    num_classes = logits_a.shape[1]
    if options.contrast:
        loser = Loser.of(winner, features_a[num_labelled:], features_b[num_labelled:])
        drawn = options.anchors, options.negatives, options.seed
        rows, reliable, indices = loser.draw(flags, num_classes, *drawn, step, reducer)
    else:
        rows, reliable, indices = None, reducer.sum(count_reliable(flags, num_classes)), None
    measured = Measured(
        supervised=supervised,
        pseudo_a=pseudo[0],
        pseudo_b=pseudo[1],
        winner=winner,
        thresholds=thresholds,
        reliable=reliable,
        foreground=reducer.sum((flags & CLASS).count_nonzero()),
        rows=rows,
    )
    return measured, _Kept(*student_flags, measured.loser_mask, indices)


def _sums(op: SumsOp, fused: bool, maps: Sequence[Logits], *rest: Any) -> Tensor:
    return op.forward(maps, *rest) if fused else op.ref(*maps, *rest)


def _losses(
    measured: Measured,
    options: Options,
    weights: Weights,
    reducer: Reducer,
    has_teacher: bool,
    running: Tensor | None,
    dtype: torch.dtype,
) -> DualContrastive:
    """The losses, from the sums and rows of all processes."""
    balance = class_weights(running) if options.class_balance and running is not None else None
    supervised = supervised_terms(
        reducer.sum(measured.supervised), dtype, options.discrepancy_over, class_weights=balance
    )
    sums = [unpack(options.pseudo.slots, reducer.sum(local)) for local in (measured.pseudo_a, measured.pseudo_b)]
    nothing = torch.zeros_like(supervised.class_dice)  # pseudo-labels of reliable voxels suspect no class
    chosen, square = (sum((s[of].detach() for s in sums if of in s), nothing) for of in ("chosen", "teacher_square"))
    running = update_running(running, supervised.class_dice, chosen, square, supervised.class_voxels)
    gate = class_gate(running, *options.gate).to(dtype)  # [C]
    over_all = mean_gate(gate, running)  # []
    if not options.rectified:
        each = [pseudo_terms(s, dtype, gate=gate) for s in sums]
    elif has_teacher:
        each = [rectified_terms(s, dtype, gate) for s in sums]
    else:
        each = [rectified_terms(s, dtype, gate, local_fraction=0.5) for s in _teach_each_other(*sums)]
    pseudo = {name: torch.stack([terms[name] for terms in each]) for name in each[0]}  # [2] each
    gates: Weights = {name: 1.0 if name == "pseudo_dice" else over_all for name in pseudo}  # Dice has one a class
    loser_mask = measured.loser_mask.to(dtype)  # [2]
    student_mask = torch.ones_like(loser_mask) if options.rectified else loser_mask
    kept = (sums[0]["num_selected"] + sums[1]["num_selected"]) / (2 * sums[0]["voxels"]).clamp_min(1)
    nan_guard = measured.thresholds.sum().to(dtype) * 0  # NaN if a teacher's logit is NaN or infinite, else 0
    losses = (
        supervised.ce
        + supervised.dice
        + weights["discrepancy"] * supervised.discrepancy
        + student_mask * sum(weights[name] * gates[name] * value for name, value in pseudo.items())
        + nan_guard
    )  # [2]
    terms: dict[str, Tensor] = {
        **supervised._asdict(),  # ce, dice, discrepancy [2], mask_voxels [], class_dice, class_voxels [C]
        "winner": measured.winner,
        "thresholds": measured.thresholds,  # [2]
        **pseudo,
        "kept_fraction": kept.to(dtype),  # []
        "foreground": (measured.foreground / sums[0]["voxels"].clamp_min(1)).to(dtype),  # []
        "reliable": measured.reliable,  # [C]
        "running_dice": running[DICE],  # [C]
        "found": found_share(running),  # [C]
        "gate": torch.where(running[DICE] < 0, -1, gate),  # [C]
    }
    if rows := measured.rows:
        contrast = voxel_infonce(
            *(rows.anchors, rows.anchor_counts, rows.prototypes, measured.reliable),
            *(rows.negatives, rows.negative_counts),
            temperature=options.temperature,
            reducer=reducer,
        ).loss
        losses = losses + weights["contrast"] * over_all * loser_mask * contrast
        terms |= {"contrast": contrast, "anchors": reducer.sum(rows.anchor_counts)}  # [], [C]
    return DualContrastive(losses, {name: value.detach() for name, value in terms.items()}, running.detach())


def _teach_each_other(a: dict[str, Tensor], b: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The sums of two students that are each other's teacher.

    `apart` and `product` are the same in both passes; they count once, with the gradients of both.
    """

    def once(x: Tensor, y: Tensor) -> Tensor:
        return x + (y - y.detach())

    both = {name: once(a[name], b[name]) for name in ("apart", "product")}
    both |= {"student_square": a["student_square"], "teacher_square": b["student_square"]}
    return {**a, **both}, {**b, **both}


def _choose(winner: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The winner's tensor: `a` if winner is 0, else `b`."""
    if is_known(winner):
        return b if winner else a
    return torch.where(winner != 0, b, a)


def _with_features(logits: Logits, features: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(values, weights, features) for `_Kernels`; features are None if they are the values, which get one gradient."""
    values, weights = unpack_logits(logits)
    return values, weights, None if values is features else features


class _Kernels(torch.autograd.Function):
    """`measure` by the kernels. The backward pass writes the gradient of each map once."""

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
        percentile: float | Tensor,
        step: int | Tensor,
        reducer: Reducer,
        teacher: Tensor | None,
    ) -> tuple[Tensor, ...]:
        measured, kept = measure(
            pack_logits(values_a, weights_a),
            pack_logits(values_b, weights_b),
            values_a if features_a is None else features_a,
            values_b if features_b is None else features_b,
            *(labels, options, percentile, step, reducer, teacher),
            fused=True,
        )
        maps = values_a, weights_a, features_a, values_b, weights_b, features_b
        ctx.save_for_backward(*maps, labels, teacher, *kept)
        ctx.options = options
        results = measured.flatten()
        ctx.mark_non_differentiable(*results[3:_ANCHORS], *results[_ANCHORS + 1 :])
        return results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_results: Tensor) -> tuple[Tensor | None, ...]:
        values_a, weights_a, features_a, values_b, weights_b, features_b, labels, teacher, *rest = ctx.saved_tensors
        kept, options, num_labelled = _Kept(*rest), ctx.options, len(labels)
        grad_supervised, *grads_pseudo = grad_results[:3]
        logits = pack_logits(values_a, weights_a), pack_logits(values_b, weights_b)
        to = [empty_gradient(z) for z in logits]
        of_labels = labels, options.threshold, options.ignore_index
        known, gradients_of_known = ([t[:num_labelled] for t in tensors] for tensors in (logits, to))
        SUPERVISED.backward(grad_supervised, known, *of_labels, to=gradients_of_known)
        students, flags = [z[num_labelled:] for z in logits], (kept.flags_a, kept.flags_b)
        teachers = students[::-1] if teacher is None else (teacher, teacher)
        for n, grad_sums in enumerate(grads_pseudo):
            maps = (students[n], teachers[n]) if options.rectified else (students[n],)
            options.pseudo.backward(grad_sums, maps, flags[n], to=[to[n][num_labelled:]])
        gradients: list[Tensor | None] = []
        for features, gradient, learns_contrast in zip((features_a, features_b), to, kept.loser_mask, strict=True):
            values, grad_weights = unpack_logits(gradient)
            grad = None
            if options.contrast and (not is_known(learns_contrast) or learns_contrast):
                grad = values if features is None else zeros_like(features)
                grad_rows = grad_results[_ANCHORS] * learns_contrast
                ops_for(values).gather_voxels_backward(grad_rows, kept.anchor_indices, grad[num_labelled:])
            gradients += [values, grad_weights, None if features is None else grad]
        return *gradients, *(6 * [None])
