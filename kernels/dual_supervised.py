"""`dual_supervised` on the GPU: one pass over both logits and the labels, then a small one that adds up the programs' sums.

Bytes a voxel for C classes of s bytes: forward 2 C s + label, backward 4 C s + label.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sslfast.kernels.voxels import (
    VoxelMap,
    add_column,
    describe,
    find_block,
    load_map,
    on_device,
    over_logits,
    padded,
    store_map,
)

HEADER = tl.constexpr(5)  # annotated, mask, outside, first outside, its value: as in csrc/bind_cpu.cpp
NOWHERE = tl.constexpr(2**62)


@triton.jit
def read_labels(pointer, place, inside, ignore, C: tl.constexpr):
    """Labels, -1 where nobody annotated; and which lie out of range."""
    label = tl.load(pointer + place, mask=inside, other=0).to(tl.int64)
    named = inside & (label != ignore)
    valid = named & (label >= 0) & (label < C)
    return tl.where(valid, label, -1).to(tl.int32), named & ~valid


@triton.jit
def sums_kernel(
    a, a_volume, a_channel, a_voxel, b, b_volume, b_channel, b_voxel, labels, threshold, ignore, parts, places,
    volumes, voxels, blocks, BLOCK: tl.constexpr, C: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    """A program's sums: mask, outside, CE and discrepancy of both, then [CB] sizes, overlaps and squares of both."""
    program = tl.program_id(0).to(tl.int64)
    classes = tl.arange(0, CB)
    mask_sum = tl.zeros((), tl.float64)
    outside_sum = tl.zeros((), tl.float64)
    ce_a = tl.zeros((), tl.float64)
    ce_b = tl.zeros((), tl.float64)
    discrepancy_a = tl.zeros((), tl.float64)
    discrepancy_b = tl.zeros((), tl.float64)
    size = tl.zeros((CB,), tl.float64)
    overlap_a = tl.zeros((CB,), tl.float64)
    overlap_b = tl.zeros((CB,), tl.float64)
    square_a = tl.zeros((CB,), tl.float64)
    square_b = tl.zeros((CB,), tl.float64)
    first_outside = tl.full((), NOWHERE, tl.int64)
    for i in range(blocks):
        volume, voxel, inside = find_block(program * blocks + i, volumes, voxels, BLOCK)
        place = volume * voxels + voxel
        label, outside = read_labels(labels, place, inside, ignore, C)
        annotated = label >= 0
        onehot = tl.where(classes[:, None] == label[None, :], 1.0, 0.0)
        za = load_map(a, a_volume, a_channel, a_voxel, volume, voxel, inside, C, CB)
        zb = load_map(b, b_volume, b_channel, b_voxel, volume, voxel, inside, C, CB)
        pa, log_a, highest_a, confident_a = describe(za, threshold, C, CB)
        pb, log_b, highest_b, confident_b = describe(zb, threshold, C, CB)
        mask = annotated & (confident_a != confident_b)
        ce_a += tl.sum(tl.where(annotated, log_a + highest_a - tl.sum(za * onehot, 0), 0.0)).to(tl.float64)
        ce_b += tl.sum(tl.where(annotated, log_b + highest_b - tl.sum(zb * onehot, 0), 0.0)).to(tl.float64)
        off_a = tl.sum((pa - onehot) * (pa - onehot), 0)
        off_b = tl.sum((pb - onehot) * (pb - onehot), 0)
        discrepancy_a += tl.sum(tl.where(mask, 0.5 * off_a, 0.0)).to(tl.float64)
        discrepancy_b += tl.sum(tl.where(mask, 0.5 * off_b, 0.0)).to(tl.float64)
        mask_sum += tl.sum(mask.to(tl.int32)).to(tl.float64)
        outside_sum += tl.sum(outside.to(tl.int32)).to(tl.float64)
        first_outside = tl.minimum(first_outside, tl.min(tl.where(outside, place, NOWHERE)))
        size += tl.sum(onehot, 1).to(tl.float64)
        overlap_a += tl.sum(pa * onehot, 1).to(tl.float64)
        overlap_b += tl.sum(pb * onehot, 1).to(tl.float64)
        square_a += tl.sum(tl.where(annotated[None, :], pa * pa, 0.0), 1).to(tl.float64)
        square_b += tl.sum(tl.where(annotated[None, :], pb * pb, 0.0), 1).to(tl.float64)
    row = parts + program * (6 + 5 * CB)
    tl.store(row, mask_sum)
    tl.store(row + 1, outside_sum)
    tl.store(row + 2, ce_a)
    tl.store(row + 3, ce_b)
    tl.store(row + 4, discrepancy_a)
    tl.store(row + 5, discrepancy_b)
    tl.store(row + 6 + classes, size)
    tl.store(row + 6 + CB + classes, overlap_a)
    tl.store(row + 6 + 2 * CB + classes, overlap_b)
    tl.store(row + 6 + 3 * CB + classes, square_a)
    tl.store(row + 6 + 4 * CB + classes, square_b)
    tl.store(places + program, first_outside)


