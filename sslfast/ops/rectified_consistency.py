"""`rectified_consistency`: two networks teach each other, the less the more they differ, and are drawn together."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sslfast.ops.backend import define, fake, kernels, runs_fused
from sslfast.ops.check import check_logits, check_voxels, working
from sslfast.ops.linear_logits import Logits, empty_gradient, join, readable, split, stored
from sslfast.ops.ranks import ALONE, Ranks
from sslfast.ops.state import SURE_A, SURE_B


class RectifiedConsistency(NamedTuple):
    """Of both networks."""

    rectified: Tensor  # [2] of network a and of b: mean over the voxels where it learns
    cosine: Tensor  # [] mean over all voxels of 1 - cos(p_a, p_b)
    dice: Tensor  # [] mean over the foreground classes of 1 - Dice(p_a, p_b) over all voxels
    voxels: Tensor  # [3] int64: where a learns, where b learns, all
    products: Tensor  # [3, C] float64, what the gradient needs: sum p_a^2, p_b^2 and p_a p_b; 0 for the background


def rectified_consistency(
    logits_a: Logits, logits_b: Logits, state: Tensor, *, smooth: float = 1e-5, ranks: Ranks = ALONE
) -> RectifiedConsistency:
    """Cross pseudo supervision rectified by agreement, and cosine consistency (arXiv 2505.17690 and 2509.13084); and Dice of the one
    network's probabilities with the other's, in which a small structure counts as much as a large one.

    rectified_n = mean over the voxels where the other network m, the teacher, is sure of e^-KL CE + KL with KL = sum_c p_m
    log(p_m / p_n), CE = -log p_n at the teacher's class. Dice_c = (2 sum p_a p_b + smooth) / (sum p_a^2 + sum p_b^2 + smooth) over
    all voxels. The gradient of `rectified` flows through the student only; of cosine and Dice through both. Nobody sure, no
    volume: exactly 0, with zero gradients.

    Args:
        logits_a, logits_b: [U, C, *spatial].
        state: [U, *spatial] uint8, from `reliability`: where a, where b is sure.
        smooth: Dice's epsilon.
        ranks: the processes over whose voxels means and sums go.
    """
    check_logits(logits_a, logits_b)
    check_voxels("state", state, "logits_a", logits_a, (torch.uint8,))
    if not runs_fused(logits_a, logits_b):
        return rectified_consistency_ref(stored(logits_a), stored(logits_b), state, smooth, ranks)
    losses, voxels, products = _Fused.apply(
        *split(readable(logits_a)), *split(readable(logits_b)), state, smooth, ranks
    )
    return RectifiedConsistency(losses[:2], losses[2], losses[3], voxels, products)


def rectified_consistency_ref(
    logits_a: Tensor, logits_b: Tensor, state: Tensor, smooth: float, ranks: Ranks = ALONE
) -> RectifiedConsistency:
    """The specification of `rectified_consistency` in plain PyTorch."""
    a, b = working(logits_a), working(logits_b)
    rectified, counts = [], []
    for student, teacher, sure in ((a, b.detach(), SURE_B), (b, a.detach(), SURE_A)):
        learns = (state & sure) != 0  # [U, *spatial]
        log_p, log_q = student.log_softmax(1), teacher.log_softmax(1)
        kl = (log_q.exp() * (log_q - log_p)).sum(1)
        ce = -log_p.gather(1, teacher.argmax(1, keepdim=True)).squeeze(1)
        counts.append(learns.count_nonzero())
        rectified.append(torch.where(learns, (-kl).exp() * ce + kl, 0).sum())
    p, q = a.softmax(1), b.softmax(1)
    apart = (1 - F.cosine_similarity(p, q, dim=1)).sum()
    over = (0, *range(2, p.ndim))
    products = torch.stack([(x * y).sum(over, dtype=torch.float64) for x, y in ((p, p), (q, q), (p, q))])
    products = F.pad(products[:, 1:], (1, 0))
    voxels = torch.stack((*counts, torch.full_like(counts[0], state.numel())))
    return _terms(torch.stack((*rectified, apart)).double(), voxels, products, smooth, ranks, a.dtype)


def _terms(
    sums: Tensor, voxels: Tensor, products: Tensor, smooth: float, ranks: Ranks, dtype: torch.dtype
) -> RectifiedConsistency:
    """What the sums over a rank's voxels make together with those of the others."""
    total = ranks.sum(torch.cat((sums, voxels.double(), products.flatten())))
    sums, counts, products = total[:3], total[3:6].detach(), total[6:].view(3, -1)
    means = (sums / counts.clamp_min(1)).to(dtype)
    square_a, square_b, product = products[:, 1:]
    dice = (1 - (2 * product + smooth) / (square_a + square_b + smooth)).mean()
    return RectifiedConsistency(means[:2], means[2], dice.to(dtype), counts.long(), products.detach())


