"""`pseudo_supervised` on the GPU. Bytes a voxel for C classes of s bytes: forward 1 + 2 C s, backward the same and 2 C s written."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sslfast.kernels.dual_supervised import dice_gradient
from sslfast.kernels.voxels import (
    CLASS,
    RELIABLE,
    VoxelMap,
    add_column,
    best_class,
    exp_shifted,
    find_block,
    load_map,
    on_device,
    over_logits,
    padded,
    store_map,
)


@triton.jit
def sums_kernel(
    a, a_volume, a_channel, a_voxel, b, b_volume, b_channel, b_voxel, state, parts,
    volumes, voxels, blocks, BLOCK: tl.constexpr, C: tl.constexpr, CB: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """A program's sums: reliable voxels, cross-entropy of both networks, then [CB] sizes, overlaps and squares of both."""
    program = tl.program_id(0).to(tl.int64)
    row = parts + program * (3 + 6 * CB)
    classes = tl.arange(0, CB)
    reliable_sum = tl.zeros((), tl.float64)
    ce_a = tl.zeros((), tl.float64)
    ce_b = tl.zeros((), tl.float64)
    size_a = tl.zeros((CB,), tl.float64)
    size_b = tl.zeros((CB,), tl.float64)
    overlap_a = tl.zeros((CB,), tl.float64)
    overlap_b = tl.zeros((CB,), tl.float64)
    square_a = tl.zeros((CB,), tl.float64)
    square_b = tl.zeros((CB,), tl.float64)
    for i in range(blocks):
        volume, voxel, inside = find_block(program * blocks + i, volumes, voxels, BLOCK)
        s = tl.load(state + volume * voxels + voxel, mask=inside, other=0).to(tl.int32)
        reliable = (s & RELIABLE) != 0
        members = tl.sum(reliable.to(tl.int32))
        if members > 0:
            za = load_map(a, a_volume, a_channel, a_voxel, volume, voxel, inside, C, CB)
            zb = load_map(b, b_volume, b_channel, b_voxel, volume, voxel, inside, C, CB)
            target_a = s & CLASS
            target_b = s & CLASS
            if OTHER:
                target_a = best_class(zb, C, CB)
                target_b = best_class(za, C, CB)
            e_a, total_a, highest_a = exp_shifted(za, C, CB)
            e_b, total_b, highest_b = exp_shifted(zb, C, CB)
            taught_a = reliable[None, :] & (classes[:, None] == target_a[None, :])
            taught_b = reliable[None, :] & (classes[:, None] == target_b[None, :])
            own_a = tl.sum(tl.where(taught_a, za, 0.0), 0)
            own_b = tl.sum(tl.where(taught_b, zb, 0.0), 0)
            pa = e_a / total_a[None, :]
            pb = e_b / total_b[None, :]
            reliable_sum += members.to(tl.float64)
            ce_a += tl.sum(tl.where(reliable, tl.log(total_a) + highest_a - own_a, 0.0)).to(tl.float64)
            ce_b += tl.sum(tl.where(reliable, tl.log(total_b) + highest_b - own_b, 0.0)).to(tl.float64)
            size_a += tl.sum(tl.where(taught_a, 1.0, 0.0), 1).to(tl.float64)
            size_b += tl.sum(tl.where(taught_b, 1.0, 0.0), 1).to(tl.float64)
            overlap_a += tl.sum(tl.where(taught_a, pa, 0.0), 1).to(tl.float64)
            overlap_b += tl.sum(tl.where(taught_b, pb, 0.0), 1).to(tl.float64)
            square_a += tl.sum(tl.where(reliable[None, :], pa * pa, 0.0), 1).to(tl.float64)
            square_b += tl.sum(tl.where(reliable[None, :], pb * pb, 0.0), 1).to(tl.float64)
    tl.store(row, reliable_sum)
    tl.store(row + 1, ce_a)
    tl.store(row + 2, ce_b)
    tl.store(row + 3 + classes, size_a)
    tl.store(row + 3 + CB + classes, size_b)
    tl.store(row + 3 + 2 * CB + classes, overlap_a)
    tl.store(row + 3 + 3 * CB + classes, overlap_b)
    tl.store(row + 3 + 4 * CB + classes, square_a)
    tl.store(row + 3 + 5 * CB + classes, square_b)


@triton.jit
def losses_kernel(
    parts, programs, smooth, losses, reliable_voxels, sums, PB: tl.constexpr, C: tl.constexpr, CB: tl.constexpr
):  # fmt: skip
    """One program: the losses that the programs' sums make."""
    width = 3 + 6 * CB
    count = add_column(parts, 0, programs, width, PB)
    tl.store(reliable_voxels, count.to(tl.int64))
    for network in tl.static_range(2):
        ce = add_column(parts, 1 + network, programs, width, PB)
        dice = tl.zeros((), tl.float64)
        for c in tl.static_range(C):
            size = add_column(parts, 3 + network * CB + c, programs, width, PB)
            overlap = add_column(parts, 3 + (2 + network) * CB + c, programs, width, PB)
            square = add_column(parts, 3 + (4 + network) * CB + c, programs, width, PB)
            if c > 0:
                dice += 1 - (2 * overlap + smooth) / (square + size + smooth)
            tl.store(sums + network * C + c, size)
            tl.store(sums + (2 + network) * C + c, overlap)
            tl.store(sums + (4 + network) * C + c, square)
        tl.store(losses + network, (ce / tl.maximum(count, 1.0)).to(tl.float32))
        tl.store(losses + 2 + network, (dice / (C - 1)).to(tl.float32))


