"""`voxel_infonce` on the GPU: tiles of anchors times tiles of keys, with an online log-sum-exp; no similarity is
stored.

The backward pass recomputes the similarities; each program writes the gradient of its own anchors.

Bytes read: each anchor once per pass, the prototypes and the class's negatives once per tile of anchors.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sslfast.kernels.voxels import add_up, inverse_length, on_device, padded, store_partials


@triton.jit
def load_units(pointer, row, counts, K: tl.constexpr, KB: tl.constexpr):
    """Rows of a matrix [.., K], scaled to unit length, 0 where they do not count; and their 1 / length."""
    k = tl.arange(0, KB)
    values = tl.load(pointer + row[:, None] * K + k[None, :], mask=counts[:, None] & (k < K)[None, :], other=0.0)
    inverse = inverse_length(values, 1)
    return values * inverse[:, None], inverse


@triton.jit
def load_tile(
    anchors, anchor_counts, prototypes, prototype_counts, inverse_temperature, A, C: tl.constexpr, CB: tl.constexpr,
    K: tl.constexpr, KB: tl.constexpr, BA: tl.constexpr,
):  # fmt: skip
    """The program's tile of one class's anchors: the class, the rows, which rows are used, unit vectors and 1 / length;
    the unit prototypes, which of them exist, and the similarities to them."""
    tiles = tl.cdiv(A, BA)
    c = tl.program_id(0) // tiles
    first = tl.program_id(0) % tiles * BA
    row = first + tl.arange(0, BA)
    used = (row < tl.minimum(tl.load(anchor_counts + c), A)) & (tl.load(prototype_counts + c) > 0)
    g, inverse = load_units(anchors + c.to(tl.int64) * A * K, row, used, K, KB)
    classes = tl.arange(0, CB)
    present = tl.load(prototype_counts + classes, mask=classes < C, other=0) > 0
    m, _ = load_units(prototypes, classes, present, K, KB)
    return c, row, used, g, inverse, m, present, tl.dot(g, tl.trans(m), input_precision="ieee") * inverse_temperature


@triton.jit
def loss_kernel(
    anchors, anchor_counts, prototypes, prototype_counts, negatives, negative_counts, inverse_temperature, lse,
    partials, A, Q, C: tl.constexpr, CB: tl.constexpr, K: tl.constexpr, KB: tl.constexpr, BA: tl.constexpr,
    BQ: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of a tile of one class's anchors, the sum of their losses, and the number that are used."""
    c, row, used, g, inverse, m, present, s = load_tile(
        anchors, anchor_counts, prototypes, prototype_counts, inverse_temperature, A, C, CB, K, KB, BA
    )
    is_positive = tl.arange(0, CB) == c
    positive = tl.sum(tl.where(is_positive[None, :], s, 0.0), 1)
    s = tl.where(present[None, :], s, float("-inf"))
    s = tl.where(used[:, None], s, 0.0)  # without any prototype all would be -inf
    highest = tl.max(s, 1)
    total = tl.sum(tl.exp(s - highest[:, None]), 1)
    count, filled = tl.load(negative_counts + c), tl.load(anchor_counts + c)
    fits = (count >= 0) & (count <= Q) & (filled >= 0) & (filled <= A)
    for start in range(0, tl.minimum(count, Q).to(tl.int32), BQ):
        row_q = start + tl.arange(0, BQ)
        n = load_units(negatives + c.to(tl.int64) * Q * K, row_q, row_q < tl.minimum(count, Q), K, KB)[0]
        to_negatives = tl.dot(g, tl.trans(n), input_precision="ieee") * inverse_temperature
        to_negatives = tl.where((row_q < count)[None, :], to_negatives, float("-inf"))
        higher = tl.maximum(highest, tl.max(to_negatives, 1))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(to_negatives - higher[:, None]), 1)
        highest = higher
    log_sum_exp = highest + tl.log(total)
    tl.store(lse + c * A + row, tl.where(used, log_sum_exp, 0.0), mask=row < A)
    losses = tl.where(used, log_sum_exp - positive, 0.0)
    store_partials(partials, (tl.where(fits, losses, float("nan")), used.to(tl.float32)), (), CB)


