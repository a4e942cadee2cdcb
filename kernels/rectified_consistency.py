"""`rectified_consistency` on the GPU: one pass over both maps, then a small one that adds up the programs' sums.

Bytes a voxel for C classes of s bytes: forward 2 C s + 1 of state, backward as much again and the gradients written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sslfast.kernels.dual_supervised import dice_gradient
from sslfast.kernels.voxels import (
    SURE_A,
    SURE_B,
    VoxelMap,
    add_column,
    best_class,
    find_block,
    load_map,
    on_device,
    over_logits,
    padded,
    predict,
    store_map,
)


@triton.jit
def rectify(log_p, q, log_q, onehot):
    """KL = sum q log(q / p) of a student p and a teacher q, CE = -log p at the teacher's class, and e^-KL."""
    kl = tl.sum(q * (log_q - log_p), 0)
    return kl, -tl.sum(tl.where(onehot, log_p, 0.0), 0), tl.exp(-kl)


@triton.jit
def inverse_length(p):
    """1 / |p| of a tile's columns."""
    return 1.0 / tl.sqrt(tl.sum(p * p, 0))


@triton.jit
def sums_kernel(
    a, a_volume, a_channel, a_voxel, b, b_volume, b_channel, b_voxel, state, parts,
    volumes, voxels, blocks, BLOCK: tl.constexpr, C: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    """A program's sums: voxels where a, where b learns, e^-KL CE + KL of both, 1 - cos, then [CB] p_a^2, p_b^2 and p_a p_b."""
    program = tl.program_id(0).to(tl.int64)
    classes = tl.arange(0, CB)[:, None]
    square_a = tl.zeros((CB,), tl.float64)
    square_b = tl.zeros((CB,), tl.float64)
    product = tl.zeros((CB,), tl.float64)
    count_a = tl.zeros((), tl.float64)
    count_b = tl.zeros((), tl.float64)
    rectified_a = tl.zeros((), tl.float64)
    rectified_b = tl.zeros((), tl.float64)
    cosine = tl.zeros((), tl.float64)
    for i in range(blocks):
        volume, voxel, inside = find_block(program * blocks + i, volumes, voxels, BLOCK)
        s = tl.load(state + volume * voxels + voxel, mask=inside, other=0).to(tl.int32)
        a_learns = (s & SURE_B) != 0
        b_learns = (s & SURE_A) != 0
        za = load_map(a, a_volume, a_channel, a_voxel, volume, voxel, inside, C, CB)
        zb = load_map(b, b_volume, b_channel, b_voxel, volume, voxel, inside, C, CB)
        pa, log_a = predict(za, C, CB)
        pb, log_b = predict(zb, C, CB)
        kl_a, ce_a, weight_a = rectify(log_a, pb, log_b, classes == best_class(zb, C, CB)[None, :])
        kl_b, ce_b, weight_b = rectify(log_b, pa, log_a, classes == best_class(za, C, CB)[None, :])
        apart = 1.0 - tl.sum(pa * pb, 0) * (inverse_length(pa) * inverse_length(pb))
        count_a += tl.sum(a_learns.to(tl.int32)).to(tl.float64)
        count_b += tl.sum(b_learns.to(tl.int32)).to(tl.float64)
        rectified_a += tl.sum(tl.where(a_learns, weight_a * ce_a + kl_a, 0.0)).to(tl.float64)
        rectified_b += tl.sum(tl.where(b_learns, weight_b * ce_b + kl_b, 0.0)).to(tl.float64)
        cosine += tl.sum(tl.where(inside, apart, 0.0)).to(tl.float64)
        square_a += tl.sum(tl.where(inside[None, :], pa * pa, 0.0), 1).to(tl.float64)
        square_b += tl.sum(tl.where(inside[None, :], pb * pb, 0.0), 1).to(tl.float64)
        product += tl.sum(tl.where(inside[None, :], pa * pb, 0.0), 1).to(tl.float64)
    row = parts + program * (5 + 3 * CB)
    tl.store(row, count_a)
    tl.store(row + 1, count_b)
    tl.store(row + 2, rectified_a)
    tl.store(row + 3, rectified_b)
    tl.store(row + 4, cosine)
    for_class = row + 5 + tl.arange(0, CB)
    tl.store(for_class, square_a)
    tl.store(for_class + CB, square_b)
    tl.store(for_class + 2 * CB, product)


@triton.jit
def losses_kernel(
    parts, programs, volumes, voxels, smooth, losses, taught, products, PB: tl.constexpr, C: tl.constexpr, CB: tl.constexpr
):  # fmt: skip
    """One program: the means and sums that the programs' sums make."""
    width = 5 + 3 * CB
    for network in tl.static_range(2):
        count = add_column(parts, network, programs, width, PB)
        total = add_column(parts, 2 + network, programs, width, PB)
        tl.store(taught + network, count.to(tl.int64))
        tl.store(losses + network, (total / tl.maximum(count, 1.0)).to(tl.float32))
    everywhere = tl.cast(volumes, tl.int64) * voxels
    tl.store(taught + 2, everywhere)
    apart = add_column(parts, 4, programs, width, PB) / tl.maximum(everywhere, 1).to(tl.float64)
    tl.store(losses + 2, apart.to(tl.float32))
    dice = tl.zeros((), tl.float64)
    for i in tl.static_range(3):
        tl.store(products + i * C, tl.zeros((), tl.float64))
    for c in tl.static_range(1, C):
        square_a = add_column(parts, 5 + c, programs, width, PB)
        square_b = add_column(parts, 5 + CB + c, programs, width, PB)
        product = add_column(parts, 5 + 2 * CB + c, programs, width, PB)
        dice += 1 - (2 * product + smooth) / (square_a + square_b + smooth)
        tl.store(products + c, square_a)
        tl.store(products + C + c, square_b)
        tl.store(products + 2 * C + c, product)
    tl.store(losses + 3, (dice / (C - 1)).to(tl.float32))


@triton.jit
def student_gradient(
    p, log_p, q, log_q, onehot, inverse_p, inverse_q, cosine, learns, scale, cosine_scale, square_scale, product_scale
):  # fmt: skip
    """e^-KL (p - onehot) + (1 - e^-KL CE) (p - q) where it learns; and of 1 - cos, G = dL/dp, p G since sum p G = 0; and of the sums
    of p^2 and p q, p (G - sum p G); [CB, BLOCK]."""
    _, ce, weight = rectify(log_p, q, log_q, onehot)
    taught = weight[None, :] * (p - tl.where(onehot, 1.0, 0.0)) + (1.0 - weight * ce)[None, :] * (p - q)
    own = p * inverse_p[None, :]
    apart = own * (cosine[None, :] * own - q * inverse_q[None, :])
    by_p = square_scale[:, None] * p + product_scale[:, None] * q
    everywhere = cosine_scale * apart + p * (by_p - tl.sum(p * by_p, 0)[None, :])
    return everywhere + tl.where(learns[None, :], scale * taught, 0.0)


@triton.jit
def gradient_kernel(
    a, a_volume, a_channel, a_voxel, b, b_volume, b_channel, b_voxel, state,
    grad_losses, taught, products, smooth,
    to_a, to_a_volume, to_a_channel, to_a_voxel, to_b, to_b_volume, to_b_channel, to_b_voxel,
    volumes, voxels, blocks, BLOCK: tl.constexpr, C: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    classes = tl.arange(0, CB)[:, None]
    scale_a = tl.load(grad_losses) / tl.maximum(tl.load(taught), 1).to(tl.float32)
    scale_b = tl.load(grad_losses + 1) / tl.maximum(tl.load(taught + 1), 1).to(tl.float32)
    cosine_scale = tl.load(grad_losses + 2) / tl.maximum(tl.load(taught + 2), 1).to(tl.float32)
    dice = tl.load(grad_losses + 3) / (C - 1)
    product, square = dice_gradient(products, products + 2 * C, products + C, dice, smooth, C, CB)
    for i in range(blocks):
        volume, voxel, inside = find_block(program * blocks + i, volumes, voxels, BLOCK)
        s = tl.load(state + volume * voxels + voxel, mask=inside, other=0).to(tl.int32)
        za = load_map(a, a_volume, a_channel, a_voxel, volume, voxel, inside, C, CB)
        zb = load_map(b, b_volume, b_channel, b_voxel, volume, voxel, inside, C, CB)
        pa, log_a = predict(za, C, CB)
        pb, log_b = predict(zb, C, CB)
        class_a = classes == best_class(za, C, CB)[None, :]
        class_b = classes == best_class(zb, C, CB)[None, :]
        inverse_a = inverse_length(pa)
        inverse_b = inverse_length(pb)
        cosine = tl.sum(pa * pb, 0) * (inverse_a * inverse_b)
        grad_a = student_gradient(
            pa, log_a, pb, log_b, class_b, inverse_a, inverse_b, cosine, (s & SURE_B) != 0, scale_a, cosine_scale, square, product
        )  # fmt: skip
        store_map(to_a, to_a_volume, to_a_channel, to_a_voxel, volume, voxel, inside, grad_a, C, CB)
        grad_b = student_gradient(
            pb, log_b, pa, log_a, class_a, inverse_b, inverse_a, cosine, (s & SURE_A) != 0, scale_b, cosine_scale, square, product
        )  # fmt: skip
        store_map(to_b, to_b_volume, to_b_channel, to_b_voxel, volume, voxel, inside, grad_b, C, CB)


def rectified_consistency(
    logits_a: Tensor, logits_b: Tensor, state: Tensor, smooth: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`sslfast::rectified_consistency`."""
    grid, constants = over_logits(logits_a)
    classes, width = constants["C"], constants["CB"]
    parts = logits_a.new_empty((grid.programs, 5 + 3 * width), dtype=torch.float64)
    losses = logits_a.new_empty(4, dtype=torch.float32)
    voxels = logits_a.new_empty(3, dtype=torch.int64)
    products = logits_a.new_empty((3, classes), dtype=torch.float64)
    with on_device(logits_a):
        sums_kernel[(grid.programs,)](
            *VoxelMap.of(logits_a).arguments, *VoxelMap.of(logits_b).arguments, state.contiguous(), parts, **constants
        )  # fmt: skip
        losses_kernel[(1,)](
            parts, grid.programs, grid.volumes, grid.voxels, smooth, losses, voxels, products,
            PB=padded(grid.programs), C=classes, CB=width, num_warps=8,
        )  # fmt: skip
    return losses, voxels, products


def rectified_consistency_backward(
    grad_losses: Tensor,
    logits_a: Tensor,
    logits_b: Tensor,
    state: Tensor,
    voxels: Tensor,
    products: Tensor,
    smooth: float,
    grad_a: Tensor,
    grad_b: Tensor,
) -> None:
    """`sslfast::rectified_consistency_backward`."""
    if grad_a.numel() == 0:
        return
    grid, constants = over_logits(logits_a)
    with on_device(logits_a):
        gradient_kernel[(grid.programs,)](
            *VoxelMap.of(logits_a).arguments, *VoxelMap.of(logits_b).arguments, state.contiguous(),
            grad_losses.contiguous(), voxels, products, smooth,
            *VoxelMap.of(grad_a).arguments, *VoxelMap.of(grad_b).arguments, **constants,
        )  # fmt: skip
