"""`pseudo_supervised`: cross-entropy of both networks against the pseudo-labels of the reliable voxels."""

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
    reliable_voxels: Tensor  # [] int64


def pseudo_supervised(
    logits_a: Logits, logits_b: Logits, state: Tensor, *, target: Target = "state", ranks: Ranks = ALONE
) -> PseudoSupervised:
    """Cross-entropy against the pseudo-labels, mean over the reliable voxels (arXiv 2311.12617, its unsupervised loss).

    L_n = sum over reliable voxels of -log softmax(z_n)_t / max(number of reliable voxels, 1). The gradient flows through
    z_n only. No reliable voxel: exactly 0, with zero gradients.

    Args:
        logits_a, logits_b: [U, C, *spatial].
        state: [U, *spatial] uint8, from `reliability`.
        target: t is the byte map's class, or each network's t is the other network's argmax.
        ranks: the processes over whose voxels the mean goes.
    """
    check_logits(logits_a, logits_b)
    check_voxels("state", state, "logits_a", logits_a, (torch.uint8,))
    if target not in ("state", "other"):
        raise ValueError(f"target is {target!r}; it must be 'state' or 'other'")
    if not runs_fused(logits_a, logits_b):
        ce, own = pseudo_supervised_ref(stored(logits_a), stored(logits_b), state, target)
    else:
        ce, own = _Fused.apply(*split(readable(logits_a)), *split(readable(logits_b)), state, target == "other")
    return PseudoSupervised(*ranks.mean(ce, own))


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


define(
    "pseudo_supervised(Tensor logits_a, Tensor logits_b, Tensor state, bool other, Tensor? weights_a=None,"
    " Tensor? weights_b=None) -> (Tensor ce, Tensor reliable_voxels)"
)
define(
    "pseudo_supervised_backward(Tensor grad_ce, Tensor logits_a, Tensor logits_b, Tensor state, Tensor reliable_voxels,"
    " bool other, Tensor(a!) grad_a, Tensor(b!) grad_b, Tensor? weights_a=None, Tensor? weights_b=None,"
    " Tensor(c!)? grad_weights_a=None, Tensor(d!)? grad_weights_b=None) -> ()"
)


@fake("pseudo_supervised")
def _(logits_a: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return logits_a.new_empty(2, dtype=torch.float32), logits_a.new_empty((), dtype=torch.int64)


@fake("pseudo_supervised_backward")
def _(*_: Any) -> None: ...


class _Fused(torch.autograd.Function):
    """ce [2] and the number of reliable voxels []."""

    @staticmethod
    def forward(
        ctx: Any,
        values_a: Tensor,
        weights_a: Tensor | None,
        values_b: Tensor,
        weights_b: Tensor | None,
        state: Tensor,
        other: bool,
    ) -> tuple[Tensor, Tensor]:
        ce, reliable_voxels = kernels(values_a).pseudo_supervised(
            values_a, values_b, state, other, weights_a, weights_b
        )
        ctx.save_for_backward(values_a, weights_a, values_b, weights_b, state, reliable_voxels)
        ctx.other = other
        ctx.mark_non_differentiable(reliable_voxels)
        return ce, reliable_voxels

    @staticmethod
    def backward(ctx: Any, grad_ce: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        values_a, weights_a, values_b, weights_b, state, reliable_voxels = ctx.saved_tensors
        logits_a, logits_b = join(values_a, weights_a), join(values_b, weights_b)
        grad_a, grad_b = empty_gradient(logits_a), empty_gradient(logits_b)
        pseudo_supervised_backward(grad_ce, logits_a, logits_b, state, reliable_voxels, ctx.other, grad_a, grad_b)
        return *split(grad_a), *split(grad_b), None, None


def pseudo_supervised_backward(
    grad_ce: Tensor,
    logits_a: Logits,
    logits_b: Logits,
    state: Tensor,
    reliable_voxels: Tensor,
    other: bool,
    grad_a: Logits,
    grad_b: Logits,
) -> None:
    """Writes the gradients of the logits, from those [2] of the cross-entropies."""
    (values_a, weights_a), (values_b, weights_b) = split(logits_a), split(logits_b)
    (to_a, to_weights_a), (to_b, to_weights_b) = split(grad_a), split(grad_b)
    kernels(values_a).pseudo_supervised_backward(
        *(grad_ce, values_a, values_b, state, reliable_voxels, other, to_a, to_b),
        *(weights_a, weights_b, to_weights_a, to_weights_b),
    )
