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
    reliable_voxels: Tensor  # [2] int64


def rectified_consistency(
    logits_a: Tensor, logits_b: Tensor, state_a: Tensor, state_b: Tensor, *, ranks: Ranks = ALONE
) -> RectifiedConsistency:
    """Cross pseudo supervision rectified by agreement, and cosine consistency (arXiv 2505.17690 and 2509.13084).

    rectified_n = mean over the voxels reliable for student n of e^-KL CE + KL, KL = sum_c p_m log(p_m / p_n) with the other
    network m as the teacher, CE = -log p_n at the teacher's class. The gradient flows through the student only; the cosine's
    through both. No reliable voxel, no volume: exactly 0, with zero gradients.

    Args:
        logits_a, logits_b: [U, C, *spatial].
        state_a, state_b: [U, *spatial] uint8, from `reliability`: what is reliable for a, for b, as a student.
        ranks: the processes over whose voxels the means go.
    """
    check_logits(logits_a, logits_b)
    check_voxels("state_a", state_a, "logits_a", logits_a, (torch.uint8,))
    check_voxels("state_b", state_b, "logits_a", logits_a, (torch.uint8,))
    if runs_fused(logits_a, logits_b):
        rectified, cosine, count = _Fused.apply(logits_a, logits_b, state_a, state_b)
    else:
        rectified, cosine, count = rectified_consistency_ref(logits_a, logits_b, state_a, state_b)
    rectified, count = ranks.mean(rectified, count)
    cosine, _ = ranks.mean(cosine, torch.full_like(count[0], state_a.numel()))
    return RectifiedConsistency(rectified, cosine, count)


def rectified_consistency_ref(
    logits_a: Tensor, logits_b: Tensor, state_a: Tensor, state_b: Tensor
) -> RectifiedConsistency:
    """The specification of `rectified_consistency` in plain PyTorch."""
    a, b = working(logits_a), working(logits_b)
    rectified, counts = [], []
    for student, teacher, state in ((a, b.detach(), state_a), (b, a.detach(), state_b)):
        reliable = is_reliable(state)  # [U, *spatial]
        log_p, log_q = student.log_softmax(1), teacher.log_softmax(1)
        kl = (log_q.exp() * (log_q - log_p)).sum(1)
        ce = -log_p.gather(1, teacher.argmax(1, keepdim=True)).squeeze(1)
        counts.append(reliable.count_nonzero())
        rectified.append(torch.where(reliable, (-kl).exp() * ce + kl, 0).sum() / counts[-1].clamp_min(1))
    apart = 1 - F.cosine_similarity(a.softmax(1), b.softmax(1), dim=1)
    return RectifiedConsistency(torch.stack(rectified), apart.sum() / max(apart.numel(), 1), torch.stack(counts))


define(
    "rectified_consistency(Tensor logits_a, Tensor logits_b, Tensor state_a, Tensor state_b)"
    " -> (Tensor rectified, Tensor cosine, Tensor reliable_voxels)"
)
define(
    "rectified_consistency_backward(Tensor grad_rectified, Tensor grad_cosine, Tensor logits_a, Tensor logits_b,"
    " Tensor state_a, Tensor state_b, Tensor reliable_voxels, Tensor(a!) grad_a, Tensor(b!) grad_b) -> ()"
)


@fake("rectified_consistency")
def _(logits_a: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    losses = logits_a.new_empty(2, dtype=torch.float32), logits_a.new_empty((), dtype=torch.float32)
    return *losses, logits_a.new_empty(2, dtype=torch.int64)


@fake("rectified_consistency_backward")
def _(*_: Any) -> None: ...


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_a: Tensor, logits_b: Tensor, state_a: Tensor, state_b: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        rectified, cosine, count = kernels(logits_a).rectified_consistency(logits_a, logits_b, state_a, state_b)
        ctx.save_for_backward(logits_a, logits_b, state_a, state_b, count)
        ctx.mark_non_differentiable(count)
        return rectified, cosine, count

    @staticmethod
    def backward(ctx: Any, grad_rectified: Tensor, grad_cosine: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        logits_a, logits_b, *rest = ctx.saved_tensors
        grad_a, grad_b = empty_like(logits_a), empty_like(logits_b)
        kernels(logits_a).rectified_consistency_backward(
            grad_rectified, grad_cosine, logits_a, logits_b, *rest, grad_a, grad_b
        )
        return grad_a, grad_b, None, None
