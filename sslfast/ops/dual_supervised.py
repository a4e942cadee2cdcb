"""`dual_supervised`: cross-entropy, Dice and discrepancy loss of both networks on the labelled volumes."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sslfast.ops.backend import define, fake, kernels, runs_fused
from sslfast.ops.check import INTEGERS, check_logits, check_range, check_voxels, working
from sslfast.ops.linear_logits import Logits, empty_gradient, join, readable, split, stored
from sslfast.ops.ranks import ALONE, Ranks


class DualSupervised(NamedTuple):
    """Index 0 is network a, 1 is network b."""

    ce: Tensor  # [2] mean cross-entropy over the annotated voxels
    dice: Tensor  # [2] mean over the foreground classes of 1 - Dice
    discrepancy: Tensor  # [2] targeted verification on the discrepancy mask
    mask_voxels: Tensor  # [] int64, size of the discrepancy mask
    sums: Tensor  # [5 + 5 C] float64, what the gradient needs, see SUMS


SUMS = """Annotated voxels, mask voxels, labels out of range (how many; the fused op: place and value of the first), then by class
the voxels with this label [C], sum p_c [y = c] [2, C] and sum p_c^2 [2, C] of both networks."""


def dual_supervised(
    logits_a: Logits,
    logits_b: Logits,
    labels: Tensor,
    *,
    threshold: float = 0.6,
    ignore_index: int = -1,
    smooth: float = 1e-5,
    ranks: Ranks = ALONE,
) -> DualSupervised:
    """The supervised terms of both networks (arXiv 2311.12617, its supervised and discrepancy losses).

    With p = softmax(z) and y the label, over the annotated voxels of all labelled volumes:
    CE = mean(-log p_y); Dice = mean over c >= 1 of 1 - (2 sum p_c [y=c] + smooth) / (sum p_c^2 + sum [y=c] + smooth);
    discrepancy = sum M 1/2 |p - onehot(y)|^2 / sum M on the mask M where the networks' confident foreground classes
    differ. A network's confident foreground class is its argmax where that is no background and its probability is at
    least `threshold`, else background. M carries no gradient.

    Args:
        logits_a, logits_b: [L, C, *spatial], 2 <= C <= 32, float32, bfloat16, float16 or float64.
        labels: [L, *spatial] integers in 0..C-1 or `ignore_index` (such voxels count in no sum).
        threshold: probability from which a foreground prediction is confident, 0..1.
        ignore_index: the label of voxels that nobody annotated.
        smooth: Dice's epsilon.
        ranks: the processes over whose volumes all sums go.

    Raises:
        ValueError, TypeError: a shape, dtype or device is wrong; no labelled volume; a label out of range (on the CPU at
            once; on another device the losses become NaN, because looking would synchronise).
    """
    check_logits(logits_a, logits_b)
    check_voxels("labels", labels, "logits_a", logits_a, INTEGERS)
    check_range("threshold", threshold, 0, 1)
    if labels.shape[0] == 0 and ranks.size == 1:
        raise ValueError("labels holds no volume; at least one labelled volume is needed in a batch")
    if not runs_fused(logits_a, logits_b):
        return dual_supervised_ref(stored(logits_a), stored(logits_b), labels, threshold, ignore_index, smooth, ranks)
    losses, mask_voxels, sums = _Fused.apply(
        *split(readable(logits_a)), *split(readable(logits_b)), labels, threshold, ignore_index, smooth, ranks
    )
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        outside, first, value = (int(x) for x in sums[2:5])
        if outside:
            raise _outside(outside, first, value, labels, logits_a.shape[1], ignore_index)
    return DualSupervised(losses[0], losses[1], losses[2], mask_voxels, sums)


def dual_supervised_ref(
    logits_a: Tensor,
    logits_b: Tensor,
    labels: Tensor,
    threshold: float,
    ignore_index: int,
    smooth: float,
    ranks: Ranks = ALONE,
) -> DualSupervised:
    """The specification of `dual_supervised` in plain PyTorch."""
    num_classes = logits_a.shape[1]
    labels = labels.long()  # an unsigned dtype would wrap a negative ignore_index
    annotated = labels != ignore_index  # [L, *spatial]
    outside = annotated & ((labels < 0) | (labels >= num_classes))
    if labels.device.type == "cpu" and outside.any():
        first = int(outside.flatten().to(torch.uint8).argmax())
        raise _outside(int(outside.sum()), first, int(labels.flatten()[first]), labels, num_classes, ignore_index)
    annotated = annotated & ~outside
    target = torch.where(annotated, labels, 0).unsqueeze(1)  # [L, 1, *spatial]
    weight = annotated.unsqueeze(1).to(working(logits_a).dtype)  # [L, 1, *spatial]
    onehot = torch.zeros_like(logits_a, dtype=weight.dtype).scatter_(1, target, 1.0) * weight
    sums = (0, *range(2, logits_a.ndim))

    probabilities, log_likelihoods, confident, overlaps, squares = [], [], [], [], []
    for logits in (logits_a, logits_b):
        log_p = working(logits).log_softmax(1)
        p = log_p.exp()
        log_likelihoods.append((log_p * onehot).sum())
        overlaps.append((p * onehot).sum(sums))  # [C]
        squares.append((p.square() * weight).sum(sums))  # [C]
        confidence, predicted = p.detach().max(1)
        confident.append(torch.where(confidence >= threshold, predicted, 0))
        probabilities.append(p)
    mask = ((confident[0] != confident[1]) & annotated).to(weight.dtype)  # [L, *spatial]
    off = [(mask * (p - onehot).square().sum(1)).sum() / 2 for p in probabilities]
    invalid = torch.where(outside.any(), torch.nan, 0.0).to(weight.dtype)
    nowhere = torch.zeros_like(invalid)
    header = torch.stack((weight.sum(), mask.sum(), outside.sum().to(weight.dtype), nowhere, nowhere))
    found = torch.cat((header, onehot.sum(sums), *overlaps, *squares)).double()
    return _terms(-torch.stack(log_likelihoods).double(), torch.stack(off).double(), found, smooth, ranks, weight.dtype)


def _terms(
    ce: Tensor, discrepancy: Tensor, sums: Tensor, smooth: float, ranks: Ranks, dtype: torch.dtype
) -> DualSupervised:
    """What the sums [2], [2] and SUMS over a rank's voxels make together with those of the others."""
    total = ranks.sum(torch.cat((ce, discrepancy, sums)))
    ce, discrepancy, sums = total[:2], total[2:4], total[4:]
    size, overlap, square = sums[5:].view(5, -1).split((1, 2, 2))  # [1, C], [2, C], [2, C]
    dice = (1 - (2 * overlap + smooth) / (square + size + smooth))[:, 1:].mean(1)
    invalid = torch.where(sums[2] > 0, torch.nan, 0.0).to(sums.dtype)
    return DualSupervised(
        (ce / sums[0].clamp_min(1) + invalid).to(dtype),
        (dice + invalid).to(dtype),
        (discrepancy / (sums[1] + 1e-16) + invalid).to(dtype),
        sums[1].detach().long(),
        sums.detach(),
    )


