"""`voxel_infonce`: contrastive loss of unreliable voxels with the class prototypes and sampled negatives."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslfast.ops.backend import ops_for, runs_fused
from sslfast.ops.check import (
    FLOATS,
    INTEGERS,
    check_device,
    check_range,
    check_reducer,
    check_tensor,
    check_values,
    to_compute_dtype,
)
from sslfast.ops.class_prototypes import unit
from sslfast.ops.reduce import SINGLE_PROCESS, Reducer
from sslfast.ops.registry import define
from sslfast.ops.sums import Slots, pack, unpack
from sslfast.renamed import old_arguments

SLOTS: Slots = {"loss": (), "anchors": ()}  # the sum over the anchors whose class has a prototype, and their number


class VoxelInfoNCE(NamedTuple):
    """The loss, and the number of anchors in its mean."""

    loss: Tensor  # []
    anchors: Tensor  # [] int64


@old_arguments(ranks="reducer")
def voxel_infonce(
    anchors: Tensor,
    anchor_counts: Tensor,
    prototypes: Tensor,
    prototype_counts: Tensor,
    negatives: Tensor,
    negative_counts: Tensor,
    *,
    temperature: float = 0.1,
    reducer: Reducer = SINGLE_PROCESS,
) -> VoxelInfoNCE:
    """InfoNCE, averaged over the anchors whose class has a prototype (arXiv 2311.12617, its contrastive loss).

    With all vectors scaled to unit length, the loss of an anchor g of class t, with prototypes m and negatives n of t,
    is l = -log( e^{g.m_t/T} / (sum_c e^{g.m_c/T} + sum_n e^{g.n/T}) ). Without negatives this is a softmax over the
    class prototypes. Without anchors it is exactly 0, with zero gradients. A vector with a NaN or infinite number makes
    the loss NaN, unless it lies beyond the counts: such vectors are not read.

    Args:
        anchors: [C, A, K] features of the anchors of each class; the first anchor_counts[c] are used. Only they get a
            gradient.
        anchor_counts: [C] integers, 0 to A.
        prototypes: [C, K] sums or means of each class's features; scaled to unit length here.
        prototype_counts: [C] integers; 0 if the class has no prototype.
        negatives: [C, Q, K] features of the negatives of each class; Q may be 0.
        negative_counts: [C] integers, 0 to Q.
        temperature: T, 1e-6 to 1e6.
        reducer: process group over which the sums are all-reduced; prototypes and negatives are the same on every rank.

    Raises:
        ValueError: shapes or devices that do not match, a temperature out of range, or a count. On a GPU a count of
            anchors or negatives out of range makes the loss NaN instead, because checking would synchronise.
        TypeError: an argument of the wrong kind.
    """
    for name, vectors in (("anchors", anchors), ("prototypes", prototypes), ("negatives", negatives)):
        check_tensor(name, vectors, FLOATS)
    if anchors.ndim != 3:
        raise ValueError(f"anchors has shape {tuple(anchors.shape)}; it must be [C, A, K]")
    classes, _, width = anchors.shape
    for name, tensor, shape in (
        ("anchor_counts", anchor_counts, (classes,)),
        ("prototypes", prototypes, (classes, width)),
        ("prototype_counts", prototype_counts, (classes,)),
        ("negatives", negatives, (classes, negatives.shape[1] if negatives.ndim > 1 else 0, width)),
        ("negative_counts", negative_counts, (classes,)),
    ):
        if name.endswith("counts"):
            check_tensor(name, tensor, INTEGERS)
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; for anchors {tuple(anchors.shape)} it must be {shape}"
            )
        check_device(name, tensor, "anchors", anchors)
    check_reducer(reducer)
    check_range("temperature", temperature, 1e-6, 1e6)
    for name, counts, most in (
        ("anchor_counts", anchor_counts, anchors.shape[1]),
        ("prototype_counts", prototype_counts, None),
        ("negative_counts", negative_counts, negatives.shape[1]),
    ):
        check_values(name, counts, 0, most)
    keys = prototypes.detach(), prototype_counts, negatives.detach(), negative_counts
    rows = classes * anchors.shape[1], classes + negatives.shape[1]
    if not runs_fused(anchors, prototypes, negatives) or prefers_dense(anchors.device.type, *rows, width):
        sums = voxel_infonce_ref(anchors, anchor_counts, *keys, temperature)
    else:
        tensors = anchors, anchor_counts, *keys
        sums = _Fused.apply(*(t.float() if t.is_floating_point() else t.long() for t in tensors), temperature)
    s = unpack(SLOTS, reducer.sum(sums))
    loss = s["loss"] / s["anchors"].clamp_min(1)
    return VoxelInfoNCE(loss.to(to_compute_dtype(anchors).dtype), s["anchors"].detach().long())


def prefers_dense(device: str, rows: int, keys: int, width: int) -> bool:
    """True if matrix products are faster than kernels: on a GPU, for many wide rows whose similarities fit in memory.

    Per similarity a kernel computes `width` multiplications; a dense product makes 8 passes over 4 stored bytes. The
    bounds are predictions (benchmarks/LOG.md).
    """
    return device == "cuda" and width >= 64 and rows * keys * width >= 2**28 and rows * keys <= 2**28


def voxel_infonce_ref(
    anchors: Tensor,
    anchor_counts: Tensor,
    prototypes: Tensor,
    prototype_counts: Tensor,
    negatives: Tensor,
    negative_counts: Tensor,
    temperature: float,
) -> Tensor:
    """The specification of the sums in plain PyTorch."""
    has_prototype = prototype_counts > 0  # [C]
    used = valid_anchors(anchor_counts, prototype_counts, anchors.shape[1])  # [C, A]
    is_negative = torch.arange(negatives.shape[1], device=negatives.device) < negative_counts.unsqueeze(1)  # [C, Q]
    g, m, n = (
        unit(torch.where(counts.unsqueeze(-1), to_compute_dtype(vectors), 0), dim=-1)  # what does not count may be NaN
        for vectors, counts in ((anchors, used), (prototypes, has_prototype), (negatives, is_negative))
    )

    with torch.autocast(g.device.type, enabled=False):  # autocast would round the similarities
        to_prototypes = (g @ m.T / temperature).masked_fill(~has_prototype, -torch.inf)  # [C, A, C]
        to_negatives = (g @ n.mT / temperature).masked_fill(~is_negative.unsqueeze(1), -torch.inf)  # [C, A, Q]
    similarity = torch.cat((to_prototypes, to_negatives), -1).masked_fill(~used.unsqueeze(-1), 0)
    positive = similarity.diagonal(dim1=0, dim2=2).T  # [C, A]
    loss = torch.where(used, similarity.logsumexp(-1) - positive, 0).sum()
    fit = (anchor_counts >= 0) & (anchor_counts <= anchors.shape[1])
    fit &= (negative_counts >= 0) & (negative_counts <= negatives.shape[1])
    loss = torch.where(fit.all(), loss, torch.nan)
    return pack(SLOTS, loss=loss, anchors=used.count_nonzero())


def valid_anchors(anchor_counts: Tensor, prototype_counts: Tensor, capacity: int) -> Tensor:
    """Bool [C, capacity]: true for rows that hold an anchor whose class has a prototype."""
    filled = torch.arange(capacity, device=anchor_counts.device) < anchor_counts.unsqueeze(1)
    return filled & (prototype_counts > 0).unsqueeze(1)


define(
    "voxel_infonce(Tensor anchors, Tensor anchor_counts, Tensor prototypes, Tensor prototype_counts, Tensor negatives,"
    " Tensor negative_counts, float temperature) -> (Tensor sums, Tensor lse)",
    lambda anchors, *_: (anchors.new_empty(2, dtype=torch.float64), anchors.new_empty(anchors.shape[:2])),
)
define(
    "voxel_infonce_backward(Tensor grad_sums, Tensor lse, Tensor anchors, Tensor anchor_counts, Tensor prototypes,"
    " Tensor prototype_counts, Tensor negatives, Tensor negative_counts, float temperature) -> Tensor",
    lambda grad_sums, lse, anchors, *_: anchors.new_empty(anchors.shape),
)


class _Fused(torch.autograd.Function):
    """The sums [2]. The log-sum-exp [C, A] of each anchor's similarities is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, temperature = arguments
        result: tuple[Tensor, Tensor] = ops_for(tensors[0]).voxel_infonce(*tensors, temperature)
        sums, lse = result
        ctx.save_for_backward(lse, *tensors)
        ctx.temperature = temperature
        return sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        grad = ops_for(grad_sums).voxel_infonce_backward(grad_sums, *ctx.saved_tensors, ctx.temperature)
        return grad, *(6 * [None])
