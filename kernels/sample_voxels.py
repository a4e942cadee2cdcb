"""`sample_voxels` and `gather_voxels` on the GPU.

Of n candidates, the k with the smallest priorities are drawn. Only candidates with a priority below
(k + 8 sqrt k + 16) / n 2^32 are kept. With a margin of 8 standard deviations, fewer than k are kept once in 10^15
draws. The kept candidates are few, so each finds its rank by comparison with all others.

Bytes per voxel: 2, for two passes over the flags.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sslfast.kernels.voxels import (
    CLASS,
    RELIABLE,
    VoxelMap,
    divide,
    find_block,
    histogram,
    load_flags,
    on_device,
    padded,
)

KINDS = tl.constexpr(64)  # the number of values of the flags
LOW = tl.constexpr(0xFFFFFFFF)
ORDERED = 64  # keys per tile of comparisons


@triton.jit
def voxel_priority(voxel, seed, step, stream):
    """First word of Philox4x32-10 (Salmon et al., SC 2011): counter (voxel: 64 bits, step, stream), key 64 bits."""
    x0 = voxel.to(tl.uint32)
    x1 = (voxel >> 32).to(tl.uint32)
    x2 = tl.zeros_like(x0) + tl.cast(step, tl.uint32)
    x3 = tl.zeros_like(x0) + tl.cast(stream, tl.uint32)
    key0 = tl.cast(seed, tl.uint32)
    key1 = tl.cast(tl.cast(seed, tl.int64) >> 32, tl.uint32)
    factor0 = tl.full((), 0xD2511F53, tl.uint32)
    factor1 = tl.full((), 0xCD9E8D57, tl.uint32)
    for _ in tl.static_range(10):
        high0 = tl.umulhi(x0, tl.zeros_like(x0) + factor0)
        low0 = x0 * factor0
        high1 = tl.umulhi(x2, tl.zeros_like(x2) + factor1)
        low1 = x2 * factor1
        x0 = high1 ^ x1 ^ key0
        x1 = low1
        x2 = high0 ^ x3 ^ key1
        x3 = low0
        key0 += tl.full((), 0x9E3779B9, tl.uint32)
        key1 += tl.full((), 0xBB67AE85, tl.uint32)
    return x0


@triton.jit
def count_kernel(flags, kinds, division, BLOCK: tl.constexpr):
    """Counts the voxels with each value of the flags."""
    total = tl.zeros((KINDS,), tl.int32)
    for i in range(division.blocks):
        _, voxel_index, inside, _ = find_block(i, division, BLOCK)
        flag = tl.load(flags + voxel_index, mask=inside, other=0).to(tl.int32)
        total += histogram(flag & (KINDS - 1), inside, KINDS)
    tl.atomic_add(kinds + tl.arange(0, KINDS), total.to(tl.int64), mask=total > 0)


@triton.jit
def bounds_kernel(kinds, quotas, bounds, counts, C: tl.constexpr, NEGATIVES: tl.constexpr):
    """The number of voxels drawn from a class, and the bound on their priorities. One program per class."""
    c = tl.program_id(0)
    kind = tl.arange(0, KINDS)
    number = tl.load(kinds + kind)
    if NEGATIVES:
        candidate = ((kind & RELIABLE) != 0) & ((kind & CLASS) != c)
    else:
        candidate = kind == c
    candidates = tl.sum(tl.where(candidate, number, 0))
    quota = tl.zeros((), tl.int64)
    for i in tl.static_range(C):
        quota = tl.where(c == i, quotas[i], quota)
    expected = quota.to(tl.float64) + 8 * tl.sqrt(quota.to(tl.float64)) + 16
    fraction = tl.minimum(expected / tl.maximum(candidates, 1).to(tl.float64), 1.0)
    drawn = tl.minimum(quota, candidates)
    tl.store(counts + c, drawn)
    tl.store(bounds + c, tl.where(drawn > 0, (fraction * 4294967296.0).to(tl.int64), 0))


@triton.jit(do_not_specialize=["seed", "first"])
def collect_kernel(
    flags, bounds, numbers, keys, capacity, seed, step, first, division, BLOCK: tl.constexpr, C: tl.constexpr,
    NEGATIVES: tl.constexpr,
):  # fmt: skip
    """Stores the keys (priority, voxel) of the candidates below their class's bound, in any order."""
    now = tl.load(step)
    for i in range(division.blocks):
        at = find_block(i, division, BLOCK)
        _, voxel_index, inside, _ = at
        label, reliable, _ = load_flags(flags, at)
        for c in range(C):
            if NEGATIVES:
                candidate = reliable & (label != c)
            else:
                candidate = inside & ~reliable & (label == c)
            bound = tl.load(bounds + c)
            if (tl.sum(candidate.to(tl.int32)) > 0) & (bound > 0):
                priority = voxel_priority(voxel_index + first, seed, now, 2 * c + NEGATIVES).to(tl.int64)
                kept = candidate & (priority < bound)
                number = tl.sum(kept.to(tl.int32))
                if number > 0:
                    slot = tl.atomic_add(numbers + c, number.to(tl.int64)) + tl.cumsum(kept.to(tl.int32), 0) - 1
                    key = ((priority - 2147483648) << 32) | voxel_index
                    tl.store(keys + c * capacity + slot, key, mask=kept & (slot < capacity))


