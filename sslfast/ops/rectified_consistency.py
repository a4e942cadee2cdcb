"""`rectified_consistency`: two networks teach each other, the less the more they differ, and are drawn together."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sslfast.ops.backend import define, empty_like, fake, kernels, runs_fused
from sslfast.ops.check import check_logits, check_voxels, working
from sslfast.ops.ranks import ALONE, Ranks
from sslfast.ops.state import is_reliable


class RectifiedConsistency(NamedTuple):
    """Index 0 is network a, 1 is network b."""

    rectified: Tensor  # [2] mean over the voxels that are reliable for this student
    cosine: Tensor  # [] mean over all voxels of 1 - cos(p_a, p_b)
    dice: Tensor  # [] mean over the foreground classes of 1 - Dice(p_a, p_b) over all voxels
    reliable_voxels: Tensor  # [2] int64


def rectified_consistency(
    logits_a: Tensor, logits_b: Tensor, state_a: Tensor, state_b: Tensor, *, smooth: float = 1e-5, ranks: Ranks = ALONE
) -> RectifiedConsistency:
    """Cross pseudo supervision rectified by agreement, and cosine consistency (arXiv 2505.17690 and 2509.13084); and Dice of the one
    network's probabilities with the other's, in which a small structure counts as much as a large one.

    rectified_n = mean over the voxels reliable for student n of e^-KL CE + KL, KL = sum_c p_m log(p_m / p_n) with the other
    network m as the teacher, CE = -log p_n at the teacher's class. Dice_c = (2 sum p_a p_b + smooth) / (sum p_a^2 + sum p_b^2 +
    smooth) over all voxels. The gradient of `rectified` flows through the student only; of cosine and Dice through both. No
    reliable voxel, no volume: exactly 0, with zero gradients.

    Args:
        logits_a, logits_b: [U, C, *spatial].
        state_a, state_b: [U, *spatial] uint8, from `reliability`: what is reliable for a, for b, as a student.
        smooth: Dice's epsilon.
        ranks: the processes over whose voxels means and sums go.
    """
    check_logits(logits_a, logits_b)
    check_voxels("state_a", state_a, "logits_a", logits_a, (torch.uint8,))
    check_voxels("state_b", state_b, "logits_a", logits_a, (torch.uint8,))
    if runs_fused(logits_a, logits_b):
        rectified, cosine, count, products = _Fused.apply(logits_a, logits_b, state_a, state_b)
    else:
        rectified, cosine, count, products = rectified_consistency_ref(logits_a, logits_b, state_a, state_b)
    rectified, count = ranks.mean(rectified, count)
    cosine, _ = ranks.mean(cosine, torch.full_like(count[0], state_a.numel()))
    square_a, square_b, product = ranks.sum(products)[:, 1:]  # [C - 1] each
    dice = (1 - (2 * product + smooth) / (square_a + square_b + smooth)).mean()
    return RectifiedConsistency(rectified, cosine, dice.to(rectified.dtype), count)


def rectified_consistency_ref(
    logits_a: Tensor, logits_b: Tensor, state_a: Tensor, state_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The specification of the kernels in plain PyTorch: rectified, cosine, reliable voxels, and [3, C] float64 sum p_a^2, p_b^2 and p_a p_b."""
    a, b = working(logits_a), working(logits_b)
    rectified, counts = [], []
    for student, teacher, state in ((a, b.detach(), state_a), (b, a.detach(), state_b)):
        reliable = is_reliable(state)  # [U, *spatial]
        log_p, log_q = student.log_softmax(1), teacher.log_softmax(1)
        kl = (log_q.exp() * (log_q - log_p)).sum(1)
        ce = -log_p.gather(1, teacher.argmax(1, keepdim=True)).squeeze(1)
        counts.append(reliable.count_nonzero())
        rectified.append(torch.where(reliable, (-kl).exp() * ce + kl, 0).sum() / counts[-1].clamp_min(1))
    p, q = a.softmax(1), b.softmax(1)
    apart = 1 - F.cosine_similarity(p, q, dim=1)
    over = (0, *range(2, p.ndim))
    products = torch.stack([(x * y).sum(over, dtype=torch.float64) for x, y in ((p, p), (q, q), (p, q))])
    return torch.stack(rectified), apart.sum() / max(apart.numel(), 1), torch.stack(counts), products


define(
    "rectified_consistency(Tensor logits_a, Tensor logits_b, Tensor state_a, Tensor state_b)"
    " -> (Tensor rectified, Tensor cosine, Tensor reliable_voxels, Tensor products)"
)
define(
    "rectified_consistency_backward(Tensor grad_rectified, Tensor grad_cosine, Tensor grad_products, Tensor logits_a,"
    " Tensor logits_b, Tensor state_a, Tensor state_b, Tensor reliable_voxels, Tensor(a!) grad_a, Tensor(b!) grad_b) -> ()"
)


@fake("rectified_consistency")
def _(logits_a: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    losses = logits_a.new_empty(2, dtype=torch.float32), logits_a.new_empty((), dtype=torch.float32)
    products = logits_a.new_empty((3, logits_a.shape[1]), dtype=torch.float64)
    return *losses, logits_a.new_empty(2, dtype=torch.int64), products


@fake("rectified_consistency_backward")
def _(*_: Any) -> None: ...


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_a: Tensor, logits_b: Tensor, state_a: Tensor, state_b: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rectified, cosine, count, products = kernels(logits_a).rectified_consistency(
            logits_a, logits_b, state_a, state_b
        )
        ctx.save_for_backward(logits_a, logits_b, state_a, state_b, count)
        ctx.mark_non_differentiable(count)
        return rectified, cosine, count, products

    @staticmethod
    def backward(
        ctx: Any, grad_rectified: Tensor, grad_cosine: Tensor, _: Any, grad_products: Tensor
    ) -> tuple[Tensor | None, ...]:
        logits_a, logits_b, *rest = ctx.saved_tensors
        grad_a, grad_b = empty_like(logits_a), empty_like(logits_b)
        kernels(logits_a).rectified_consistency_backward(
            grad_rectified, grad_cosine, grad_products, logits_a, logits_b, *rest, grad_a, grad_b
        )
        return grad_a, grad_b, None, None