def _outside(count: int, first: int, value: int, labels: Tensor, num_classes: int, ignore_index: int) -> ValueError:
    where = tuple(int(i) for i in np.unravel_index(first, labels.shape))
    return ValueError(
        f"labels holds {count} voxels outside 0..{num_classes - 1} that are not ignore_index={ignore_index}, "
        f"the first at {where} with value {value}"
    )


define(
    "dual_supervised(Tensor logits_a, Tensor logits_b, Tensor labels, float threshold, int ignore_index, float smooth,"
    " Tensor? weights_a=None, Tensor? weights_b=None) -> (Tensor losses, Tensor mask_voxels, Tensor sums)"
)
define(
    "dual_supervised_backward(Tensor grad_losses, Tensor logits_a, Tensor logits_b, Tensor labels, Tensor sums,"
    " float threshold, int ignore_index, float smooth, Tensor(a!) grad_a, Tensor(b!) grad_b, Tensor? weights_a=None,"
    " Tensor? weights_b=None, Tensor(c!)? grad_weights_a=None, Tensor(d!)? grad_weights_b=None) -> ()"
)


@fake("dual_supervised")
def _(
    logits_a: Tensor,
    logits_b: Tensor,
    labels: Tensor,
    threshold: float,
    ignore_index: int,
    smooth: float,
    weights_a: Tensor | None = None,
    weights_b: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        logits_a.new_empty((3, 2), dtype=torch.float32),
        logits_a.new_empty((), dtype=torch.int64),
        logits_a.new_empty(5 + 5 * join(logits_a, weights_a).shape[1], dtype=torch.float64),
    )


@fake("dual_supervised_backward")
def _(*_: Any) -> None: ...


class _Fused(torch.autograd.Function):
    """losses [3, 2] (cross-entropy, Dice, discrepancy), mask voxels [], and the sums that the gradient needs."""

    @staticmethod
    def forward(
        ctx: Any,
        values_a: Tensor,
        weights_a: Tensor | None,
        values_b: Tensor,
        weights_b: Tensor | None,
        labels: Tensor,
        threshold: float,
        ignore_index: int,
        smooth: float,
        ranks: Ranks,
    ) -> tuple[Tensor, Tensor, Tensor]:
        losses, mask_voxels, sums = kernels(values_a).dual_supervised(
            values_a, values_b, labels, threshold, ignore_index, smooth, weights_a, weights_b
        )
        if ranks.size > 1:
            ce, discrepancy = losses[0] * sums[0].clamp_min(1), losses[2] * (sums[1] + 1e-16)
            *parts, mask_voxels, sums = _terms(ce, discrepancy, sums, smooth, ranks, losses.dtype)
            losses = torch.stack(parts)
        ctx.save_for_backward(values_a, weights_a, values_b, weights_b, labels, sums)
        ctx.options, ctx.size = (threshold, ignore_index, smooth), ranks.size
        ctx.mark_non_differentiable(mask_voxels, sums)
        return losses, mask_voxels, sums

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        values_a, weights_a, values_b, weights_b, labels, sums = ctx.saved_tensors
        logits_a, logits_b = join(values_a, weights_a), join(values_b, weights_b)
        grad_a, grad_b = empty_gradient(logits_a), empty_gradient(logits_b)
        threshold, ignore_index, smooth = ctx.options
        dual_supervised_backward(
            *(ctx.size * grad_losses, logits_a, logits_b, labels, sums, threshold, ignore_index, smooth, grad_a, grad_b)
        )
        return *split(grad_a), *split(grad_b), *(5 * [None])


def dual_supervised_backward(
    grad_losses: Tensor,
    logits_a: Logits,
    logits_b: Logits,
    labels: Tensor,
    sums: Tensor,
    threshold: float,
    ignore_index: int,
    smooth: float,
    grad_a: Logits,
    grad_b: Logits,
) -> None:
    """Writes the gradients of the logits, from those [3, 2] of cross-entropy, Dice and discrepancy."""
    (values_a, weights_a), (values_b, weights_b) = split(logits_a), split(logits_b)
    (to_a, to_weights_a), (to_b, to_weights_b) = split(grad_a), split(grad_b)
    kernels(values_a).dual_supervised_backward(
        *(grad_losses, values_a, values_b, labels, sums, threshold, ignore_index, smooth, to_a, to_b),
        *(weights_a, weights_b, to_weights_a, to_weights_b),
    )
