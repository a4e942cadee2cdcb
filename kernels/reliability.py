"""`reliability` on the GPU: exact entropy percentiles by three passes of a radix select, then the byte map.

An entropy is a float >= 0, so its 31 bits sort as it does. Each pass counts 11, 10 and 10 of them among the voxels that still
share the bits found so far with the wanted rank; a small kernel then picks the digit. Counts are integers, so the result does
not depend on the order in which programs add them. Nothing is read on the host.
Bytes a voxel for C classes of s bytes: 2 (2 C s) + 1, and 2 x 4 for the entropies, written once and read four times.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sslfast.kernels.voxels import (
    RELIABLE,
    SURE_A,
    SURE_B,
    Grid,
    VoxelMap,
    best_class,
    entropy,
    find_block,
    load_map,
    on_device,
    over_logits,
)

DIGITS = ((20, 2048), (10, 1024), (0, 1024))  # (first bit, values) of each pass
NAN = tl.constexpr(0x7F800000 >> 20)  # digits of the first pass from here on are NaN


@triton.jit
def entropy_kernel(
    z, z_volume, z_channel, z_voxel, out, predicted, volumes, voxels, blocks,
    BLOCK: tl.constexpr, C: tl.constexpr, CB: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """Entropy of each voxel, and its class where CLASSES."""
    program = tl.program_id(0).to(tl.int64)
    for i in range(blocks):
        volume, voxel, inside = find_block(program * blocks + i, volumes, voxels, BLOCK)
        place = volume * voxels + voxel
        tile = load_map(z, z_volume, z_channel, z_voxel, volume, voxel, inside, C, CB)
        tl.store(out + place, entropy(tile, C, CB), mask=inside)
        if CLASSES:
            tl.store(predicted + place, best_class(tile, C, CB).to(tl.uint8), mask=inside)


@triton.jit
def count_kernel(
    entropies, predicted, prefixes, counts, voxels, blocks,
    BLOCK: tl.constexpr, SHIFT: tl.constexpr, BINS: tl.constexpr, FIRST: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Counts of the digit at SHIFT; by network, group and rank (lower, upper) among voxels that have the rank's prefix."""
    program = tl.program_id(0).to(tl.int64)
    network = tl.program_id(1).to(tl.int64)
    for i in range(blocks):
        place = (program * blocks + i) * BLOCK + tl.arange(0, BLOCK)
        inside = place < voxels
        h = tl.load(entropies + network * voxels + place, mask=inside, other=0.0)
        bits = h.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # a NaN may carry a sign
        digit = (bits >> SHIFT) & (BINS - 1)
        for group in range(GROUPS):
            member = inside
            if GROUPS > 1:
                member = inside & (tl.load(predicted + network * voxels + place, mask=inside, other=255) == group)
            query = (network * GROUPS + group) * 2
            for rank in tl.static_range(2):
                if not FIRST:
                    wanted = member & ((bits >> (SHIFT + 10)) == tl.load(prefixes + query + rank))
                else:
                    wanted = member
                if not FIRST or rank == 0:
                    if tl.sum(wanted.to(tl.int32)) > 0:
                        # the padding's bin is counted and then taken off: not every version masks a histogram
                        found = tl.histogram(tl.where(wanted, digit, 0), BINS)
                        bins = tl.arange(0, BINS)
                        found = tl.where(bins == 0, found - tl.sum((~wanted).to(tl.int32)), found)
                        tl.atomic_add(counts + (query + rank) * BINS + bins, found.to(tl.int64), mask=found > 0)


@triton.jit
def first_bin_above(counts, rank, BINS: tl.constexpr):
    """The bin that holds the rank-th smallest, and the rank within it."""
    bins = tl.arange(0, BINS)
    count = tl.load(counts + bins)
    before = tl.cumsum(count, 0) - count
    holds = (before <= rank) & (rank < before + count)
    return tl.sum(tl.where(holds, bins, 0)), tl.sum(tl.where(holds, rank - before, 0))


