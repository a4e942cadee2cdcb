"""`class_prototypes` on the GPU: a matrix product sums the unit features of a block by class.

Bytes per voxel for K features of s bytes: 1 for the flags, and K s in blocks that hold a reliable voxel.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sslfast.kernels.voxels import (
    VoxelMap,
    add_up,
    divide,
    find_block,
    inverse_length,
    load_flags,
    load_map,
    on_device,
    padded,
)


@triton.jit
def sums_kernel(
    features, other, second, flags, partials, counts, division, BLOCK: tl.constexpr, C: tl.constexpr, CB: tl.constexpr,
    K: tl.constexpr, KB: tl.constexpr, CHOOSE: tl.constexpr,
):  # fmt: skip
    """Stores the program's sums [CB, KB]. Counts [CB] are added atomically: the order of integers does not matter."""
    classes = tl.arange(0, CB)
    total = tl.zeros((CB, KB), tl.float32)
    count = tl.zeros((CB,), tl.int32)
    takes_other = False
    if CHOOSE:
        takes_other = tl.load(second) != 0
    for i in range(division.blocks):
        at = find_block(i, division, BLOCK)
        label, reliable, _ = load_flags(flags, at)
        member = reliable[None, :] & (classes[:, None] == label[None, :])
        members = tl.sum(member.to(tl.int32), 1)
        if tl.sum(members) > 0:
            if takes_other:
                tile = load_map(other, at, K, KB)
            else:
                tile = load_map(features, at, K, KB)
            directions = tl.where(reliable[None, :], tile * inverse_length(tile, 0)[None, :], 0.0)
            unknown = directions != directions  # in the product, 0 times NaN would be NaN in every class
            if tl.max(unknown.to(tl.int32)) > 0:
                for c in range(C):
                    of_class = (reliable & (label == c))[None, :]
                    spoiled = (tl.max((unknown & of_class).to(tl.int32), 1) > 0)[None, :]
                    total = tl.where((classes == c)[:, None] & spoiled, float("nan"), total)
                directions = tl.where(unknown, 0.0, directions)
            total += tl.dot(member.to(tl.float32), tl.trans(directions), input_precision="ieee")
            count += members
    slots = classes[:, None] * K + tl.arange(0, KB)[None, :]
    real = (classes < C)[:, None] & (tl.arange(0, KB) < K)[None, :]
    tl.store(partials + slots * tl.num_programs(0) + tl.program_id(0), total, mask=real)
    tl.atomic_add(counts + classes, count.to(tl.int64), mask=(classes < C) & (count > 0))


def class_prototypes(
    features: Tensor, flags: Tensor, num_classes: int, other: Tensor | None = None, second: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`sslfast::class_prototypes`."""
    k = features.shape[1]
    counts = features.new_zeros(num_classes, dtype=torch.int64)
    if flags.numel() == 0:
        return features.new_zeros((num_classes, k), dtype=torch.float32), counts
    classes, width = padded(num_classes, 16), padded(k, 16)  # 16: the smallest size of a matrix product
    block = max(min(4096 // width, 256), 16)
    programs, division = divide(len(features), math.prod(features.shape[2:]), block)
    partials = features.new_empty((num_classes * k, programs), dtype=torch.float32)
    sums = features.new_empty(num_classes * k, dtype=torch.float32)
    with on_device(features):
        sums_kernel[(programs,)](
            VoxelMap.of(features), VoxelMap.of(features if other is None else other), second, flags.contiguous(),
            partials, counts, division, BLOCK=block, C=num_classes, CB=classes, K=k, KB=width, CHOOSE=other is not None,
        )  # fmt: skip
    add_up(partials, sums, plain=len(sums))
    return sums.view(num_classes, k), counts
