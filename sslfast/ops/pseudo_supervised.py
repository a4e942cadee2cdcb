"""`pseudo_supervised`: cross-entropy and Dice of both networks against the pseudo-labels of the reliable voxels."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sslfast.ops.backend import define, fake, kernels, runs_fused
from sslfast.ops.check import check_logits, check_voxels, working
from sslfast.ops.linear_logits import Logits, empty_gradient, join, readable, split, stored
from sslfast.ops.ranks import ALONE, Ranks
from sslfast.ops.state import is_reliable, pseudo_label

Target = Literal["state", "other"]


class PseudoSupervised(NamedTuple):
    """Index 0 is network a, 1 is network b."""

    ce: Tensor  # [2] mean cross-entropy over the reliable voxels
    dice: Tensor  # [2] mean over the foreground classes of 1 - Dice on the reliable voxels
    reliable_voxels: Tensor  # [] int64
    sums: Tensor  # [6 C] float64, what the gradient needs: voxels taught c, sum p_c [t = c], sum p_c^2, each [2, C]


def pseudo_supervised(
    logits_a: Logits,
    logits_b: Logits,
    state: Tensor,
    *,
    target: Target = "state",
    smooth: float = 1e-5,
    ranks: Ranks = ALONE,
) -> PseudoSupervised:
    """Cross-entropy (arXiv 2311.12617, its unsupervised loss) and Dice against the pseudo-labels t of the reliable voxels.

    With p = softmax(z_n), over the reliable voxels of all volumes: CE = mean(-log p_t); Dice = mean over c >= 1 of
    1 - (2 sum p_c [t=c] + smooth) / (sum p_c^2 + sum [t=c] + smooth). The gradient flows through z_n only. No reliable
    voxel: exactly 0, with zero gradients.

    Args:
        logits_a, logits_b: [U, C, *spatial].
        state: [U, *spatial] uint8, from `reliability`.
        target: t is the byte map's class, or each network's t is the other network's argmax.
        smooth: Dice's epsilon.
        ranks: the processes over whose voxels mean and sums go.
    """
    check_logits(logits_a, logits_b)
    check_voxels("state", state, "logits_a", logits_a, (torch.uint8,))
    if target not in ("state", "other"):
        raise ValueError(f"target is {target!r}; it must be 'state' or 'other'")
    if not runs_fused(logits_a, logits_b):
        return pseudo_supervised_ref(stored(logits_a), stored(logits_b), state, target, smooth, ranks)
    losses, reliable_voxels, sums = _Fused.apply(
        *split(readable(logits_a)), *split(readable(logits_b)), state, target == "other", smooth, ranks
    )
    return PseudoSupervised(losses[0], losses[1], reliable_voxels, sums)


def pseudo_supervised_ref(
    logits_a: Tensor, logits_b: Tensor, state: Tensor, target: Target, smooth: float, ranks: Ranks = ALONE
) -> PseudoSupervised:
    """The specification of `pseudo_supervised` in plain PyTorch."""
    reliable = is_reliable(state)  # [U, *spatial]
    over = (0, *range(2, logits_a.ndim))
    ce, sizes, overlaps, squares = [], [], [], []
    for logits, other in ((logits_a, logits_b), (logits_b, logits_a)):
        t = pseudo_label(state) if target == "state" else other.argmax(1)
        log_p = working(logits).log_softmax(1)
        p = torch.where(reliable.unsqueeze(1), log_p.exp(), 0)
        taught = torch.zeros_like(p).scatter_(1, t.unsqueeze(1), 1.0) * reliable.unsqueeze(1)
        ce.append(-torch.where(reliable, log_p.gather(1, t.unsqueeze(1)).squeeze(1), 0).sum())
        sizes.append(taught.sum(over))  # [C]
        overlaps.append((p * taught).sum(over))
        squares.append(p.square().sum(over))
    sums = torch.cat((*sizes, *overlaps, *squares)).double()
    return _terms(torch.stack(ce).double(), reliable.count_nonzero(), sums, smooth, ranks, working(logits_a).dtype)


def _terms(
    ce: Tensor, reliable_voxels: Tensor, sums: Tensor, smooth: float, ranks: Ranks, dtype: torch.dtype
) -> PseudoSupervised:
    """What the sums over a rank's voxels make together with those of the others."""
    total = ranks.sum(torch.cat((ce, reliable_voxels.double().view(1), sums)))
    ce, count, sums = total[:2], total[2], total[3:]
    size, overlap, square = sums.view(3, 2, -1)
    dice = (1 - (2 * overlap + smooth) / (square + size + smooth))[:, 1:].mean(1)
    return PseudoSupervised((ce / count.clamp_min(1)).to(dtype), dice.to(dtype), count.detach().long(), sums.detach())


