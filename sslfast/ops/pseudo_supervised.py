"""`pseudo_supervised`: cross-entropy and Dice of a network against the pseudo-labels of the reliable voxels."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sslfast.ops.check import (
    check_classes,
    check_map,
    check_range,
    check_reducer,
    check_voxels,
    compute_dtype,
)
from sslfast.ops.flags import check_flags, is_reliable, out_of_range, pseudo_label
from sslfast.ops.linear_logits import Logits
from sslfast.ops.reduce import SINGLE_PROCESS, Reducer
from sslfast.ops.sums import CLASSES, SMOOTH, Slots, SumsOp, dice_loss, masked_logits, pack, sum_by_class, unpack
from sslfast.renamed import old_arguments

SLOTS: Slots = {
    "voxels": (),  # all voxels
    "num_selected": (),  # reliable voxels
    "ce": (),
    "size": (CLASSES,),  # reliable voxels with pseudo-label c
    "overlap": (CLASSES,),  # sum p_c [t = c]
    "square": (CLASSES,),  # sum p_c^2
}


class PseudoSupervised(NamedTuple):
    """Losses over the reliable voxels."""

    ce: Tensor  # [] mean cross-entropy
    dice: Tensor  # [] mean over the foreground classes of 1 - Dice
    reliable_voxels: Tensor  # [] int64


@old_arguments(ranks="reducer", state="flags")
def pseudo_supervised(
    logits: Logits, flags: Tensor, *, smooth: float = SMOOTH, reducer: Reducer = SINGLE_PROCESS
) -> PseudoSupervised:
    """Cross-entropy (arXiv 2311.12617, its unsupervised loss) and Dice against the pseudo-labels t of reliable voxels.

    With p = softmax(z), over the reliable voxels of all volumes: CE = mean(-log p_t); Dice = mean over c >= 1 of
    1 - (2 sum p_c [t=c] + smooth) / (sum p_c^2 + sum [t=c] + smooth). Without reliable voxels both are exactly 0, with
    zero gradients.

    Args:
        logits: [U, C, *spatial] of the student.
        flags: [U, *spatial] uint8 of the teacher, from `reliability`. Other voxels than the reliable ones count in no
            sum, whatever their logits. A logit of a reliable voxel that is NaN or infinite makes both losses NaN.
        smooth: Dice's epsilon.
        reducer: process group over which the sums are all-reduced.

    Raises:
        ValueError, TypeError: wrong shape, dtype or device; flags out of range, as a reliable voxel with a class
            from C on. On a GPU they make `ce` NaN instead, because checking would synchronise.
    """
    check_map("logits", logits)
    check_classes("logits", logits)
    check_voxels("flags", flags, "logits", logits, (torch.uint8,))
    check_range("smooth", smooth, 0, math.inf)
    check_reducer(reducer)
    sums = OP((logits,), flags)
    check_flags(unpack(SLOTS, sums.detach())["ce"], flags, logits.shape[1])
    s = unpack(SLOTS, reducer.sum(sums))
    terms = pseudo_terms(s, compute_dtype(logits), smooth)
    return PseudoSupervised(terms["pseudo"], terms["pseudo_dice"], s["num_selected"].detach().long())


def pseudo_supervised_ref(logits: Tensor, flags: Tensor) -> Tensor:
    """The specification of the sums in plain PyTorch."""
    reliable, t = is_reliable(flags), pseudo_label(flags)  # [U, *spatial]
    outside = out_of_range(flags, logits.shape[1])
    t = t.clamp_max(logits.shape[1] - 1).unsqueeze(1)  # [U, 1, *spatial]
    log_p = masked_logits(logits, reliable).log_softmax(1)
    p = torch.where(reliable.unsqueeze(1), log_p.exp(), 0)
    target_onehot = torch.zeros_like(p).scatter_(1, t, 1.0) * (reliable & ~outside).unsqueeze(1)
    return pack(
        SLOTS,
        voxels=torch.full_like(log_p.detach().sum(), flags.numel()),
        num_selected=reliable.count_nonzero(),
        ce=-torch.where(outside, torch.nan, torch.where(reliable, log_p.gather(1, t).squeeze(1), 0)).sum(),
        size=sum_by_class(target_onehot),
        overlap=sum_by_class(p * target_onehot),
        square=sum_by_class(p.square()),
    )


OP = SumsOp("pseudo_supervised", SLOTS, maps=("logits",), students=1, rest="Tensor flags", ref=pseudo_supervised_ref)


def pseudo_terms(
    s: dict[str, Tensor], dtype: torch.dtype, smooth: float = SMOOTH, gate: Tensor | None = None
) -> dict[str, Tensor]:
    """Cross-entropy and Dice loss [] from unpacked sums, by the name of their weight.

    Dice of each class is multiplied by `gate` [C].
    """
    ce = s["ce"] / s["num_selected"].clamp_min(1)
    dice = dice_loss(s["overlap"], s["square"] + s["size"], smooth, gate)
    return {"pseudo": ce.to(dtype), "pseudo_dice": dice.to(dtype)}