define(
    "rectified_consistency(Tensor logits_a, Tensor logits_b, Tensor state, float smooth, Tensor? weights_a=None,"
    " Tensor? weights_b=None) -> (Tensor losses, Tensor voxels, Tensor products)"
)
define(
    "rectified_consistency_backward(Tensor grad_losses, Tensor logits_a, Tensor logits_b, Tensor state, Tensor voxels,"
    " Tensor products, float smooth, Tensor(a!) grad_a, Tensor(b!) grad_b, Tensor? weights_a=None, Tensor? weights_b=None,"
    " Tensor(c!)? grad_weights_a=None, Tensor(d!)? grad_weights_b=None) -> ()"
)


@fake("rectified_consistency")
def _(
    logits_a: Tensor,
    logits_b: Tensor,
    state: Tensor,
    smooth: float,
    weights_a: Tensor | None = None,
    weights_b: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        logits_a.new_empty(4, dtype=torch.float32),
        logits_a.new_empty(3, dtype=torch.int64),
        logits_a.new_empty((3, join(logits_a, weights_a).shape[1]), dtype=torch.float64),
    )


@fake("rectified_consistency_backward")
def _(*_: Any) -> None: ...


class _Fused(torch.autograd.Function):
    """losses [4] (rectified of a, of b, cosine, Dice), the voxels [3] they go over, and the sums that the gradient needs."""

    @staticmethod
    def forward(
        ctx: Any,
        values_a: Tensor,
        weights_a: Tensor | None,
        values_b: Tensor,
        weights_b: Tensor | None,
        state: Tensor,
        smooth: float,
        ranks: Ranks,
    ) -> tuple[Tensor, Tensor, Tensor]:
        losses, voxels, products = kernels(values_a).rectified_consistency(
            values_a, values_b, state, smooth, weights_a, weights_b
        )
        if ranks.size > 1:
            sums = losses[:3] * voxels
            rectified, cosine, dice, voxels, products = _terms(sums, voxels, products, smooth, ranks, losses.dtype)
            losses = torch.cat((rectified, cosine.view(1), dice.view(1)))
        ctx.save_for_backward(values_a, weights_a, values_b, weights_b, state, voxels, products)
        ctx.smooth, ctx.size = smooth, ranks.size
        ctx.mark_non_differentiable(voxels, products)
        return losses, voxels, products

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        values_a, weights_a, values_b, weights_b, state, voxels, products = ctx.saved_tensors
        logits_a, logits_b = join(values_a, weights_a), join(values_b, weights_b)
        grad_a, grad_b = empty_gradient(logits_a), empty_gradient(logits_b)
        rectified_consistency_backward(
            ctx.size * grad_losses, logits_a, logits_b, state, voxels, products, ctx.smooth, grad_a, grad_b
        )
        return *split(grad_a), *split(grad_b), *(3 * [None])


def rectified_consistency_backward(
    grad_losses: Tensor,
    logits_a: Logits,
    logits_b: Logits,
    state: Tensor,
    voxels: Tensor,
    products: Tensor,
    smooth: float,
    grad_a: Logits,
    grad_b: Logits,
) -> None:
    """Writes the gradients of the logits, from those [4] of both rectified terms, cosine and Dice."""
    (values_a, weights_a), (values_b, weights_b) = split(logits_a), split(logits_b)
    (to_a, to_weights_a), (to_b, to_weights_b) = split(grad_a), split(grad_b)
    kernels(values_a).rectified_consistency_backward(
        *(grad_losses, values_a, values_b, state, voxels, products, smooth, to_a, to_b),
        *(weights_a, weights_b, to_weights_a, to_weights_b),
    )