define(
    "pseudo_supervised(Tensor logits_a, Tensor logits_b, Tensor state, bool other, float smooth, Tensor? weights_a=None,"
    " Tensor? weights_b=None) -> (Tensor losses, Tensor reliable_voxels, Tensor sums)"
)
define(
    "pseudo_supervised_backward(Tensor grad_losses, Tensor logits_a, Tensor logits_b, Tensor state, Tensor reliable_voxels,"
    " Tensor sums, bool other, float smooth, Tensor(a!) grad_a, Tensor(b!) grad_b, Tensor? weights_a=None,"
    " Tensor? weights_b=None, Tensor(c!)? grad_weights_a=None, Tensor(d!)? grad_weights_b=None) -> ()"
)


@fake("pseudo_supervised")
def _(
    logits_a: Tensor,
    logits_b: Tensor,
    state: Tensor,
    other: bool,
    smooth: float,
    weights_a: Tensor | None = None,
    weights_b: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        logits_a.new_empty((2, 2), dtype=torch.float32),
        logits_a.new_empty((), dtype=torch.int64),
        logits_a.new_empty(6 * join(logits_a, weights_a).shape[1], dtype=torch.float64),
    )


@fake("pseudo_supervised_backward")
def _(*_: Any) -> None: ...


class _Fused(torch.autograd.Function):
    """losses [2, 2] (cross-entropy, Dice), the number of reliable voxels [], and the sums that the gradient needs."""

    @staticmethod
    def forward(
        ctx: Any,
        values_a: Tensor,
        weights_a: Tensor | None,
        values_b: Tensor,
        weights_b: Tensor | None,
        state: Tensor,
        other: bool,
        smooth: float,
        ranks: Ranks,
    ) -> tuple[Tensor, Tensor, Tensor]:
        losses, reliable_voxels, sums = kernels(values_a).pseudo_supervised(
            values_a, values_b, state, other, smooth, weights_a, weights_b
        )
        if ranks.size > 1:
            ce = losses[0] * reliable_voxels
            *parts, reliable_voxels, sums = _terms(ce, reliable_voxels, sums, smooth, ranks, losses.dtype)
            losses = torch.stack(parts)
        ctx.save_for_backward(values_a, weights_a, values_b, weights_b, state, reliable_voxels, sums)
        ctx.other, ctx.smooth, ctx.size = other, smooth, ranks.size
        ctx.mark_non_differentiable(reliable_voxels, sums)
        return losses, reliable_voxels, sums

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        values_a, weights_a, values_b, weights_b, state, reliable_voxels, sums = ctx.saved_tensors
        logits_a, logits_b = join(values_a, weights_a), join(values_b, weights_b)
        grad_a, grad_b = empty_gradient(logits_a), empty_gradient(logits_b)
        pseudo_supervised_backward(
            *(ctx.size * grad_losses, logits_a, logits_b, state, reliable_voxels, sums, ctx.other, ctx.smooth),
            *(grad_a, grad_b),
        )
        return *split(grad_a), *split(grad_b), *(4 * [None])


def pseudo_supervised_backward(
    grad_losses: Tensor,
    logits_a: Logits,
    logits_b: Logits,
    state: Tensor,
    reliable_voxels: Tensor,
    sums: Tensor,
    other: bool,
    smooth: float,
    grad_a: Logits,
    grad_b: Logits,
) -> None:
    """Writes the gradients of the logits, from those [2, 2] of cross-entropy and Dice."""
    (values_a, weights_a), (values_b, weights_b) = split(logits_a), split(logits_b)
    (to_a, to_weights_a), (to_b, to_weights_b) = split(grad_a), split(grad_b)
    kernels(values_a).pseudo_supervised_backward(
        *(grad_losses, values_a, values_b, state, reliable_voxels, sums, other, smooth, to_a, to_b),
        *(weights_a, weights_b, to_weights_a, to_weights_b),
    )
