"""`pseudo_supervised`: cross-entropy of both networks against the pseudo-labels of the reliable voxels."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sslfast.ops.check import check_logits, check_voxels, working
from sslfast.ops.state import is_reliable, pseudo_label

Target = Literal["state", "other"]


class PseudoSupervised(NamedTuple):
    """Index 0 is network a, 1 is network b."""

    ce: Tensor  # [2] mean cross-entropy over the reliable voxels
    reliable_voxels: Tensor  # [] int64


def pseudo_supervised(
    logits_a: Tensor, logits_b: Tensor, state: Tensor, *, target: Target = "state"
) -> PseudoSupervised:
    """Cross-entropy against the pseudo-labels, mean over the reliable voxels (arXiv 2311.12617, its unsupervised loss).

    L_n = sum over reliable voxels of -log softmax(z_n)_t / max(number of reliable voxels, 1). The gradient flows through
    z_n only. No reliable voxel: exactly 0, with zero gradients.

    Args:
        logits_a, logits_b: [U, C, *spatial].
        state: [U, *spatial] uint8, from `reliability`.
        target: t is the byte map's class, or each network's t is the other network's argmax.
    """
    check_logits(logits_a, logits_b)
    check_voxels("state", state, "logits_a", logits_a, (torch.uint8,))
    if target not in ("state", "other"):
        raise ValueError(f"target is {target!r}; it must be 'state' or 'other'")
    return pseudo_supervised_ref(logits_a, logits_b, state, target)


def pseudo_supervised_ref(logits_a: Tensor, logits_b: Tensor, state: Tensor, target: Target) -> PseudoSupervised:
    """The specification of `pseudo_supervised` in plain PyTorch."""
    reliable = is_reliable(state)  # [U, *spatial]
    count = reliable.count_nonzero()
    ce = []
    for logits, other in ((logits_a, logits_b), (logits_b, logits_a)):
        t = pseudo_label(state) if target == "state" else other.argmax(1)
        log_p = working(logits).log_softmax(1).gather(1, t.unsqueeze(1)).squeeze(1)
        ce.append(-torch.where(reliable, log_p, 0).sum() / count.clamp_min(1))
    return PseudoSupervised(torch.stack(ce), count)