@triton.jit
def network_gradient(z, target, reliable, grad_losses, count, sums, network, smooth, C: tl.constexpr, CB: tl.constexpr):
    """dL/dz = p (G - sum p G) + ce (p - onehot) with G = dL/dp of Dice; [CB, BLOCK]."""
    classes = tl.arange(0, CB)
    ce = tl.load(grad_losses + network) / count
    dice = tl.load(grad_losses + 2 + network) / (C - 1)
    linear, quadratic = dice_gradient(
        sums + network * C, sums + (2 + network) * C, sums + (4 + network) * C, dice, smooth, C, CB
    )
    e, total, _ = exp_shifted(z, C, CB)
    p = e / total[None, :]
    onehot = tl.where(classes[:, None] == target[None, :], 1.0, 0.0)
    grad_p = linear[:, None] * onehot + quadratic[:, None] * p
    mean = tl.sum(p * grad_p, 0)
    return tl.where(reliable[None, :], p * (grad_p - mean[None, :]) + ce * (p - onehot), 0.0)


@triton.jit
def gradient_kernel(
    a, a_volume, a_channel, a_voxel, b, b_volume, b_channel, b_voxel, state, grad_losses, reliable_voxels, sums, smooth,
    to_a, to_a_volume, to_a_channel, to_a_voxel, to_b, to_b_volume, to_b_channel, to_b_voxel,
    volumes, voxels, blocks, BLOCK: tl.constexpr, C: tl.constexpr, CB: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    count = tl.maximum(tl.load(reliable_voxels), 1).to(tl.float32)
    for i in range(blocks):
        volume, voxel, inside = find_block(program * blocks + i, volumes, voxels, BLOCK)
        s = tl.load(state + volume * voxels + voxel, mask=inside, other=0).to(tl.int32)
        reliable = (s & RELIABLE) != 0
        grad_a = tl.zeros((CB, BLOCK), tl.float32)
        grad_b = tl.zeros((CB, BLOCK), tl.float32)
        if tl.sum(reliable.to(tl.int32)) > 0:
            za = load_map(a, a_volume, a_channel, a_voxel, volume, voxel, inside, C, CB)
            zb = load_map(b, b_volume, b_channel, b_voxel, volume, voxel, inside, C, CB)
            target_a = s & CLASS
            target_b = s & CLASS
            if OTHER:
                target_a = best_class(zb, C, CB)
                target_b = best_class(za, C, CB)
            grad_a = network_gradient(za, target_a, reliable, grad_losses, count, sums, 0, smooth, C, CB)
            grad_b = network_gradient(zb, target_b, reliable, grad_losses, count, sums, 1, smooth, C, CB)
        store_map(to_a, to_a_volume, to_a_channel, to_a_voxel, volume, voxel, inside, grad_a, C, CB)
        store_map(to_b, to_b_volume, to_b_channel, to_b_voxel, volume, voxel, inside, grad_b, C, CB)


def pseudo_supervised(
    logits_a: Tensor, logits_b: Tensor, state: Tensor, other: bool, smooth: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`sslfast::pseudo_supervised`."""
    grid, constants = over_logits(logits_a)
    classes, width = constants["C"], constants["CB"]
    parts = logits_a.new_empty((grid.programs, 3 + 6 * width), dtype=torch.float64)
    losses = logits_a.new_empty((2, 2), dtype=torch.float32)
    reliable_voxels = logits_a.new_empty((), dtype=torch.int64)
    sums = logits_a.new_empty(6 * classes, dtype=torch.float64)
    with on_device(logits_a):
        sums_kernel[(grid.programs,)](
            *VoxelMap.of(logits_a).arguments, *VoxelMap.of(logits_b).arguments, state.contiguous(), parts,
            **constants, OTHER=other,
        )  # fmt: skip
        losses_kernel[(1,)](
            parts, grid.programs, smooth, losses, reliable_voxels, sums, PB=padded(grid.programs), C=classes, CB=width
        )
    return losses, reliable_voxels, sums


def pseudo_supervised_backward(
    grad_losses: Tensor,
    logits_a: Tensor,
    logits_b: Tensor,
    state: Tensor,
    reliable_voxels: Tensor,
    sums: Tensor,
    other: bool,
    smooth: float,
    grad_a: Tensor,
    grad_b: Tensor,
) -> None:
    """`sslfast::pseudo_supervised_backward`."""
    if grad_a.numel() == 0:
        return
    grid, constants = over_logits(logits_a)
    with on_device(logits_a):
        gradient_kernel[(grid.programs,)](
            *VoxelMap.of(logits_a).arguments, *VoxelMap.of(logits_b).arguments, state.contiguous(),
            grad_losses.contiguous(), reliable_voxels, sums, smooth,
            *VoxelMap.of(grad_a).arguments, *VoxelMap.of(grad_b).arguments,
            **constants, OTHER=other,
        )  # fmt: skip
