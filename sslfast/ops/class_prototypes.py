"""`class_prototypes`: sums of the unit features of each class's reliable voxels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslfast.ops.backend import define, empty_like, fake, kernels, runs_fused
from sslfast.ops.check import FLOATS, MAX_CLASSES, check_pair, check_range, check_voxels, working
from sslfast.ops.ranks import ALONE, Ranks
from sslfast.ops.state import is_reliable, pseudo_label


class ClassPrototypes(NamedTuple):
    """`unit(sums)` are the prototypes."""

    sums: Tensor  # [C, K]
    counts: Tensor  # [C] int64


def class_prototypes(
    features: Tensor,
    state: Tensor,
    num_classes: int,
    *,
    other: Tensor | None = None,
    second: Tensor | None = None,
    ranks: Ranks = ALONE,
) -> ClassPrototypes:
    """For each class c, the sum of f / |f| over the reliable voxels with pseudo-label c (arXiv 2311.12617, its prototypes).

    Args:
        features: [U, K, *spatial]; in CUDA K is at most 256. A zero feature vector counts as a zero unit vector.
        state: [U, *spatial] uint8, from `reliability`.
        num_classes: C.
        other, second: where the integer tensor `second` [] is not 0, `other` [U, K, *spatial] takes the place of
            `features`; the host need not know.
        ranks: the processes over whose voxels the sums go.
    """
    if (other is None) != (second is None):
        raise ValueError("other and second go together")
    if features.dtype not in FLOATS:
        raise TypeError(f"features has dtype {features.dtype}; it must be float32, bfloat16, float16 or float64")
    if features.ndim < 3:
        raise ValueError(f"features has shape {tuple(features.shape)}; it must be [U, K, D, H, W]")
    check_voxels("state", state, "features", features, (torch.uint8,))
    check_range("num_classes", num_classes, 2, MAX_CLASSES)
    if other is not None and second is not None:
        check_pair("features", features, "other", other)
        if not runs_fused(features, other) or features.requires_grad or other.requires_grad:
            features, other, second = torch.where(second != 0, other, features), None, None
    if not runs_fused(features):
        found = class_prototypes_ref(features, state, num_classes)
    else:
        second = None if second is None else second.long()
        found = ClassPrototypes(*_Fused.apply(features, state, num_classes, other, second))
    return ClassPrototypes(ranks.sum(found.sums), ranks.sum(found.counts))


def class_prototypes_ref(features: Tensor, state: Tensor, num_classes: int) -> ClassPrototypes:
    """The specification of `class_prototypes` in plain PyTorch."""
    directions = unit(working(features), dim=1)  # [U, K, *spatial]
    member = [is_reliable(state) & (pseudo_label(state) == c) for c in range(num_classes)]
    channels_last = directions.movedim(1, -1)
    sums = [torch.where(m.unsqueeze(-1), channels_last, 0).flatten(0, -2).sum(0) for m in member]
    return ClassPrototypes(torch.stack(sums), torch.stack([m.count_nonzero() for m in member]))


def unit(vectors: Tensor, dim: int) -> Tensor:
    """v / |v| along `dim`; a vector shorter than 1e-12 becomes zero, and so does its gradient."""
    length = torch.linalg.vector_norm(vectors, dim=dim, keepdim=True)
    return torch.where(length < 1e-12, 0, vectors / length.clamp_min(1e-12))


define(
    "class_prototypes(Tensor features, Tensor state, int num_classes, Tensor? other=None, Tensor? second=None)"
    " -> (Tensor sums, Tensor counts)"
)
define("class_prototypes_backward(Tensor grad_sums, Tensor features, Tensor state, Tensor(a!) grad) -> ()")


@fake("class_prototypes")
def _(features: Tensor, state: Tensor, num_classes: int, *_: Any) -> tuple[Tensor, Tensor]:
    return (
        features.new_empty((num_classes, features.shape[1]), dtype=torch.float32),
        features.new_empty(num_classes, dtype=torch.int64),
    )


@fake("class_prototypes_backward")
def _(*_: Any) -> None: ...


class _Fused(torch.autograd.Function):
    """sums [C, K] and counts [C]."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, state: Tensor, num_classes: int, other: Tensor | None, second: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        sums, counts = kernels(features).class_prototypes(features, state, num_classes, other, second)
        ctx.save_for_backward(features, state)
        ctx.mark_non_differentiable(counts)
        return sums, counts

    @staticmethod
    def backward(ctx: Any, grad_sums: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        features, state = ctx.saved_tensors
        grad = empty_like(features)
        kernels(features).class_prototypes_backward(grad_sums, features, state, grad)
        return grad, None, None, None, None
