"""`class_prototypes` on the GPU: each block's unit features are summed by class as a small matrix product.

Bytes a voxel for K features of s bytes: forward 1 + K s where a block holds a reliable voxel, backward the same and K s written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sslfast.kernels.voxels import CLASS, RELIABLE, Grid, VoxelMap, find_block, load_map, on_device, padded, store_map

PROGRAMS = 512


@triton.jit
def inverse_lengths(f):
    """1 / |f| of a tile's columns, 0 where |f| < 1e-12."""
    length = tl.sqrt(tl.sum(f * f, 0))
    return tl.where(length < 1e-12, 0.0, 1.0 / tl.maximum(length, 1e-12))


@triton.jit
def sums_kernel(
    f, f_volume, f_channel, f_voxel, g, g_volume, g_channel, g_voxel, second, state, parts, counts,
    volumes, voxels, blocks, BLOCK: tl.constexpr, C: tl.constexpr, CB: tl.constexpr, K: tl.constexpr, KB: tl.constexpr,
    CHOOSE: tl.constexpr,
):  # fmt: skip
    """A program's sums [CB, KB]; counts [CB] by atomics, since integers need no order."""
    program = tl.program_id(0).to(tl.int64)
    classes = tl.arange(0, CB)
    total = tl.zeros((CB, KB), tl.float32)
    count = tl.zeros((CB,), tl.int32)
    if CHOOSE:
        takes_second = tl.load(second) != 0
    for i in range(blocks):
        volume, voxel, inside = find_block(program * blocks + i, volumes, voxels, BLOCK)
        s = tl.load(state + volume * voxels + voxel, mask=inside, other=0).to(tl.int32)
        label = tl.where((s & RELIABLE) != 0, s & CLASS, -1)
        member = classes[:, None] == label[None, :]
        found = tl.sum(member.to(tl.int32), 1)
        if tl.sum(found) > 0:
            if CHOOSE:
                if takes_second:
                    tile = load_map(g, g_volume, g_channel, g_voxel, volume, voxel, inside, K, KB)
                else:
                    tile = load_map(f, f_volume, f_channel, f_voxel, volume, voxel, inside, K, KB)
            else:
                tile = load_map(f, f_volume, f_channel, f_voxel, volume, voxel, inside, K, KB)
            weight = inverse_lengths(tile)
            directions = tl.where((label >= 0)[None, :], tile * weight[None, :], 0.0)
            total += tl.dot(member.to(tl.float32), tl.trans(directions), input_precision="ieee")
            count += found
    real = (classes < C)[:, None] & (tl.arange(0, KB) < K)[None, :]
    places = program * C * K + classes[:, None] * K + tl.arange(0, KB)[None, :]
    tl.store(parts + places, total, mask=real)
    tl.atomic_add(counts + classes, count.to(tl.int64), mask=(classes < C) & (count > 0))


@triton.jit
def add_kernel(parts, sums, programs, values, BLOCK: tl.constexpr):
    """Adds the programs' sums in their order, in float64."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for program in range(programs):
        total += tl.load(parts + program * values + place, mask=place < values, other=0.0).to(tl.float64)
    tl.store(sums + place, total.to(tl.float32), mask=place < values)


@triton.jit
def gradient_kernel(
    f, f_volume, f_channel, f_voxel, state, grad_sums, to, to_volume, to_channel, to_voxel, num_classes,
    volumes, voxels, blocks, BLOCK: tl.constexpr, K: tl.constexpr, KB: tl.constexpr,
):  # fmt: skip
    """df = (g - u (u . g)) / |f| with u = f / |f| and g the gradient of the voxel's class."""
    program = tl.program_id(0).to(tl.int64)
    width = tl.arange(0, KB)
    for i in range(blocks):
        volume, voxel, inside = find_block(program * blocks + i, volumes, voxels, BLOCK)
        s = tl.load(state + volume * voxels + voxel, mask=inside, other=0).to(tl.int32)
        label = s & CLASS
        member = ((s & RELIABLE) != 0) & (label < num_classes)
        grad = tl.zeros((KB, BLOCK), tl.float32)
        if tl.sum(member.to(tl.int32)) > 0:
            tile = load_map(f, f_volume, f_channel, f_voxel, volume, voxel, inside, K, KB)
            weight = tl.where(member, inverse_lengths(tile), 0.0)
            real = (width < K)[:, None] & member[None, :]
            g = tl.load(grad_sums + label[None, :] * K + width[:, None], mask=real, other=0.0)
            u = tl.where(member[None, :], tile * weight[None, :], 0.0)
            grad = tl.where(real, weight[None, :] * (g - u * tl.sum(u * g, 0)[None, :]), 0.0)
        store_map(to, to_volume, to_channel, to_voxel, volume, voxel, inside, grad, K, KB)


def _block(width: int) -> int:
    return max(min(4096 // width, 256), 16)


def class_prototypes(
    features: Tensor, state: Tensor, num_classes: int, other: Tensor | None = None, second: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`sslfast::class_prototypes`."""
    k = features.shape[1]
    classes, width = padded(num_classes, 16), padded(k, 16)  # a product's least sizes
    grid = Grid.over(features, _block(width), PROGRAMS)
    parts = features.new_empty((grid.programs, num_classes, k), dtype=torch.float32)
    sums = features.new_empty((num_classes, k), dtype=torch.float32)
    counts = features.new_zeros(num_classes, dtype=torch.int64)
    with on_device(features):
        sums_kernel[(grid.programs,)](
            *VoxelMap.of(features).arguments, *VoxelMap.of(features if other is None else other).arguments,
            state if second is None else second, state.contiguous(), parts, counts, **grid.constants,
            C=num_classes, CB=classes, K=k, KB=width, CHOOSE=other is not None,
        )  # fmt: skip
        values = num_classes * k
        add_kernel[(triton.cdiv(values, 64),)](parts, sums, grid.programs, values, BLOCK=64)
    return sums, counts


def class_prototypes_backward(grad_sums: Tensor, features: Tensor, state: Tensor, grad: Tensor) -> None:
    """`sslfast::class_prototypes_backward`."""
    if grad.numel() == 0:
        return
    k = features.shape[1]
    width = padded(k)
    grid = Grid.over(features, _block(width))
    with on_device(features):
        gradient_kernel[(grid.programs,)](
            *VoxelMap.of(features).arguments, state.contiguous(), grad_sums.contiguous(), *VoxelMap.of(grad).arguments,
            len(grad_sums), **grid.constants, K=k, KB=width,
        )  # fmt: skip