@triton.jit
def losses_kernel(
    parts, places, labels, programs, smooth, losses, mask_voxels, sums, PB: tl.constexpr, C: tl.constexpr, CB: tl.constexpr
):  # fmt: skip
    """One program: what csrc/bind_cpu.cpp makes of the sums."""
    width = 6 + 5 * CB
    mask = add_column(parts, 0, programs, width, PB)
    outside = add_column(parts, 1, programs, width, PB)
    program = tl.arange(0, PB)
    first = tl.min(tl.load(places + program, mask=program < programs, other=NOWHERE))
    value = tl.load(labels + first, mask=first < NOWHERE, other=0).to(tl.float64)
    invalid = tl.where(outside > 0, float("nan"), 0.0).to(tl.float64)
    tl.store(sums + 1, mask)
    tl.store(sums + 2, outside)
    tl.store(sums + 3, tl.where(outside > 0, first, 0).to(tl.float64))
    tl.store(sums + 4, value)
    tl.store(mask_voxels, mask.to(tl.int64))
    tl.store(losses + 4, (add_column(parts, 4, programs, width, PB) / (mask + 1e-16) + invalid).to(tl.float32))
    tl.store(losses + 5, (add_column(parts, 5, programs, width, PB) / (mask + 1e-16) + invalid).to(tl.float32))
    annotated = tl.zeros((), tl.float64)
    dice_a = tl.zeros((), tl.float64)
    dice_b = tl.zeros((), tl.float64)
    for c in tl.static_range(C):
        size = add_column(parts, 6 + c, programs, width, PB)
        overlap_a = add_column(parts, 6 + CB + c, programs, width, PB)
        overlap_b = add_column(parts, 6 + 2 * CB + c, programs, width, PB)
        square_a = add_column(parts, 6 + 3 * CB + c, programs, width, PB)
        square_b = add_column(parts, 6 + 4 * CB + c, programs, width, PB)
        annotated += size
        if c > 0:
            dice_a += 1 - (2 * overlap_a + smooth) / (square_a + size + smooth)
            dice_b += 1 - (2 * overlap_b + smooth) / (square_b + size + smooth)
        tl.store(sums + HEADER + c, size)
        tl.store(sums + HEADER + C + c, overlap_a)
        tl.store(sums + HEADER + 2 * C + c, overlap_b)
        tl.store(sums + HEADER + 3 * C + c, square_a)
        tl.store(sums + HEADER + 4 * C + c, square_b)
    tl.store(sums, annotated)
    voxels = tl.maximum(annotated, 1.0)
    tl.store(losses, (add_column(parts, 2, programs, width, PB) / voxels + invalid).to(tl.float32))
    tl.store(losses + 1, (add_column(parts, 3, programs, width, PB) / voxels + invalid).to(tl.float32))
    tl.store(losses + 2, (dice_a / (C - 1) + invalid).to(tl.float32))
    tl.store(losses + 3, (dice_b / (C - 1) + invalid).to(tl.float32))


@triton.jit
def dice_gradient(size, overlap, square, grad, smooth, C: tl.constexpr, CB: tl.constexpr):
    """d p_c = linear[c] [y = c] + quadratic[c] p_c of a Dice loss whose sums [C] lie at these pointers; [CB] each."""
    classes = tl.arange(0, CB)
    foreground = (classes > 0) & (classes < C)
    sizes = tl.load(size + classes, mask=foreground, other=1.0)
    overlaps = tl.load(overlap + classes, mask=foreground, other=0.0)
    total = tl.load(square + classes, mask=foreground, other=0.0) + sizes + smooth
    linear = tl.where(foreground, -2 / total * grad, 0.0).to(tl.float32)
    quadratic = tl.where(foreground, 2 * (2 * overlaps + smooth) / (total * total) * grad, 0.0).to(tl.float32)
    return linear, quadratic


