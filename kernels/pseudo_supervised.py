"""`pseudo_supervised` on the GPU: one pass over the logits for the sums, one for the gradient.

Bytes per voxel for C classes of s bytes: forward C s + 1 for the flags, backward 2 C s + 1.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sslfast.kernels.dual_supervised import supervised_gradient
from sslfast.kernels.voxels import (
    add,
    find_voxels,
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
    voxel_gradients,
    voxel_sums,
)
from sslfast.ops.pseudo_supervised import OP

SCALARS, ROWS = tl.constexpr(OP.scalars), tl.constexpr(OP.rows)
CE = tl.constexpr(OP.slot_index("ce"))
OVERLAP = tl.constexpr(OP.slot_index("overlap"))
SQUARE = tl.constexpr(OP.slot_index("square"))


@triton.jit
def sums_kernel(logits, flags, partials, division, BLOCK: tl.constexpr, C: tl.constexpr, CB: tl.constexpr):
    sums, rows = no_sums(SCALARS, (BLOCK,)), no_sums(ROWS, (CB, BLOCK))
    for i in range(division.blocks):
        at = find_voxels(i, division, BLOCK)
        label, reliable, value = load_flags(flags, at)
        p, log_p, _ = predict(load_map(logits, at, C, CB), C, CB)
        onehot = one_hot(tl.where(reliable, label, -1), CB)
        p = tl.where(reliable[None, :], p, 0.0)
        ce = tl.where(reliable, -tl.sum(log_p * onehot, 0), 0.0)
        sums = add(sums, (at[2], reliable, nan_if_out_of_range(ce, value, C)))
        rows = add(rows, (onehot, p * onehot, p * p))
    store_partials(partials, sums, rows, CB)


@triton.jit
def gradient_kernel(grad_sums, logits, flags, to, division, BLOCK: tl.constexpr, C: tl.constexpr, CB: tl.constexpr):
    ce = load_grad(grad_sums, CE)
    overlap = load_grad_row(grad_sums, SCALARS, OVERLAP, C, CB)
    square = load_grad_row(grad_sums, SCALARS, SQUARE, C, CB)
    for i in range(division.blocks):
        at = find_voxels(i, division, BLOCK)
        label, reliable, _ = load_flags(flags, at)
        p, _, _ = predict(load_map(logits, at, C, CB), C, CB)
        grad = supervised_gradient(p, one_hot(label, CB), ce, overlap, square, 0.0)
        store_map(to, at, tl.where(reliable[None, :], grad, 0.0), C, CB)


def pseudo_supervised(logits: Tensor, _: None, flags: Tensor) -> Tensor:
    """`sslfast::pseudo_supervised`."""
    return voxel_sums(OP, sums_kernel, (logits,), flags.contiguous())


def pseudo_supervised_backward(
    grad_sums: Tensor, logits: Tensor, _: None, flags: Tensor, grad: Tensor, __: None
) -> None:
    """`sslfast::pseudo_supervised_backward`."""
    voxel_gradients(gradient_kernel, grad_sums, (logits,), flags.contiguous(), to=(grad,))
