"""`class_prototypes`: sums of the unit features of each class's reliable voxels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sslfast.ops.backend import ops_for, runs_fused
from sslfast.ops.check import (
    INTEGERS,
    check_map,
    check_num_classes,
    check_pair,
    check_reducer,
    check_scalar,
    check_tensor,
    check_voxels,
    to_compute_dtype,
)
from sslfast.ops.flags import is_reliable, pseudo_label
from sslfast.ops.reduce import SINGLE_PROCESS, Reducer
from sslfast.ops.registry import define
from sslfast.renamed import old_arguments

ROUNDING = 1e-6  # length of a mean of unit vectors that is nothing but the rounding of its sum


class ClassPrototypes(NamedTuple):
    """Sums of unit features; `unit(sums)` are the prototypes."""

    sums: Tensor  # [C, K]
    counts: Tensor  # [C] int64, reliable voxels


@old_arguments(ranks="reducer", state="flags")
@torch.no_grad()
def class_prototypes(
    features: Tensor,
    flags: Tensor,
    num_classes: int,
    *,
    other: Tensor | None = None,
    second: Tensor | None = None,
    reducer: Reducer = SINGLE_PROCESS,
) -> ClassPrototypes:
    """The sum of f / |f| over each class's reliable voxels, by pseudo-label (arXiv 2311.12617, its prototypes).

    Args:
        features: [U, K, *spatial]; in CUDA K is at most 256. The unit vector of a zero vector is zero. No gradient.
        flags: [U, *spatial] uint8, from `reliability`. A class from C on counts for none.
        num_classes: C.
        other, second: if the integer tensor `second` [] is not 0, `other` [U, K, *spatial] is used instead of
            `features`, without synchronisation.
        reducer: process group over which the sums are all-reduced.

    Returns:
        Sums and counts. A sum whose mean is shorter than 1e-6 is exactly 0: the directions of the class cancel out, and
        what their rounding leaves, which is another on each backend, would be scaled to a prototype. A NaN
        feature of a reliable voxel makes the sum of its class NaN, an infinite one that channel of it; no other class.
    """
    if (other is None) != (second is None):
        raise ValueError("other and second go together")
    check_tensor("features", features)
    check_map("features", features)
    check_voxels("flags", flags, "features", features, (torch.uint8,))
    check_num_classes("num_classes", num_classes)
    check_reducer(reducer)
    if other is not None:
        check_pair("features", features, "other", other)
        check_scalar("second", second, features.device, INTEGERS)
    if runs_fused(features):
        second = None if second is None else second.long()
        sums, counts = ops_for(features).class_prototypes(features, flags, num_classes, other, second)
    else:
        if other is not None and second is not None:
            features = torch.where(second != 0, other, features)
        sums, counts = class_prototypes_ref(features, flags, num_classes)
    sums, counts = reducer.sum(sums), reducer.sum(counts)
    length = torch.linalg.vector_norm(sums, dim=1, keepdim=True)
    return ClassPrototypes(torch.where(length <= ROUNDING * counts.unsqueeze(1), 0, sums), counts)


def class_prototypes_ref(features: Tensor, flags: Tensor, num_classes: int) -> ClassPrototypes:
    """The specification of `class_prototypes` in plain PyTorch."""
    directions = unit(to_compute_dtype(features), dim=1).movedim(1, -1)  # [U, *spatial, K]
    member = [is_reliable(flags) & (pseudo_label(flags) == c) for c in range(num_classes)]
    sums = [torch.where(m.unsqueeze(-1), directions, 0).flatten(0, -2).sum(0) for m in member]
    return ClassPrototypes(torch.stack(sums), torch.stack([m.count_nonzero() for m in member]))


def unit(vectors: Tensor, dim: int) -> Tensor:
    """v / |v| along `dim`; a vector shorter than 1e-12 becomes zero, and so does its gradient."""
    length = torch.linalg.vector_norm(vectors, dim=dim, keepdim=True)
    return torch.where(length < 1e-12, 0, vectors / length.clamp_min(1e-12))


define(
    "class_prototypes(Tensor features, Tensor flags, int num_classes, Tensor? other=None, Tensor? second=None)"
    " -> (Tensor sums, Tensor counts)",
    lambda features, flags, num_classes, *_: (
        features.new_empty((num_classes, features.shape[1]), dtype=torch.float32),
        features.new_empty(num_classes, dtype=torch.int64),
    ),
)