@triton.jit
def network_gradient(p, onehot, annotated, mask, grad_losses, sums, network, smooth, C: tl.constexpr, CB: tl.constexpr):
    """dL/dz = p (G - sum p G) + ce (p - onehot) with G = dL/dp of Dice and discrepancy; [CB, BLOCK]."""
    ce = (tl.load(grad_losses + network) / tl.maximum(tl.load(sums), 1.0)).to(tl.float32)
    dice = tl.load(grad_losses + 2 + network) / (C - 1)
    discrepancy = (tl.load(grad_losses + 4 + network) / (tl.load(sums + 1) + 1e-16)).to(tl.float32)
    size = sums + HEADER
    linear, quadratic = dice_gradient(size, size + (1 + network) * C, size + (3 + network) * C, dice, smooth, C, CB)
    on_mask = tl.where(mask, discrepancy, 0.0)
    grad_p = linear[:, None] * onehot + quadratic[:, None] * p + on_mask[None, :] * (p - onehot)
    mean = tl.sum(p * grad_p, 0)
    grad = p * (grad_p - mean[None, :]) + ce * (p - onehot)
    return tl.where(annotated[None, :], grad, 0.0)


@triton.jit
def gradient_kernel(
    a, a_volume, a_channel, a_voxel, b, b_volume, b_channel, b_voxel, labels, threshold, ignore, grad_losses, sums, smooth,
    to_a, to_a_volume, to_a_channel, to_a_voxel, to_b, to_b_volume, to_b_channel, to_b_voxel,
    volumes, voxels, blocks, BLOCK: tl.constexpr, C: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    for i in range(blocks):
        volume, voxel, inside = find_block(program * blocks + i, volumes, voxels, BLOCK)
        label, _ = read_labels(labels, volume * voxels + voxel, inside, ignore, C)
        annotated = label >= 0
        onehot = tl.where(tl.arange(0, CB)[:, None] == label[None, :], 1.0, 0.0)
        za = load_map(a, a_volume, a_channel, a_voxel, volume, voxel, inside, C, CB)
        zb = load_map(b, b_volume, b_channel, b_voxel, volume, voxel, inside, C, CB)
        pa, _, _, confident_a = describe(za, threshold, C, CB)
        pb, _, _, confident_b = describe(zb, threshold, C, CB)
        mask = annotated & (confident_a != confident_b)
        grad_a = network_gradient(pa, onehot, annotated, mask, grad_losses, sums, 0, smooth, C, CB)
        store_map(to_a, to_a_volume, to_a_channel, to_a_voxel, volume, voxel, inside, grad_a, C, CB)
        grad_b = network_gradient(pb, onehot, annotated, mask, grad_losses, sums, 1, smooth, C, CB)
        store_map(to_b, to_b_volume, to_b_channel, to_b_voxel, volume, voxel, inside, grad_b, C, CB)


def dual_supervised(
    logits_a: Tensor, logits_b: Tensor, labels: Tensor, threshold: float, ignore_index: int, smooth: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`sslfast::dual_supervised`."""
    a, b, y = VoxelMap.of(logits_a), VoxelMap.of(logits_b), labels.contiguous()
    grid, constants = over_logits(logits_a)
    classes, width = constants["C"], constants["CB"]
    parts = logits_a.new_empty((grid.programs, 6 + 5 * width), dtype=torch.float64)
    places = logits_a.new_empty(grid.programs, dtype=torch.int64)
    losses = logits_a.new_empty((3, 2), dtype=torch.float32)
    mask_voxels = logits_a.new_empty((), dtype=torch.int64)
    sums = logits_a.new_empty(5 + 5 * classes, dtype=torch.float64)
    with on_device(logits_a):
        sums_kernel[(grid.programs,)](
            *a.arguments, *b.arguments, y, threshold, ignore_index, parts, places, **constants
        )
        losses_kernel[(1,)](
            parts, places, y, grid.programs, smooth, losses, mask_voxels, sums,
            PB=padded(grid.programs), C=classes, CB=width, num_warps=8,
        )  # fmt: skip
    return losses, mask_voxels, sums


def dual_supervised_backward(
    grad_losses: Tensor,
    logits_a: Tensor,
    logits_b: Tensor,
    labels: Tensor,
    sums: Tensor,
    threshold: float,
    ignore_index: int,
    smooth: float,
    grad_a: Tensor,
    grad_b: Tensor,
) -> None:
    """`sslfast::dual_supervised_backward`."""
    a, b, y = VoxelMap.of(logits_a), VoxelMap.of(logits_b), labels.contiguous()
    to_a, to_b = VoxelMap.of(grad_a), VoxelMap.of(grad_b)
    grid, constants = over_logits(logits_a)
    with on_device(logits_a):
        gradient_kernel[(grid.programs,)](
            *a.arguments, *b.arguments, y, threshold, ignore_index, grad_losses.contiguous(), sums, smooth,
            *to_a.arguments, *to_b.arguments, **constants,
        )  # fmt: skip