@triton.jit
def gradient_kernel(
    grad_sums, lse, anchors, anchor_counts, prototypes, prototype_counts, negatives, negative_counts,
    inverse_temperature, to, A, Q, C: tl.constexpr, CB: tl.constexpr, K: tl.constexpr, KB: tl.constexpr,
    BA: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of one class's anchors."""
    c, row, used, g, inverse, m, present, s = load_tile(
        anchors, anchor_counts, prototypes, prototype_counts, inverse_temperature, A, C, CB, K, KB, BA
    )
    is_positive = tl.arange(0, CB) == c
    k = tl.arange(0, KB)
    row_lse = tl.load(lse + c * A + row, mask=row < A, other=0.0)
    p = tl.where(present[None, :] & used[:, None], tl.exp(s - row_lse[:, None]), 0.0)
    p = p - tl.where(is_positive[None, :] & used[:, None], 1.0, 0.0)
    total = tl.dot(p, m, input_precision="ieee")
    count = tl.load(negative_counts + c)
    for start in range(0, tl.minimum(count, Q).to(tl.int32), BQ):
        row_q = start + tl.arange(0, BQ)
        n = load_units(negatives + c.to(tl.int64) * Q * K, row_q, row_q < tl.minimum(count, Q), K, KB)[0]
        to_negatives = tl.dot(g, tl.trans(n), input_precision="ieee") * inverse_temperature
        real = (row_q < count)[None, :] & used[:, None]
        total += tl.dot(tl.where(real, tl.exp(to_negatives - row_lse[:, None]), 0.0), n, input_precision="ieee")
    scale = tl.load(grad_sums).to(tl.float32) * inverse_temperature
    through_unit = inverse[:, None] * (total - g * tl.sum(total * g, 1)[:, None])
    offset = (c.to(tl.int64) * A + row)[:, None] * K + k[None, :]
    grad = tl.where(used[:, None], through_unit * scale, 0.0)
    tl.store(to + offset, grad, mask=(row < A)[:, None] & (k < K)[None, :])


def _tiles(anchors: Tensor) -> tuple[tuple[int], dict[str, Any]]:
    """The grid, and tile sizes that fit in registers."""
    classes, capacity, k = anchors.shape
    width = padded(k, 16)  # 16: the smallest size of a matrix product
    tile, warps = (32, 4) if width <= 32 else (16, 8)
    sizes = {"C": classes, "CB": padded(classes, 16), "K": k, "KB": width, "BA": tile, "BQ": tile, "num_warps": warps}
    return (triton.cdiv(capacity, tile) * classes,), sizes


def voxel_infonce(
    anchors: Tensor, anchor_counts: Tensor, prototypes: Tensor, prototype_counts: Tensor, negatives: Tensor,
    negative_counts: Tensor, temperature: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`sslfast::voxel_infonce`."""
    classes, capacity, _ = anchors.shape
    lse = anchors.new_empty((classes, capacity), dtype=torch.float32)
    if not capacity:
        loss = torch.where((anchor_counts == 0).all(), 0.0, torch.nan).double()
        return torch.stack((loss, torch.zeros_like(loss))), lse
    sums = anchors.new_empty(2, dtype=torch.float64)
    grid, sizes = _tiles(anchors)
    partials = anchors.new_empty((2, *grid), dtype=torch.float64)
    rows = anchors, anchor_counts, prototypes, prototype_counts, negatives, negative_counts
    with on_device(anchors):
        loss_kernel[grid](
            *(t.contiguous() for t in rows), 1 / temperature, lse, partials, capacity, negatives.shape[1], **sizes
        )  # fmt: skip
    add_up(partials, sums, plain=2)
    return sums, lse


def voxel_infonce_backward(
    grad_sums: Tensor, lse: Tensor, anchors: Tensor, anchor_counts: Tensor, prototypes: Tensor,
    prototype_counts: Tensor, negatives: Tensor, negative_counts: Tensor, temperature: float,
) -> Tensor:  # fmt: skip
    """`sslfast::voxel_infonce_backward`."""
    grad = anchors.new_empty(anchors.shape)
    capacity = anchors.shape[1]
    if capacity:
        grid, sizes = _tiles(anchors)
        rows = anchors, anchor_counts, prototypes, prototype_counts, negatives, negative_counts
        with on_device(anchors):
            gradient_kernel[grid](
                grad_sums.contiguous(), lse, *(t.contiguous() for t in rows), 1 / temperature, grad, capacity,
                negatives.shape[1], **sizes,
            )  # fmt: skip
    return grad
