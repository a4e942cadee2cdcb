"""`dual_supervised` on the GPU: one pass over both logits and the labels for the sums, one for the gradients.

Bytes per voxel for C classes of s bytes: forward 2 C s + label, backward 4 C s + label.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sslfast.kernels.voxels import (
    add,
    find_voxels,
    load_grad,
    load_grad_row,
    load_map,
    no_sums,
    one_hot,
    predict,
    store_map,
    store_partials,
    through_softmax,
    voxel_gradients,
    voxel_sums,
)
from sslfast.ops.dual_supervised import OP

SCALARS, ROWS = tl.constexpr(OP.scalars), tl.constexpr(OP.rows)
CE = tl.constexpr(OP.slot_index("ce"))
DISCREPANCY = tl.constexpr(OP.slot_index("discrepancy"))
OVERLAP = tl.constexpr(OP.slot_index("overlap"))
SQUARE = tl.constexpr(OP.slot_index("square"))
CLASS_CE = tl.constexpr(OP.slot_index("class_ce"))


@triton.jit
def load_labels(labels, at, ignore, C: tl.constexpr):
    """Labels, -1 where not annotated; and where a label is out of range."""
    _, _, inside, voxel_index = at
    label = tl.load(labels + voxel_index, mask=inside, other=0).to(tl.int64)
    named = inside & (label != ignore)
    valid = named & (label >= 0) & (label < C)
    return tl.where(valid, label, -1).to(tl.int32), named & ~valid


@triton.jit
def load_block(a, b, labels, threshold, ignore, at, C: tl.constexpr, CB: tl.constexpr):
    """Probabilities of both networks and their logarithms, and one-hot labels, all 0 where not annotated; and masks of
    voxels that are annotated, where confident predictions differ, and where a label is out of range."""
    pa, log_a, class_a = predict(load_map(a, at, C, CB), C, CB)
    pb, log_b, class_b = predict(load_map(b, at, C, CB), C, CB)
    label, outside = load_labels(labels, at, ignore, C)
    annotated = label >= 0
    confident_a = tl.where(tl.max(pa, 0) >= threshold, class_a, 0)
    confident_b = tl.where(tl.max(pb, 0) >= threshold, class_b, 0)
    pa, log_a = tl.where(annotated[None, :], pa, 0.0), tl.where(annotated[None, :], log_a, 0.0)
    pb, log_b = tl.where(annotated[None, :], pb, 0.0), tl.where(annotated[None, :], log_b, 0.0)
    return pa, log_a, pb, log_b, one_hot(label, CB), annotated, annotated & (confident_a != confident_b), outside


@triton.jit
def network_sums(p, log_p, onehot, mask):
    """Cross-entropy and discrepancy [BLOCK] of a network, and p^2 [CB, BLOCK]."""
    discrepancy = tl.where(mask, 0.5 * tl.sum((p - onehot) * (p - onehot), 0), 0.0)
    return -tl.sum(log_p * onehot, 0), discrepancy, p * p


@triton.jit
def sums_kernel(
    a, b, labels, threshold, ignore, partials, division, BLOCK: tl.constexpr, C: tl.constexpr, CB: tl.constexpr
):  # fmt: skip
    sums, rows = no_sums(SCALARS, (BLOCK,)), no_sums(ROWS, (CB, BLOCK))
    for i in range(division.blocks):
        at = find_voxels(i, division, BLOCK)
        pa, log_a, pb, log_b, onehot, annotated, mask, outside = load_block(a, b, labels, threshold, ignore, at, C, CB)
        ce_a, discrepancy_a, square_a = network_sums(pa, log_a, onehot, mask)
        ce_b, discrepancy_b, square_b = network_sums(pb, log_b, onehot, mask)
        sums = add(sums, (annotated, mask, outside, ce_a, ce_b, discrepancy_a, discrepancy_b))
        class_ce_a, class_ce_b = ce_a[None, :] * onehot, ce_b[None, :] * onehot
        rows = add(rows, (onehot, pa * onehot, pb * onehot, square_a, square_b, class_ce_a, class_ce_b))
    store_partials(partials, sums, rows, CB)


@triton.jit
def supervised_gradient(p, onehot, ce, overlap, square, discrepancy):
    """dz = p (G - sum p G) + ce (p - onehot), G = overlap onehot + 2 square p + discrepancy (p - onehot) [CB, BLOCK]"""
    off = p - onehot
    return through_softmax(p, overlap * onehot + 2 * square * p + discrepancy * off) + ce * off


@triton.jit
def network_gradient(
    grad_sums, p, onehot, annotated, mask, NETWORK: tl.constexpr, C: tl.constexpr, CB: tl.constexpr
):  # fmt: skip
    class_ce = load_grad_row(grad_sums, SCALARS, CLASS_CE + NETWORK, C, CB)
    ce = load_grad(grad_sums, CE + NETWORK) + tl.sum(class_ce * onehot, 0)[None, :]
    discrepancy = tl.where(mask, load_grad(grad_sums, DISCREPANCY + NETWORK), 0.0)[None, :]
    overlap = load_grad_row(grad_sums, SCALARS, OVERLAP + NETWORK, C, CB)
    square = load_grad_row(grad_sums, SCALARS, SQUARE + NETWORK, C, CB)
    return tl.where(annotated[None, :], supervised_gradient(p, onehot, ce, overlap, square, discrepancy), 0.0)


@triton.jit
def gradient_kernel(
    grad_sums, a, b, labels, threshold, ignore, to_a, to_b, division, BLOCK: tl.constexpr, C: tl.constexpr,
    CB: tl.constexpr,
):  # fmt: skip
    for i in range(division.blocks):
        at = find_voxels(i, division, BLOCK)
        pa, log_a, pb, log_b, onehot, annotated, mask, outside = load_block(a, b, labels, threshold, ignore, at, C, CB)
        store_map(to_a, at, network_gradient(grad_sums, pa, onehot, annotated, mask, 0, C, CB), C, CB)
        store_map(to_b, at, network_gradient(grad_sums, pb, onehot, annotated, mask, 1, C, CB), C, CB)


def dual_supervised(
    logits_a: Tensor, _: None, logits_b: Tensor, __: None, labels: Tensor, threshold: float, ignore_index: int
) -> Tensor:
    """`sslfast::dual_supervised`."""
    maps, rest = (logits_a, logits_b), (labels.contiguous(), threshold, ignore_index)
    return voxel_sums(OP, sums_kernel, maps, *rest)


def dual_supervised_backward(
    grad_sums: Tensor, logits_a: Tensor, _: None, logits_b: Tensor, __: None, labels: Tensor, threshold: float,
    ignore_index: int, grad_a: Tensor, ___: None, grad_b: Tensor, ____: None,
) -> None:  # fmt: skip
    """`sslfast::dual_supervised_backward`."""
    maps, rest = (logits_a, logits_b), (labels.contiguous(), threshold, ignore_index)
    voxel_gradients(gradient_kernel, grad_sums, maps, *rest, to=(grad_a, grad_b))
