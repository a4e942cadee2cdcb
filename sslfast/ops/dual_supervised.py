"""`dual_supervised`: cross-entropy, Dice and discrepancy loss of both networks on the labelled volumes."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from sslfast.ops.check import (
    INTEGERS,
    check_choice,
    check_class_weights,
    check_logits,
    check_range,
    check_reducer,
    check_voxels,
    compute_dtype,
    to_compute_dtype,
)
from sslfast.ops.linear_logits import Logits
from sslfast.ops.reduce import SINGLE_PROCESS, Reducer
from sslfast.ops.sums import CLASSES, SMOOTH, Slots, SumsOp, dice_loss, masked_logits, pack, sum_by_class, unpack
from sslfast.renamed import old_arguments

DiscrepancyOver = Literal["mask", "labelled"]

SLOTS: Slots = {
    "labelled": (),  # annotated voxels
    "mask": (),  # voxels of the discrepancy mask
    "outside": (),  # labels out of range
    "ce": (2,),
    "discrepancy": (2,),
    "size": (CLASSES,),  # voxels with this label
    "overlap": (2, CLASSES),  # sum p_c [y = c]
    "square": (2, CLASSES),  # sum p_c^2
    "class_ce": (2, CLASSES),  # sum -log p_c [y = c]
}


class DualSupervised(NamedTuple):
    """Supervised terms; index 0 is network a, 1 is network b."""

    ce: Tensor  # [2] mean cross-entropy over the annotated voxels, weighted by `class_weights` if given
    dice: Tensor  # [2] mean over the foreground classes of 1 - Dice
    discrepancy: Tensor  # [2] squared error on the discrepancy mask
    mask_voxels: Tensor  # [] int64, size of the discrepancy mask
    class_dice: Tensor  # [C] the better network's Dice of each class, without gradient; -1: not in the labels
    class_voxels: Tensor  # [C] int64, annotated voxels of each class

    @property
    def learned(self) -> dict[str, Tensor]:
        """What has been learned from the labels, for a method's terms: ce, dice and class_dice, detached."""
        return {"ce": self.ce.detach(), "dice": self.dice.detach(), "class_dice": self.class_dice}


@old_arguments(ranks="reducer")
def dual_supervised(
    logits_a: Logits,
    logits_b: Logits,
    labels: Tensor,
    *,
    threshold: float = 0.6,
    ignore_index: int = -1,
    discrepancy_over: DiscrepancyOver = "mask",
    smooth: float = SMOOTH,
    class_weights: Tensor | None = None,
    reducer: Reducer = SINGLE_PROCESS,
) -> DualSupervised:
    """The supervised terms of both networks (arXiv 2311.12617, its supervised and discrepancy losses).

    With p = softmax(z) and y the label, over the annotated voxels of all labelled volumes:
    CE = mean(-log p_y); Dice = mean over c >= 1 of 1 - (2 sum p_c [y=c] + smooth) / (sum p_c^2 + sum [y=c] + smooth);
    discrepancy = sum M 1/2 |p - onehot(y)|^2 / sum M, where the mask M is 1 on the voxels where the networks' confident
    foreground classes differ. The confident foreground class is the argmax if its probability is at least `threshold`,
    else background. M carries no gradient.

    Args:
        logits_a, logits_b: [L, C, *spatial], 2 <= C <= 32, float32, bfloat16, float16 or float64.
        labels: [L, *spatial] integers in 0..C-1 or `ignore_index`.
        threshold: probability from which a foreground prediction is confident, 0..1.
        ignore_index: label of voxels that are not annotated; they count in no sum, whatever their logits. A logit of
            another voxel that is NaN or infinite makes the losses NaN that the voxel counts in.
        discrepancy_over: normaliser of the discrepancy: the number of voxels of the "mask", as in the paper, or of all
            "labelled" voxels. With "mask", each voxel of a small mask weighs as much as thousands of others.
        smooth: Dice's epsilon.
        class_weights: [2, C] floating-point, factor w_nc of class c in the cross-entropy of network n, as in DHC (arXiv
            2307.11960): CE_n = sum w_ny (-log p_y) / sum w_ny over the annotated voxels, 0 if the weights there add up
            to 0. Without gradient, and the same in all processes; values are not checked. None: the mean.
        reducer: process group over which the sums are all-reduced.

    Raises:
        ValueError, TypeError: wrong shape, dtype or device; no labelled volume; a label out of range. On a GPU labels
            out of range make the losses NaN instead, because checking would synchronise.
    """
    check_logits(logits_a, logits_b)
    check_voxels("labels", labels, "logits_a", logits_a, INTEGERS)
    check_range("threshold", threshold, 0, 1)
    check_range("ignore_index", ignore_index, -(2**63), 2**63 - 1, whole=True)
    check_choice("discrepancy_over", discrepancy_over, get_args(DiscrepancyOver))
    check_range("smooth", smooth, 0, math.inf)
    check_reducer(reducer)
    if labels.shape[0] == 0 and reducer.size == 1:
        raise ValueError("labels holds no volume; a batch must have at least one labelled volume")
    if class_weights is not None:
        check_class_weights("class_weights", class_weights, "logits_a", logits_a)
    sums = OP((logits_a, logits_b), labels, threshold, ignore_index)
    check_labels(sums, labels, logits_a.shape[1], ignore_index)
    return supervised_terms(reducer.sum(sums), compute_dtype(logits_a), discrepancy_over, smooth, class_weights)


