"""`reliability` on the GPU: the exact entropy percentile by four passes of a radix select, then the flags.

An entropy is a float >= 0, so its 31 bits have the same order. Each pass counts the next 8 bits of the voxels that
share the bits found so far; every program of the next pass finds the digit from these counts. Counts are integers, so
the result does not depend on the order of additions. The host reads nothing.

Bytes per voxel for C classes of s bytes: C s + 1 + 4 for class and entropy, 4 x 4 for the passes, 4 + 2 for the flags.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sslfast.kernels.voxels import (
    RELIABLE,
    VoxelMap,
    best_class,
    divide,
    exp_shifted,
    find_block,
    find_voxels,
    histogram,
    load_map,
    on_device,
    over_logits,
)

BINS = tl.constexpr(256)
PASSES = tl.constexpr(4)
MAX = tl.constexpr(0x7FFFFFFF)


@triton.jit
def entropy_kernel(
    logits, entropies, flags, division, BLOCK: tl.constexpr, C: tl.constexpr, CB: tl.constexpr, FLAGS: tl.constexpr
):  # fmt: skip
    """Entropy -sum p log p of each voxel, in nats, at least 0; with FLAGS also the class."""
    for i in range(division.blocks):
        at = find_voxels(i, division, BLOCK)
        e, total, shifted = exp_shifted(load_map(logits, at, C, CB), C, CB)
        h = tl.log(total) - tl.sum(e * shifted, 0) / total
        tl.store(entropies + at[3], tl.where(h <= 0, h * 0.0, h), mask=at[2])
        if FLAGS:
            tl.store(flags + at[3], best_class(shifted, C, CB).to(tl.uint8), mask=at[2])


@triton.jit
def find_lower(counts, percentile, voxels, DIGITS: tl.constexpr):
    """The first digits of the order statistic below the percentile, its rank among the values that share them, and the
    fraction for interpolation."""
    last = tl.cast(voxels, tl.int64) - 1
    position = tl.load(percentile) / 100 * last.to(tl.float64)
    rank = tl.minimum(tl.maximum(tl.floor(position), 0.0).to(tl.int64), last)
    fraction = position - rank.to(tl.float64)
    bins = tl.arange(0, BINS)
    bits = tl.zeros((), tl.int32)
    for digit in tl.static_range(DIGITS):
        count = tl.load(counts + digit * BINS + bins)
        before = tl.cumsum(count, 0) - count
        holds = (before <= rank) & (rank < before + count)
        bits = bits * BINS + tl.sum(tl.where(holds, bins, 0))
        rank -= tl.sum(tl.where(holds, before, 0))
    return bits, rank, fraction


@triton.jit
def count_kernel(entropies, percentile, counts, division, BLOCK: tl.constexpr, DIGIT: tl.constexpr):
    """Histogram of a digit over the values whose earlier digits are those of the lower order statistic."""
    prefix = find_lower(counts, percentile, division.voxels, DIGIT)[0]
    total = tl.zeros((BINS,), tl.int32)
    nearest = tl.zeros((BLOCK,), tl.int32)
    for i in range(division.blocks):
        _, voxel_index, inside, _ = find_block(i, division, BLOCK)
        h = tl.load(entropies + voxel_index, mask=inside, other=0.0)
        bits = h.to(tl.int32, bitcast=True) & MAX  # a NaN may carry a sign
        digits = bits >> (24 - 8 * DIGIT)
        total += histogram(digits & 255, inside & ((digits >> 8) == prefix), BINS)
        nearest = tl.maximum(nearest, tl.where(inside & ((digits >> 8) > prefix), MAX - bits, 0))
    tl.atomic_add(counts + DIGIT * BINS + tl.arange(0, BINS), total.to(tl.int64), mask=total > 0)
    if DIGIT == PASSES - 1:  # the smallest value above those counted
        tl.atomic_max(counts + PASSES * BINS, tl.max(nearest).to(tl.int64))


@triton.jit
def threshold_kernel(counts, percentile, threshold, voxels):
    """The order statistics on both sides of the percentile, interpolated as in numpy. One program."""
    bits, rank, fraction = find_lower(counts, percentile, voxels, PASSES)
    digit = bits & 255
    bins = tl.arange(0, BINS)
    count = tl.load(counts + (PASSES - 1) * BINS + bins)
    following = tl.min(tl.where((bins > digit) & (count > 0), bins, BINS))
    upper = tl.where(following < BINS, bits - digit + following, MAX - tl.load(counts + PASSES * BINS).to(tl.int32))
    upper = tl.where(rank + 1 < tl.sum(tl.where(bins == digit, count, 0)), bits, upper)
    low = bits.to(tl.float32, bitcast=True).to(tl.float64)
    high = upper.to(tl.float32, bitcast=True).to(tl.float64)
    value = tl.where(fraction < 0.5, low + (high - low) * fraction, high - (high - low) * (1 - fraction))
    value = tl.where(fraction <= 0, low, value)
    has_nan = tl.load(counts + (MAX >> 24)) > 0  # no entropy has this first digit
    wanted = tl.load(percentile)
    known = (wanted >= 0) & (wanted <= 100) & ~has_nan
    tl.store(threshold, tl.where(known, value, float("nan")).to(tl.float32))


@triton.jit
def flags_kernel(entropies, threshold, flags, division, BLOCK: tl.constexpr):
    """Sets the flag of voxels below the threshold."""
    limit = tl.load(threshold)
    for i in range(division.blocks):
        _, voxel_index, inside, _ = find_block(i, division, BLOCK)
        reliable = tl.load(entropies + voxel_index, mask=inside, other=0.0) < limit
        label = tl.load(flags + voxel_index, mask=inside, other=0)
        tl.store(flags + voxel_index, tl.where(reliable, label | RELIABLE, label).to(tl.uint8), mask=inside)


def _entropies(logits: Tensor, flags: Tensor | None) -> Tensor:
    entropies = logits.new_empty((logits.shape[0], *logits.shape[2:]), dtype=torch.float32)
    if entropies.numel():
        grid, division, sizes = over_logits(logits)
        with on_device(logits):
            entropy_kernel[grid](VoxelMap.of(logits), entropies, flags, division, **sizes, FLAGS=flags is not None)
    return entropies


def voxel_entropy(logits: Tensor, _: None) -> Tensor:
    """`sslfast::voxel_entropy`."""
    return _entropies(logits, None)


def reliability(logits: Tensor, _: None, percentile: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`sslfast::reliability`."""
    flags = logits.new_empty((logits.shape[0], *logits.shape[2:]), dtype=torch.uint8)
    entropies = _entropies(logits, flags)
    threshold = logits.new_empty((), dtype=torch.float32) if given is None else given.clone()
    voxels, block = flags.numel(), 4096
    if voxels == 0:
        return threshold.zero_() if given is None else threshold, flags
    programs, division = divide(1, voxels, block, programs=512)
    with on_device(logits):
        if given is None:
            counts = logits.new_zeros(PASSES.value * BINS.value + 1, dtype=torch.int64)
            for digit in range(PASSES.value):
                arguments = entropies, percentile, counts, division
                count_kernel[(programs,)](*arguments, BLOCK=block, DIGIT=digit, num_warps=8)
            threshold_kernel[(1,)](counts, percentile, threshold, voxels)
        flags_kernel[(programs,)](entropies, threshold, flags, division, BLOCK=block, num_warps=8)
    return threshold, flags