@triton.jit
def order_kernel(values, numbers, capacity, to, counts, room, BLOCK: tl.constexpr):
    """Stores the low 32 bits of the smallest `counts` values of each class in `to`, in the order of the values."""
    c = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    row = tl.program_id(0) * BLOCK + column
    number = tl.minimum(tl.load(numbers + c), capacity).to(tl.int32)
    key = tl.load(values + c * capacity + row, mask=row < number, other=0)
    rank = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, number, BLOCK):
        there = start + column < number
        other = tl.load(values + c * capacity + start + column, mask=there, other=0)
        rank += tl.sum((there[None, :] & (other[None, :] < key[:, None])).to(tl.int32), 1)
    tl.store(to + c * room + rank, key & LOW, mask=(row < number) & (rank < tl.load(counts + c)))


@triton.jit
def gather_kernel(
    features, indices, rows, voxels, total, count, BLOCK: tl.constexpr, K: tl.constexpr, KB: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, KB)
    index = tl.load(indices + row, mask=row < count, other=-1)
    used = ((index >= 0) & (index < total))[:, None] & (k < K)[None, :]
    voxel = index // voxels * features.volume + index % voxels * features.voxel
    offsets = voxel[:, None] + k.to(tl.int64)[None, :] * features.channel
    values = tl.load(features.pointer + offsets, mask=used, other=0.0).to(tl.float32)
    values = tl.where(((index < -1) | (index >= total))[:, None], float("nan"), values)
    tl.store(rows + row[:, None] * K + k[None, :], values, mask=(row < count)[:, None] & (k < K)[None, :])


@triton.jit
def scatter_kernel(rows, indices, order, to, voxels, total, count, K: tl.constexpr, KB: tl.constexpr):
    """One program per row, in the order of voxels. The first row of a voxel adds all its rows to `to`; writes once."""
    position = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, KB)
    index = tl.load(indices + position)
    before = tl.load(indices + position - 1, mask=position > 0, other=-1)
    if (index >= 0) & (index < total) & (index != before):
        voxel = to.pointer + index // voxels * to.volume + index % voxels * to.voxel
        target = voxel + k.to(tl.int64) * to.channel
        grad = tl.load(target, mask=k < K, other=0.0).to(tl.float32)
        here = index
        while here == index:
            row = tl.load(order + position)
            grad += tl.load(rows + row * K + k, mask=k < K, other=0.0)
            position += 1
            here = tl.load(indices + position, mask=position < count, other=-1)
        tl.store(target, grad.to(to.pointer.dtype.element_ty), mask=k < K)


def sample_voxels(
    flags: Tensor, quotas: list[int], seed: int, step: Tensor, negatives: bool, first: int = 0
) -> tuple[Tensor, Tensor]:
    """`sslfast::sample_voxels`."""
    classes, most, voxels = len(quotas), max(quotas), flags.numel()
    if voxels > 2**32:
        raise ValueError(f"flags has {voxels} voxels; Triton's kernels sample from at most 2^32")
    indices = flags.new_full((classes, most), -1, dtype=torch.int64)
    if indices.numel() == 0 or voxels == 0:
        return indices, flags.new_zeros(classes, dtype=torch.int64)
    flags = flags.contiguous()
    capacity = 2 * math.ceil(most + 8 * math.sqrt(most) + 16)
    kinds, numbers = flags.new_zeros(KINDS.value + classes, dtype=torch.int64).split((KINDS.value, classes))
    bounds, counts = (flags.new_empty(classes, dtype=torch.int64) for _ in range(2))
    keys, drawn = (flags.new_empty((classes, length), dtype=torch.int64) for length in (capacity, most))
    block, tile = 1024, {"BLOCK": ORDERED, "num_warps": 8}
    programs, division = divide(1, voxels, block, programs=4096)
    with on_device(flags):
        count_kernel[(programs,)](flags, kinds, division, BLOCK=block)
        bounds_kernel[(classes,)](kinds, tuple(quotas), bounds, counts, C=classes, NEGATIVES=negatives)
        collect_kernel[(programs,)](
            flags, bounds, numbers, keys, capacity, seed, step, first, division, BLOCK=block, C=classes,
            NEGATIVES=negatives
        )  # fmt: skip
        order_kernel[(triton.cdiv(capacity, ORDERED), classes)](keys, numbers, capacity, drawn, counts, most, **tile)
        order_kernel[(triton.cdiv(most, ORDERED), classes)](drawn, counts, most, indices, counts, most, **tile)
    return indices, counts


def gather_voxels(features: Tensor, indices: Tensor) -> Tensor:
    """`sslfast::gather_voxels`."""
    k, count, voxels = features.shape[1], indices.numel(), math.prod(features.shape[2:])
    if features.numel() == 0:
        return torch.where(indices == -1, 0.0, torch.nan).unsqueeze(-1).expand(*indices.shape, k).contiguous()
    rows = features.new_empty((*indices.shape, k), dtype=torch.float32)
    if count:
        with on_device(features):
            gather_kernel[(triton.cdiv(count, 16),)](
                VoxelMap.of(features), indices.contiguous(), rows, voxels, len(features) * voxels, count, BLOCK=16, K=k,
                KB=padded(k),
            )  # fmt: skip
    return rows


def gather_voxels_backward(grad_rows: Tensor, indices: Tensor, grad: Tensor) -> None:
    """`sslfast::gather_voxels_backward`."""
    k, count, voxels = grad.shape[1], indices.numel(), math.prod(grad.shape[2:])
    if count == 0 or grad.numel() == 0:
        return
    sorted_indices, order = indices.flatten().sort(stable=True)
    with on_device(grad):
        scatter_kernel[(count,)](
            grad_rows.contiguous(), sorted_indices, order, VoxelMap.of(grad), voxels, len(grad) * voxels, count, K=k,
            KB=padded(k),
        )  # fmt: skip