def dual_supervised_ref(
    logits_a: Tensor, logits_b: Tensor, labels: Tensor, threshold: float, ignore_index: int
) -> Tensor:
    """The specification of the sums in plain PyTorch."""
    num_classes = logits_a.shape[1]
    labels = labels.long()  # an unsigned dtype would wrap a negative ignore_index
    annotated = labels != ignore_index  # [L, *spatial]
    outside = annotated & ((labels < 0) | (labels >= num_classes))
    annotated = annotated & ~outside
    target = torch.where(annotated, labels, 0).unsqueeze(1)  # [L, 1, *spatial]
    weight = annotated.unsqueeze(1).to(to_compute_dtype(logits_a).dtype)  # [L, 1, *spatial]
    onehot = torch.zeros_like(logits_a, dtype=weight.dtype).scatter_(1, target, 1.0) * weight

    ce, confident, probabilities = [], [], []  # ce: [L, C, *spatial], 0 for other classes than the label
    for logits in (logits_a, logits_b):
        log_p = masked_logits(logits, annotated).log_softmax(1)
        ce.append(-(log_p * onehot))
        confidence, predicted = log_p.detach().exp().max(1)
        confident.append(torch.where(confidence >= threshold, predicted, 0))
        probabilities.append(log_p.exp())
    mask = (confident[0] != confident[1]) & annotated  # [L, *spatial]
    return pack(
        SLOTS,
        labelled=annotated.count_nonzero(),
        mask=mask.count_nonzero(),
        outside=outside.count_nonzero(),
        ce=torch.stack([values.sum() for values in ce]),
        discrepancy=torch.stack([torch.where(mask, (p - onehot).square().sum(1), 0).sum() / 2 for p in probabilities]),
        size=sum_by_class(onehot),
        overlap=torch.stack([sum_by_class(p * onehot) for p in probabilities]),
        square=torch.stack([sum_by_class(p.square() * weight) for p in probabilities]),
        class_ce=torch.stack([sum_by_class(values) for values in ce]),
    )


OP = SumsOp(
    "dual_supervised",
    SLOTS,
    maps=("logits_a", "logits_b"),
    students=2,
    rest="Tensor labels, float threshold, int ignore_index",
    ref=dual_supervised_ref,
)


def supervised_terms(
    sums: Tensor,
    dtype: torch.dtype,
    discrepancy_over: DiscrepancyOver,
    smooth: float = SMOOTH,
    class_weights: Tensor | None = None,
) -> DualSupervised:
    """The losses, from the sums."""
    s = unpack(SLOTS, sums)
    invalid = torch.where(s["outside"] > 0, torch.nan, 0.0)
    voxels = s["mask"] + 1e-16 if discrepancy_over == "mask" else s["labelled"].clamp_min(1)
    known = {name: s[name].detach() for name in ("overlap", "square", "size")}
    by_class = (2 * known["overlap"] / (known["square"] + known["size"])).amax(0)
    ce = s["ce"] / s["labelled"].clamp_min(1) if class_weights is None else _weighted_ce(s, class_weights)
    return DualSupervised(
        (ce + invalid).to(dtype),
        (dice_loss(s["overlap"], s["square"] + s["size"], smooth) + invalid).to(dtype),
        (s["discrepancy"] / voxels + invalid).to(dtype),
        s["mask"].detach().long(),
        torch.where(known["size"] > 0, by_class, -1).to(dtype),
        _class_voxels(s).long(),
    )


def _class_voxels(s: dict[str, Tensor]) -> Tensor:
    """Annotated voxels of each class [C]; the background's are what the foreground leaves."""
    return torch.cat((s["labelled"] - s["size"].sum(0, keepdim=True), s["size"][1:])).detach()


def _weighted_ce(s: dict[str, Tensor], class_weights: Tensor) -> Tensor:
    """Cross-entropy [2] with weights [2, C]; the sums of the background are what the foreground leaves of the total."""
    weights, voxels = class_weights.detach().double(), _class_voxels(s)
    background = s["ce"].unsqueeze(1) - s["class_ce"].sum(1, keepdim=True)  # rounding, if it has no voxel
    ce = torch.cat((torch.where(voxels[0] > 0, background, 0), s["class_ce"][:, 1:]), 1)  # [2, C]
    total = (weights * voxels).sum(1)
    return (weights * ce).sum(1) / torch.where(total == 0, torch.inf, total)


def check_labels(sums: Tensor, labels: Tensor, num_classes: int, ignore_index: int) -> None:
    """On a CPU, raises if the sums count labels out of range."""
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    count = int(unpack(SLOTS, sums.detach())["outside"])
    if not count:
        return
    values = labels.long()
    first = ((values != ignore_index) & ((values < 0) | (values >= num_classes))).nonzero()[0].tolist()
    raise ValueError(
        f"labels holds {count} voxels outside 0..{num_classes - 1} that are not ignore_index={ignore_index}, "
        f"the first at {tuple(first)} with value {int(labels[tuple(first)])}"
    )
