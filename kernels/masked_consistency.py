"""`masked_consistency` on the GPU: one pass over both maps, then a small one that adds up the programs' sums.

Bytes a voxel for C classes of s bytes: forward 2 C s, backward as much again and the gradient written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sslfast.kernels.voxels import (
    VoxelMap,
    add_column,
    find_block,
    load_map,
    on_device,
    over_logits,
    padded,
    predict,
    store_map,
)


@triton.jit
def find_certain(q, log_q, max_entropy, inside):
    """Where the teacher's entropy lies below the limit; one that is NaN teaches NaN."""
    return inside & ~(-tl.sum(q * log_q, 0) >= max_entropy)


@triton.jit
def sums_kernel(
    p, p_volume, p_channel, p_voxel, q, q_volume, q_channel, q_voxel, sharpness, max_entropy, parts,
    volumes, voxels, blocks, BLOCK: tl.constexpr, C: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    """A program's sums: certain voxels, and the squared distances there."""
    program = tl.program_id(0).to(tl.int64)
    count = tl.zeros((), tl.float64)
    squares = tl.zeros((), tl.float64)
    for i in range(blocks):
        volume, voxel, inside = find_block(program * blocks + i, volumes, voxels, BLOCK)
        student, _ = predict(load_map(p, p_volume, p_channel, p_voxel, volume, voxel, inside, C, CB), C, CB)
        z = sharpness * load_map(q, q_volume, q_channel, q_voxel, volume, voxel, inside, C, CB)
        teacher, log_q = predict(z, C, CB)
        certain = find_certain(teacher, log_q, max_entropy, inside)
        apart = tl.sum((student - teacher) * (student - teacher), 0)
        count += tl.sum(certain.to(tl.int32)).to(tl.float64)
        squares += tl.sum(tl.where(certain, apart, 0.0)).to(tl.float64)
    tl.store(parts + program * 2, count)
    tl.store(parts + program * 2 + 1, squares)


@triton.jit
def loss_kernel(parts, programs, loss, certain_voxels, C: tl.constexpr, PB: tl.constexpr):
    """One program: the mean that the programs' sums make."""
    count = add_column(parts, 0, programs, 2, PB)
    tl.store(certain_voxels, count.to(tl.int64))
    tl.store(loss, (add_column(parts, 1, programs, 2, PB) / (C * tl.maximum(count, 1.0))).to(tl.float32))


@triton.jit
def gradient_kernel(
    p, p_volume, p_channel, p_voxel, q, q_volume, q_channel, q_voxel, sharpness, max_entropy, grad_loss, certain_voxels,
    to, to_volume, to_channel, to_voxel,
    volumes, voxels, blocks, BLOCK: tl.constexpr, C: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    """dL/dz = p (G - sum p G) with G = 2 (p - q) / C n."""
    program = tl.program_id(0).to(tl.int64)
    scale = 2.0 * tl.load(grad_loss) / (C * tl.maximum(tl.load(certain_voxels), 1).to(tl.float32))
    for i in range(blocks):
        volume, voxel, inside = find_block(program * blocks + i, volumes, voxels, BLOCK)
        student, _ = predict(load_map(p, p_volume, p_channel, p_voxel, volume, voxel, inside, C, CB), C, CB)
        z = sharpness * load_map(q, q_volume, q_channel, q_voxel, volume, voxel, inside, C, CB)
        teacher, log_q = predict(z, C, CB)
        certain = find_certain(teacher, log_q, max_entropy, inside)
        apart = student - teacher
        grad = scale * student * (apart - tl.sum(student * apart, 0)[None, :])
        grad = tl.where(certain[None, :], grad, 0.0)
        store_map(to, to_volume, to_channel, to_voxel, volume, voxel, inside, grad, C, CB)


def masked_consistency(
    student: Tensor, teacher: Tensor, temperature: float, max_entropy: float
) -> tuple[Tensor, Tensor]:
    """`sslfast::masked_consistency`."""
    grid, constants = over_logits(student)
    parts = student.new_empty((grid.programs, 2), dtype=torch.float64)
    loss = student.new_empty((), dtype=torch.float32)
    certain_voxels = student.new_empty((), dtype=torch.int64)
    with on_device(student):
        sums_kernel[(grid.programs,)](
            *VoxelMap.of(student).arguments, *VoxelMap.of(teacher).arguments, 1 / temperature, max_entropy, parts, **constants
        )  # fmt: skip
        loss_kernel[(1,)](parts, grid.programs, loss, certain_voxels, C=student.shape[1], PB=padded(grid.programs))
    return loss, certain_voxels


def masked_consistency_backward(
    grad_loss: Tensor,
    student: Tensor,
    teacher: Tensor,
    certain_voxels: Tensor,
    temperature: float,
    max_entropy: float,
    grad: Tensor,
) -> None:
    """`sslfast::masked_consistency_backward`."""
    if grad.numel() == 0:
        return
    grid, constants = over_logits(student)
    with on_device(student):
        gradient_kernel[(grid.programs,)](
            *VoxelMap.of(student).arguments, *VoxelMap.of(teacher).arguments, 1 / temperature, max_entropy,
            grad_loss, certain_voxels, *VoxelMap.of(grad).arguments, **constants,
        )  # fmt: skip
