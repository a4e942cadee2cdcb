"""`pseudo_supervised` on the GPU. Bytes a voxel for C classes of s bytes: forward 1 + 2 C s, backward the same and 2 C s written."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sslfast.kernels.voxels import (
    CLASS,
    RELIABLE,
    Grid,
    VoxelMap,
    best_class,
    exp_shifted,
    find_block,
    load_map,
    on_device,
    padded,
    store_map,
)


@triton.jit
def sums_kernel(
    a, a_volume, a_channel, a_voxel, b, b_volume, b_channel, b_voxel, state, parts,
    volumes, voxels, blocks, BLOCK: tl.constexpr, C: tl.constexpr, CB: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """A program's sums: cross-entropy of both networks, reliable voxels."""
    program = tl.program_id(0).to(tl.int64)
    ce_a = tl.zeros((), tl.float64)
    ce_b = tl.zeros((), tl.float64)
    reliable_sum = tl.zeros((), tl.float64)
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
            classes = tl.arange(0, CB)[:, None]
            _, total_a, highest_a = exp_shifted(za, C, CB)
            _, total_b, highest_b = exp_shifted(zb, C, CB)
            own_a = tl.sum(tl.where(classes == target_a[None, :], za, 0.0), 0)
            own_b = tl.sum(tl.where(classes == target_b[None, :], zb, 0.0), 0)
            ce_a += tl.sum(tl.where(reliable, tl.log(total_a) + highest_a - own_a, 0.0)).to(tl.float64)
            ce_b += tl.sum(tl.where(reliable, tl.log(total_b) + highest_b - own_b, 0.0)).to(tl.float64)
            reliable_sum += members.to(tl.float64)
    tl.store(parts + program * 3, ce_a)
    tl.store(parts + program * 3 + 1, ce_b)
    tl.store(parts + program * 3 + 2, reliable_sum)


@triton.jit
def means_kernel(parts, programs, ce, reliable_voxels, PB: tl.constexpr):
    """One program: adds the programs' sums in a fixed order."""
    program = tl.arange(0, PB)
    count = tl.sum(tl.load(parts + program * 3 + 2, mask=program < programs, other=0.0))
    for network in tl.static_range(2):
        total = tl.sum(tl.load(parts + program * 3 + network, mask=program < programs, other=0.0))
        tl.store(ce + network, (total / tl.maximum(count, 1.0)).to(tl.float32))
    tl.store(reliable_voxels, count.to(tl.int64))


@triton.jit
def gradient_kernel(
    a, a_volume, a_channel, a_voxel, b, b_volume, b_channel, b_voxel, state, grad_ce, reliable_voxels,
    to_a, to_a_volume, to_a_channel, to_a_voxel, to_b, to_b_volume, to_b_channel, to_b_voxel,
    volumes, voxels, blocks, BLOCK: tl.constexpr, C: tl.constexpr, CB: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    count = tl.maximum(tl.load(reliable_voxels), 1).to(tl.float32)
    scale_a = tl.load(grad_ce) / count
    scale_b = tl.load(grad_ce + 1) / count
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
            classes = tl.arange(0, CB)[:, None]
            e_a, total_a, _ = exp_shifted(za, C, CB)
            e_b, total_b, _ = exp_shifted(zb, C, CB)
            onehot_a = tl.where(classes == target_a[None, :], 1.0, 0.0)
            onehot_b = tl.where(classes == target_b[None, :], 1.0, 0.0)
            grad_a = tl.where(reliable[None, :], scale_a * (e_a / total_a[None, :] - onehot_a), 0.0)
            grad_b = tl.where(reliable[None, :], scale_b * (e_b / total_b[None, :] - onehot_b), 0.0)
        store_map(to_a, to_a_volume, to_a_channel, to_a_voxel, volume, voxel, inside, grad_a, C, CB)
        store_map(to_b, to_b_volume, to_b_channel, to_b_voxel, volume, voxel, inside, grad_b, C, CB)


def pseudo_supervised(logits_a: Tensor, logits_b: Tensor, state: Tensor, other: bool) -> tuple[Tensor, Tensor]:
    """`sslfast::pseudo_supervised`."""
    classes = logits_a.shape[1]
    width = padded(classes)
    grid = Grid.over(logits_a, block=max(1024 // width, 64))
    parts = logits_a.new_empty((grid.programs, 3), dtype=torch.float64)
    ce = logits_a.new_empty(2, dtype=torch.float32)
    reliable_voxels = logits_a.new_empty((), dtype=torch.int64)
    with on_device(logits_a):
        sums_kernel[(grid.programs,)](
            *VoxelMap.of(logits_a).arguments, *VoxelMap.of(logits_b).arguments, state.contiguous(), parts,
            **grid.constants, C=classes, CB=width, OTHER=other,
        )  # fmt: skip
        means_kernel[(1,)](parts, grid.programs, ce, reliable_voxels, PB=padded(grid.programs))
    return ce, reliable_voxels


def pseudo_supervised_backward(
    grad_ce: Tensor,
    logits_a: Tensor,
    logits_b: Tensor,
    state: Tensor,
    reliable_voxels: Tensor,
    other: bool,
    grad_a: Tensor,
    grad_b: Tensor,
) -> None:
    """`sslfast::pseudo_supervised_backward`."""
    if grad_a.numel() == 0:
        return
    classes = logits_a.shape[1]
    width = padded(classes)
    grid = Grid.over(logits_a, block=max(1024 // width, 64))
    with on_device(logits_a):
        gradient_kernel[(grid.programs,)](
            *VoxelMap.of(logits_a).arguments, *VoxelMap.of(logits_b).arguments, state.contiguous(),
            grad_ce.contiguous(), reliable_voxels, *VoxelMap.of(grad_a).arguments, *VoxelMap.of(grad_b).arguments,
            **grid.constants, C=classes, CB=width, OTHER=other,
        )  # fmt: skip