@triton.jit
def select_kernel(
    counts, prefixes, ranks, thresholds, percentile, BINS: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr
):  # fmt: skip
    """A program for each network and group: the digits of both order statistics; the last pass interpolates as numpy does."""
    group = tl.program_id(0).to(tl.int64)
    fraction = tl.zeros((), tl.float64)
    if FIRST:
        count = tl.load(counts + 2 * group * BINS + tl.arange(0, BINS))
        total = tl.sum(count)
        position = tl.load(percentile) / 100 * (total - 1).to(tl.float64)
        low = tl.minimum(tl.maximum(tl.floor(position), 0.0).to(tl.int64), tl.maximum(total - 1, 0))
        high = tl.minimum(low + 1, tl.maximum(total - 1, 0))
        has_nan = tl.sum(tl.where(tl.arange(0, BINS) >= NAN, count, 0)) > 0
        kind = tl.where(total == 0, 1, tl.where(has_nan, 2, 0)).to(tl.int64)  # 1: no voxel, 2: a NaN among them
        tl.store(ranks + 4 * group + 2, kind)
        tl.store(thresholds + group, (position - low.to(tl.float64)))
        bin_low, rest_low = first_bin_above(counts + 2 * group * BINS, low, BINS)
        bin_high, rest_high = first_bin_above(counts + 2 * group * BINS, high, BINS)
        prefix_low = bin_low
        prefix_high = bin_high
    else:
        bin_low, rest_low = first_bin_above(counts + 2 * group * BINS, tl.load(ranks + 4 * group), BINS)
        bin_high, rest_high = first_bin_above(counts + (2 * group + 1) * BINS, tl.load(ranks + 4 * group + 1), BINS)
        prefix_low = tl.load(prefixes + 2 * group) * BINS + bin_low
        prefix_high = tl.load(prefixes + 2 * group + 1) * BINS + bin_high
    tl.store(prefixes + 2 * group, prefix_low.to(tl.int32))
    tl.store(prefixes + 2 * group + 1, prefix_high.to(tl.int32))
    tl.store(ranks + 4 * group, rest_low)
    tl.store(ranks + 4 * group + 1, rest_high)
    if LAST:
        kind = tl.load(ranks + 4 * group + 2)
        fraction = tl.load(thresholds + group)
        low_value = prefix_low.to(tl.int32).to(tl.float32, bitcast=True).to(tl.float64)
        high_value = prefix_high.to(tl.int32).to(tl.float32, bitcast=True).to(tl.float64)
        step = high_value - low_value
        value = tl.where(fraction < 0.5, low_value + step * fraction, high_value - step * (1 - fraction))
        value = tl.where(fraction <= 0, low_value, value)
        value = tl.where(kind == 1, 0.0, tl.where(kind == 2, float("nan"), value))
        tl.store(thresholds + group, value)


