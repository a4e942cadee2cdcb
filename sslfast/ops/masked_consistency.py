"""`masked_consistency`: squared distance of a student's probabilities from a teacher's, where the teacher is sure."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslfast.ops.backend import define, empty_like, fake, kernels, runs_fused
from sslfast.ops.check import check_pair, working
from sslfast.ops.ranks import ALONE, Ranks


class MaskedConsistency(NamedTuple):
    """The loss, and over how many voxels it is the mean."""

    loss: Tensor  # []
    certain_voxels: Tensor  # [] int64


def masked_consistency(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    max_entropy: float = math.inf,
    ranks: Ranks = ALONE,
) -> MaskedConsistency:
    """Mean of (p - q)^2 over the classes and over the voxels where H(q) < max_entropy; p = softmax(student),
    q = softmax(teacher / temperature).

    As in mean teachers (Tarvainen & Valpola, NeurIPS 2017), with a bound on the teacher's entropy as in UA-MT (Yu et al.,
    MICCAI 2019), with a low temperature as in MCF (Wang et al., CVPR 2023). For a teacher given by probabilities pass their
    logarithm. The gradient flows through the student only. No such voxel, no volume: exactly 0, with zero gradients.

    Args:
        student, teacher: logits [U, C, *spatial].
        temperature: below 1 it sharpens the teacher.
        max_entropy: in nats; ln C is the most there is.
        ranks: the processes over whose voxels the mean goes.
    """
    check_pair("student", student, "teacher", teacher)
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")
    if runs_fused(student, teacher):
        loss, certain = _Fused.apply(student, teacher.detach(), temperature, max_entropy)
    else:
        loss, certain = masked_consistency_ref(student, teacher, temperature, max_entropy)
    return MaskedConsistency(*ranks.mean(loss, certain))


def masked_consistency_ref(
    student: Tensor, teacher: Tensor, temperature: float, max_entropy: float
) -> MaskedConsistency:
    """The specification of `masked_consistency` in plain PyTorch."""
    log_q = (working(teacher.detach()) / temperature).log_softmax(1)
    q = log_q.exp()
    entropy = -torch.where(q > 0, q * log_q, 0).sum(1)  # [U, *spatial]
    certain = ~(entropy >= max_entropy)  # NaN teaches NaN
    count = certain.count_nonzero()
    apart = (working(student).softmax(1) - q).square().mean(1)
    return MaskedConsistency(torch.where(certain, apart, 0).sum() / count.clamp_min(1), count)


define(
    "masked_consistency(Tensor student, Tensor teacher, float temperature, float max_entropy)"
    " -> (Tensor loss, Tensor certain_voxels)"
)
define(
    "masked_consistency_backward(Tensor grad_loss, Tensor student, Tensor teacher, Tensor certain_voxels,"
    " float temperature, float max_entropy, Tensor(a!) grad) -> ()"
)


@fake("masked_consistency")
def _(student: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return student.new_empty((), dtype=torch.float32), student.new_empty((), dtype=torch.int64)


@fake("masked_consistency_backward")
def _(*_: Any) -> None: ...


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, temperature: float, max_entropy: float
    ) -> tuple[Tensor, Tensor]:
        loss, certain = kernels(student).masked_consistency(student, teacher, temperature, max_entropy)
        ctx.save_for_backward(student, teacher, certain)
        ctx.options = temperature, max_entropy
        ctx.mark_non_differentiable(certain)
        return loss, certain

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        student, teacher, certain = ctx.saved_tensors
        grad = empty_like(student)
        kernels(student).masked_consistency_backward(grad_loss, student, teacher, certain, *ctx.options, grad)
        return grad, None, None, None
