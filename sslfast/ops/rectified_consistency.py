"""`rectified_consistency`: a student learns its teacher's class, weighted by agreement, and its probabilities."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sslfast.ops.check import (
    check_classes,
    check_pair,
    check_range,
    check_reducer,
    check_voxels,
    compute_dtype,
)
from sslfast.ops.flags import check_flags, is_reliable, out_of_range
from sslfast.ops.linear_logits import Logits
from sslfast.ops.reduce import SINGLE_PROCESS, Reducer
from sslfast.ops.sums import CLASSES, SMOOTH, Slots, SumsOp, dice_loss, masked_logits, pack, sum_by_class, unpack
from sslfast.renamed import old_arguments

SLOTS: Slots = {
    "voxels": (),  # all voxels
    "num_selected": (),  # reliable voxels
    "rectified": (),  # sum e^-KL CE + KL over the reliable voxels
    "apart": (),  # sum 1 - cos(p, q) over all voxels
    "student_square": (CLASSES,),  # sum p_c^2
    "teacher_square": (CLASSES,),  # sum q_c^2
    "product": (CLASSES,),  # sum p_c q_c
    "chosen": (CLASSES,),  # voxels where c is the teacher's class; no gradient
}


class RectifiedConsistency(NamedTuple):
    """Losses of the student."""

    rectified: Tensor  # [] mean of e^-KL CE + KL over the reliable voxels
    cosine: Tensor  # [] mean over all voxels of 1 - cos(p, q)
    dice: Tensor  # [] mean over the foreground classes of 1 - Dice(p, q) over all voxels
    reliable_voxels: Tensor  # [] int64, reliable voxels


@old_arguments(ranks="reducer", state="flags")
def rectified_consistency(
    student: Logits, teacher: Logits, flags: Tensor, *, smooth: float = SMOOTH, reducer: Reducer = SINGLE_PROCESS
) -> RectifiedConsistency:
    """Rectified pseudo-labels and cosine consistency (arXiv 2505.17690 and 2509.13084), and Dice with the teacher.

    p are the student's probabilities, q the teacher's. rectified = mean over the reliable voxels of e^-KL CE + KL, with
    KL = sum_c q log(q / p) and CE = -log p at the teacher's class. Dice_c = (2 sum p q + smooth) / (sum p^2 + sum q^2 +
    smooth) over all voxels; in it a small structure counts as much as a large one. Only the student gets a gradient:
    two networks that learn from each other need two calls. Terms over an empty set of voxels are exactly 0, with zero
    gradients. A NaN or infinite logit makes the terms NaN that its voxel counts in; so does -inf, the logarithm of a
    probability of 0.

    Args:
        student, teacher: logits or log-probabilities [U, C, *spatial].
        flags: [U, *spatial] uint8 of the teacher, from `reliability`.
        smooth: Dice's epsilon.
        reducer: process group over which the sums are all-reduced.

    Raises:
        ValueError, TypeError: wrong shape, dtype or device; flags out of range, as a reliable voxel with a class from C
            on. On a GPU they make `rectified` NaN instead, because checking would synchronise.
    """
    check_pair("student", student, "teacher", teacher)
    check_classes("student", student)
    check_voxels("flags", flags, "student", student, (torch.uint8,))
    check_range("smooth", smooth, 0, math.inf)
    check_reducer(reducer)
    sums = OP((student, teacher), flags)
    check_flags(unpack(SLOTS, sums.detach())["rectified"], flags, student.shape[1])
    s = unpack(SLOTS, reducer.sum(sums))
    return RectifiedConsistency(*_parts(s, compute_dtype(student), smooth), s["num_selected"].detach().long())


def rectified_consistency_ref(student: Tensor, teacher: Tensor, flags: Tensor) -> Tensor:
    """The specification of the sums in plain PyTorch."""
    sure, outside = is_reliable(flags), out_of_range(flags, student.shape[1])  # [U, *spatial]
    teacher = masked_logits(teacher.detach())
    log_p, log_q = masked_logits(student).log_softmax(1), teacher.log_softmax(1)
    p, q = log_p.exp(), log_q.exp()
    product, student_square, teacher_square = p * q, p.square(), q.square()
    cosine = product.sum(1) / (student_square.sum(1) * teacher_square.sum(1)).sqrt()
    label = teacher.argmax(1, keepdim=True)
    kl = (q * (log_q - log_p)).sum(1)
    ce = -log_p.gather(1, label).squeeze(1)
    return pack(
        SLOTS,
        voxels=torch.full_like(kl.detach().sum(), flags.numel()),
        num_selected=sure.count_nonzero(),
        rectified=torch.where(outside, torch.nan, torch.where(sure, (-kl).exp() * ce + kl, 0)).sum(),
        apart=(1 - cosine).sum(),
        student_square=sum_by_class(student_square),
        teacher_square=sum_by_class(teacher_square),
        product=sum_by_class(product),
        chosen=sum_by_class(torch.zeros_like(q).scatter_(1, label, 1)),
    )


OP = SumsOp(
    "rectified_consistency",
    SLOTS,
    maps=("student", "teacher"),
    students=1,
    rest="Tensor flags",
    ref=rectified_consistency_ref,
)


def rectified_terms(
    s: dict[str, Tensor], dtype: torch.dtype, gate: Tensor | None = None, local_fraction: float = 1.0
) -> dict[str, Tensor]:
    """The student's losses [] from unpacked sums, by the name of their weight.

    Cosine and Dice are multiplied by `local_fraction`, the student's share of terms that two networks have in common,
    and Dice of each class by `gate` [C].
    """
    rectified, cosine, dice = _parts(s, dtype, SMOOTH, gate)
    return {"pseudo": rectified + local_fraction * cosine, "pseudo_dice": local_fraction * dice}


def _parts(
    s: dict[str, Tensor], dtype: torch.dtype, smooth: float, gate: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    rectified = s["rectified"] / s["num_selected"].clamp_min(1)
    cosine = s["apart"] / s["voxels"].clamp_min(1)
    dice = dice_loss(s["product"], s["student_square"] + s["teacher_square"], smooth, gate)
    return rectified.to(dtype), cosine.to(dtype), dice.to(dtype)