@triton.jit
def state_kernel(
    a, a_volume, a_channel, a_voxel, b, b_volume, b_channel, b_voxel, entropies, thresholds, winner, state,
    volumes, voxels, blocks, BLOCK: tl.constexpr, C: tl.constexpr, CB: tl.constexpr,
    MODE: tl.constexpr, UNION: tl.constexpr, LOSER: tl.constexpr, PER_CLASS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    b_wins = tl.load(winner) != 0
    for i in range(blocks):
        volume, voxel, inside = find_block(program * blocks + i, volumes, voxels, BLOCK)
        place = volume * voxels + voxel
        za = load_map(a, a_volume, a_channel, a_voxel, volume, voxel, inside, C, CB)
        zb = load_map(b, b_volume, b_channel, b_voxel, volume, voxel, inside, C, CB)
        class_a = best_class(za, C, CB)
        class_b = best_class(zb, C, CB)
        if PER_CLASS:
            limit_a = tl.load(thresholds + class_a)
            limit_b = tl.load(thresholds + C + class_b)
        else:
            limit_a = tl.load(thresholds)
            limit_b = tl.load(thresholds + 1)
        total = tl.cast(volumes, tl.int64) * voxels
        below_a = tl.load(entropies + place, mask=inside, other=0.0) < limit_a
        below_b = tl.load(entropies + total + place, mask=inside, other=0.0) < limit_b
        if MODE == 0:
            reliable = tl.where(b_wins, below_b, below_a)
        elif MODE == 1:
            reliable = below_a | below_b
        else:
            reliable = below_a & below_b
        of_winner = tl.where(b_wins, class_b, class_a)
        of_loser = tl.where(b_wins, class_a, class_b)
        taught = of_winner
        if UNION:
            taught = tl.maximum(class_a, class_b)
        pulled = taught
        if LOSER:
            pulled = of_loser
        flags = tl.where(reliable, taught | RELIABLE, pulled)
        flags = flags | tl.where(below_a, SURE_A, 0) | tl.where(below_b, SURE_B, 0)
        tl.store(state + place, flags.to(tl.uint8), mask=inside)


def _entropies(logits: Tensor, out: Tensor, predicted: Tensor | None) -> None:
    grid, constants = over_logits(logits)
    entropy_kernel[(grid.programs,)](
        *VoxelMap.of(logits).arguments, out, out if predicted is None else predicted, **constants,
        CLASSES=predicted is not None,
    )  # fmt: skip


def voxel_entropy(logits: Tensor) -> Tensor:
    """`sslfast::voxel_entropy`."""
    out = logits.new_empty((logits.shape[0], *logits.shape[2:]), dtype=torch.float32)
    if out.numel():
        with on_device(logits):
            _entropies(logits, out, None)
    return out


def reliability(
    logits_a: Tensor,
    logits_b: Tensor,
    percentile: float,
    mode: int,
    winner: Tensor,
    union_label: bool,
    loser_anchor: bool,
    per_class: bool,
    given: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`sslfast::reliability`."""
    classes = logits_a.shape[1]
    groups = classes if per_class else 1
    state = logits_a.new_empty((logits_a.shape[0], *logits_a.shape[2:]), dtype=torch.uint8)
    thresholds = logits_a.new_empty((2, classes) if per_class else (2,), dtype=torch.float64)
    if state.numel() == 0:
        return (thresholds.zero_().float() if given is None else given.clone()), state
    entropies = logits_a.new_empty((2, state.numel()), dtype=torch.float32)
    predicted = logits_a.new_empty((2, state.numel()), dtype=torch.uint8) if per_class else None
    prefixes = logits_a.new_empty(4 * groups, dtype=torch.int32)
    ranks = logits_a.new_empty(8 * groups, dtype=torch.int64)
    wanted = torch.full((), percentile, dtype=torch.float64, device=logits_a.device)  # a number would arrive as float32
    with on_device(logits_a):
        for network, logits in enumerate((logits_a, logits_b)):
            _entropies(logits, entropies[network], None if predicted is None else predicted[network])
        grid = Grid.over(state.view(1, 1, -1), block=4096)
        for step, (shift, bins) in enumerate(DIGITS if given is None else ()):
            counts = logits_a.new_zeros(4 * groups * bins, dtype=torch.int64)
            first = step == 0
            count_kernel[(grid.programs, 2)](
                entropies, entropies if predicted is None else predicted, prefixes, counts, grid.voxels, grid.blocks,
                BLOCK=grid.block, SHIFT=shift, BINS=bins, FIRST=first, GROUPS=groups, num_warps=8,
            )  # fmt: skip
            select_kernel[(2 * groups,)](
                counts, prefixes, ranks, thresholds, wanted, BINS=bins, FIRST=first, LAST=step == len(DIGITS) - 1
            )
        thresholds = thresholds.float() if given is None else given.clone()
        grid, constants = over_logits(logits_a)
        state_kernel[(grid.programs,)](
            *VoxelMap.of(logits_a).arguments, *VoxelMap.of(logits_b).arguments, entropies, thresholds, winner,
            state, **constants,
            MODE=mode, UNION=union_label, LOSER=loser_anchor, PER_CLASS=per_class,
        )  # fmt: skip
    return thresholds, state
