"""`masked_consistency` on the GPU: one pass over both maps for the sums, one for the student's gradient.

Bytes per voxel for C classes of s bytes: forward 2 C s, backward 3 C s.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sslfast.kernels.voxels import (
    add,
    find_voxels,
    load_grad,
    load_map,
    no_sums,
    predict,
    store_map,
    store_partials,
    through_softmax,
    voxel_gradients,
    voxel_sums,
)
from sslfast.ops.masked_consistency import OP

SCALARS = tl.constexpr(OP.scalars)
SQUARES = tl.constexpr(OP.slot_index("squares"))


@triton.jit
def compare(student, teacher, at, sharpness, max_entropy, C: tl.constexpr, CB: tl.constexpr):
    """p, p - q, and where the entropy of q is below the limit; a NaN entropy passes, so that the loss is NaN."""
    p, _, _ = predict(load_map(student, at, C, CB), C, CB)
    q, log_q, _ = predict(sharpness * load_map(teacher, at, C, CB), C, CB)
    return p, p - q, at[2] & ~(-tl.sum(q * log_q, 0) >= max_entropy)


@triton.jit
def sums_kernel(
    student, teacher, sharpness, max_entropy, partials, division, BLOCK: tl.constexpr, C: tl.constexpr, CB: tl.constexpr
):  # fmt: skip
    sums = no_sums(SCALARS, (BLOCK,))
    for i in range(division.blocks):
        at = find_voxels(i, division, BLOCK)
        _, apart, certain = compare(student, teacher, at, sharpness, max_entropy, C, CB)
        sums = add(sums, (certain, tl.where(certain, tl.sum(apart * apart, 0), 0.0)))
    store_partials(partials, sums, (), CB)


@triton.jit
def gradient_kernel(
    grad_sums, student, teacher, sharpness, max_entropy, to, division, BLOCK: tl.constexpr, C: tl.constexpr,
    CB: tl.constexpr,
):  # fmt: skip
    scale = 2 * load_grad(grad_sums, SQUARES)
    for i in range(division.blocks):
        at = find_voxels(i, division, BLOCK)
        p, apart, certain = compare(student, teacher, at, sharpness, max_entropy, C, CB)
        store_map(to, at, tl.where(certain[None, :], scale * through_softmax(p, apart), 0.0), C, CB)


def masked_consistency(
    student: Tensor, _: None, teacher: Tensor, __: None, temperature: float, max_entropy: float
) -> Tensor:
    """`sslfast::masked_consistency`."""
    return voxel_sums(OP, sums_kernel, (student, teacher), 1 / temperature, max_entropy)


def masked_consistency_backward(
    grad_sums: Tensor, student: Tensor, _: None, teacher: Tensor, __: None, temperature: float, max_entropy: float,
    grad: Tensor, ___: None,
) -> None:  # fmt: skip
    """`sslfast::masked_consistency_backward`."""
    voxel_gradients(gradient_kernel, grad_sums, (student, teacher), 1 / temperature, max_entropy, to=(grad,))
