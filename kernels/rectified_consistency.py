"""`rectified_consistency` on the GPU: one pass over both maps for the sums, one for the student's gradient.

Bytes per voxel for C classes of s bytes: forward 2 C s + 1 for the flags, backward 3 C s + 1.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sslfast.kernels.voxels import (
    RELIABLE,
    add,
    find_voxels,
    inverse_length,
    load_flags,
    load_grad,
    load_grad_row,
    load_map,
    nan_if_out_of_range,
    no_sums,
    one_hot,
    predict,
    store_map,
    store_partials,
    through_softmax,
    voxel_gradients,
    voxel_sums,
)
from sslfast.ops.rectified_consistency import OP

SCALARS, ROWS = tl.constexpr(OP.scalars), tl.constexpr(OP.rows)
RECTIFIED = tl.constexpr(OP.slot_index("rectified"))
APART = tl.constexpr(OP.slot_index("apart"))
STUDENT_SQUARE = tl.constexpr(OP.slot_index("student_square"))
PRODUCT = tl.constexpr(OP.slot_index("product"))


@triton.jit
def load_block(student, teacher, flags, at, C: tl.constexpr, CB: tl.constexpr):
    """Student's probabilities p and teacher's q; the teacher's class, one-hot; where voxels are reliable; KL =
    sum q log(q / p), e^-KL, and CE = -log p at the teacher's class; 1 / |p| and 1 / |q|."""
    _, _, value = load_flags(flags, at)
    p, log_p, _ = predict(load_map(student, at, C, CB), C, CB)
    q, log_q, label = predict(load_map(teacher, at, C, CB), C, CB)
    onehot = one_hot(label, CB)
    kl = tl.sum(q * (log_q - log_p), 0)
    ce = nan_if_out_of_range(-tl.sum(log_p * onehot, 0), value, C)
    return p, q, onehot, value >= RELIABLE, kl, tl.exp(-kl), ce, inverse_length(p, 0), inverse_length(q, 0)


@triton.jit
def sums_kernel(student, teacher, flags, partials, division, BLOCK: tl.constexpr, C: tl.constexpr, CB: tl.constexpr):
    sums, rows = no_sums(SCALARS, (BLOCK,)), no_sums(ROWS, (CB, BLOCK))
    for i in range(division.blocks):
        at = find_voxels(i, division, BLOCK)
        inside = at[2]
        p, q, onehot, reliable, kl, weight, ce, inverse_p, inverse_q = load_block(student, teacher, flags, at, C, CB)
        cosine = tl.sum(p * q, 0) * (inverse_p * inverse_q)
        rectified = tl.where(reliable, weight * ce + kl, 0.0)
        sums = add(sums, (inside, reliable, rectified, tl.where(inside, 1.0 - cosine, 0.0)))
        p, q = tl.where(inside[None, :], p, 0.0), tl.where(inside[None, :], q, 0.0)
        rows = add(rows, (p * p, q * q, p * q, tl.where(inside[None, :], onehot, 0.0)))
    store_partials(partials, sums, rows, CB)


@triton.jit
def gradient_kernel(
    grad_sums, student, teacher, flags, to, division, BLOCK: tl.constexpr, C: tl.constexpr, CB: tl.constexpr
):  # fmt: skip
    """dz of the rectified loss is e^-KL (p - onehot) + (1 - e^-KL CE) (p - q). With G = d(1 - cos)/dp, dz of 1 - cos is
    p G, since sum p G = 0."""
    of_rectified = load_grad(grad_sums, RECTIFIED)
    of_apart = load_grad(grad_sums, APART)
    of_square = load_grad_row(grad_sums, SCALARS, STUDENT_SQUARE, C, CB)
    of_product = load_grad_row(grad_sums, SCALARS, PRODUCT, C, CB)
    for i in range(division.blocks):
        at = find_voxels(i, division, BLOCK)
        p, q, onehot, reliable, _, weight, ce, inverse_p, inverse_q = load_block(student, teacher, flags, at, C, CB)
        from_pseudo_label = weight[None, :] * (p - onehot) + (1.0 - weight * ce)[None, :] * (p - q)
        unit_p = p * inverse_p[None, :]
        unit_q = q * inverse_q[None, :]
        grad = of_apart * unit_p * (tl.sum(unit_p * unit_q, 0)[None, :] * unit_p - unit_q)
        grad += through_softmax(p, 2 * of_square * p + of_product * q)
        grad += tl.where(reliable[None, :], of_rectified * from_pseudo_label, 0.0)
        store_map(to, at, grad, C, CB)


def rectified_consistency(student: Tensor, _: None, teacher: Tensor, __: None, flags: Tensor) -> Tensor:
    """`sslfast::rectified_consistency`."""
    return voxel_sums(OP, sums_kernel, (student, teacher), flags.contiguous())


def rectified_consistency_backward(
    grad_sums: Tensor, student: Tensor, _: None, teacher: Tensor, __: None, flags: Tensor, grad: Tensor, ___: None
) -> None:
    """`sslfast::rectified_consistency_backward`."""
    voxel_gradients(gradient_kernel, grad_sums, (student, teacher), flags.contiguous(), to=(grad,))
