"""`voxel_infonce` on the GPU: tiles of anchors against tiles of keys, log-sum-exp kept online, no similarity ever stored.

The backward pass computes the similarities again: each program owns the rows (anchors) or columns (keys) that it writes, so
that no addition depends on an order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sslfast.kernels.voxels import on_device, padded


@triton.jit
def load_units(pointer, first, count, K: tl.constexpr, KB: tl.constexpr, BLOCK: tl.constexpr):
    """Rows first .. of a [count, K] matrix scaled to unit length, 0 beyond its end; and their 1 / length."""
    row = first + tl.arange(0, BLOCK)
    k = tl.arange(0, KB)
    values = tl.load(pointer + row[:, None] * K + k[None, :], mask=(row < count)[:, None] & (k < K)[None, :], other=0.0)
    length = tl.sqrt(tl.sum(values * values, 1))
    inverse = tl.where(length < 1e-12, 0.0, 1.0 / tl.maximum(length, 1e-12))
    return values * inverse[:, None], inverse


@triton.jit
def through_unit(grad, unit, inverse):
    """The gradient of the vectors whose unit vectors have this gradient."""
    return inverse[:, None] * (grad - unit * tl.sum(grad * unit, 1)[:, None])


@triton.jit
def loss_kernel(
    anchors, anchor_counts, prototypes, prototype_counts, negatives, negative_counts, inverse_temperature, lse, parts,
    A, Q, C: tl.constexpr, CB: tl.constexpr, K: tl.constexpr, KB: tl.constexpr, BA: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """A program for a tile of one class's anchors: their log-sum-exp and the sum of their losses."""
    c = tl.program_id(1)
    first = tl.program_id(0) * BA
    row = first + tl.arange(0, BA)
    has_prototype = tl.load(prototype_counts + c) > 0
    used = (row < tl.load(anchor_counts + c)) & has_prototype
    g, g_inverse = load_units(anchors + c.to(tl.int64) * A * K, first, A, K, KB, BA)
    m, m_inverse = load_units(prototypes, 0, C, K, KB, CB)
    classes = tl.arange(0, CB)
    present = tl.load(prototype_counts + classes, mask=classes < C, other=0) > 0
    s = tl.dot(g, tl.trans(m), input_precision="ieee") * inverse_temperature
    positive = tl.sum(tl.where((classes == c)[None, :], s, 0.0), 1)
    s = tl.where(present[None, :], s, float("-inf"))
    s = tl.where(used[:, None], s, 0.0)  # a class without prototype would be all -inf
    highest = tl.max(s, 1)
    total = tl.sum(tl.exp(s - highest[:, None]), 1)
    count = tl.load(negative_counts + c)
    for start in range(0, tl.minimum(count, Q).to(tl.int32), BQ):
        n, n_inverse = load_units(negatives + c.to(tl.int64) * Q * K, start, Q, K, KB, BQ)
        to_negatives = tl.dot(g, tl.trans(n), input_precision="ieee") * inverse_temperature
        to_negatives = tl.where((start + tl.arange(0, BQ) < count)[None, :], to_negatives, float("-inf"))
        higher = tl.maximum(highest, tl.max(to_negatives, 1))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(to_negatives - higher[:, None]), 1)
        highest = higher
    found = highest + tl.log(total)
    tl.store(lse + c * A + row, tl.where(used, found, 0.0), mask=row < A)
    loss = tl.sum(tl.where(used, found - positive, 0.0))
    place = c * tl.num_programs(0) + tl.program_id(0)
    tl.store(parts + place, loss.to(tl.float64))


@triton.jit
def anchors_kernel(
    grad, lse, used_anchors, anchors, anchor_counts, prototypes, prototype_counts, negatives, negative_counts,
    inverse_temperature, to, A, Q, C: tl.constexpr, CB: tl.constexpr, K: tl.constexpr, KB: tl.constexpr,
    BA: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of one class's anchors."""
    c = tl.program_id(1)
    first = tl.program_id(0) * BA
    row = first + tl.arange(0, BA)
    k = tl.arange(0, KB)
    used = (row < tl.load(anchor_counts + c)) & (tl.load(prototype_counts + c) > 0)
    g, g_inverse = load_units(anchors + c.to(tl.int64) * A * K, first, A, K, KB, BA)
    own_lse = tl.load(lse + c * A + row, mask=row < A, other=0.0)
    m, m_inverse = load_units(prototypes, 0, C, K, KB, CB)
    classes = tl.arange(0, CB)
    present = tl.load(prototype_counts + classes, mask=classes < C, other=0) > 0
    s = tl.dot(g, tl.trans(m), input_precision="ieee") * inverse_temperature
    p = tl.where(present[None, :] & used[:, None], tl.exp(s - own_lse[:, None]), 0.0)
    p = p - tl.where((classes == c)[None, :] & used[:, None], 1.0, 0.0)
    total = tl.dot(p, m, input_precision="ieee")
    count = tl.load(negative_counts + c)
    for start in range(0, tl.minimum(count, Q).to(tl.int32), BQ):
        n, n_inverse = load_units(negatives + c.to(tl.int64) * Q * K, start, Q, K, KB, BQ)
        to_negatives = tl.dot(g, tl.trans(n), input_precision="ieee") * inverse_temperature
        real = (start + tl.arange(0, BQ) < count)[None, :] & used[:, None]
        total += tl.dot(tl.where(real, tl.exp(to_negatives - own_lse[:, None]), 0.0), n, input_precision="ieee")
    scale = tl.load(grad) * inverse_temperature / tl.maximum(tl.load(used_anchors), 1).to(tl.float32)
    out = tl.where(used[:, None], through_unit(total, g, g_inverse) * scale, 0.0)
    place = (c.to(tl.int64) * A + row)[:, None] * K + k[None, :]
    tl.store(to + place, out, mask=(row < A)[:, None] & (k < K)[None, :])


@triton.jit
def negatives_kernel(
    grad, lse, used_anchors, anchors, anchor_counts, prototype_counts, negatives, negative_counts, inverse_temperature,
    to, A, Q, K: tl.constexpr, KB: tl.constexpr, BA: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of one class's negatives."""
    c = tl.program_id(1)
    first = tl.program_id(0) * BQ
    row = first + tl.arange(0, BQ)
    k = tl.arange(0, KB)
    n, n_inverse = load_units(negatives + c.to(tl.int64) * Q * K, first, Q, K, KB, BQ)
    real = row < tl.load(negative_counts + c)
    count = tl.where(tl.load(prototype_counts + c) > 0, tl.load(anchor_counts + c), 0)
    total = tl.zeros((BQ, KB), tl.float32)
    for start in range(0, tl.minimum(count, A).to(tl.int32), BA):
        g, g_inverse = load_units(anchors + c.to(tl.int64) * A * K, start, A, K, KB, BA)
        anchor = start + tl.arange(0, BA)
        own_lse = tl.load(lse + c * A + anchor, mask=anchor < A, other=0.0)
        s = tl.dot(n, tl.trans(g), input_precision="ieee") * inverse_temperature
        p = tl.where(real[:, None] & (anchor < count)[None, :], tl.exp(s - own_lse[None, :]), 0.0)
        total += tl.dot(p, g, input_precision="ieee")
    scale = tl.load(grad) * inverse_temperature / tl.maximum(tl.load(used_anchors), 1).to(tl.float32)
    out = through_unit(total, n, n_inverse) * scale
    place = (c.to(tl.int64) * Q + row)[:, None] * K + k[None, :]
    tl.store(to + place, out, mask=(row < Q)[:, None] & (k < K)[None, :])


@triton.jit
def prototypes_kernel(
    grad, lse, used_anchors, anchors, anchor_counts, prototypes, prototype_counts, inverse_temperature, to, A,
    C: tl.constexpr, CB: tl.constexpr, K: tl.constexpr, KB: tl.constexpr, BA: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of all prototypes, from the anchors of every class."""
    k = tl.arange(0, KB)
    classes = tl.arange(0, CB)
    m, m_inverse = load_units(prototypes, 0, C, K, KB, CB)
    present = tl.load(prototype_counts + classes, mask=classes < C, other=0) > 0
    total = tl.zeros((CB, KB), tl.float32)
    for c in range(C):
        count = tl.where(tl.load(prototype_counts + c) > 0, tl.load(anchor_counts + c), 0)
        for start in range(0, tl.minimum(count, A).to(tl.int32), BA):
            g, g_inverse = load_units(anchors + c * A * K, start, A, K, KB, BA)
            anchor = start + tl.arange(0, BA)
            own_lse = tl.load(lse + c * A + anchor, mask=anchor < A, other=0.0)
            real = present[:, None] & (anchor < count)[None, :]
            s = tl.dot(m, tl.trans(g), input_precision="ieee") * inverse_temperature
            p = tl.where(real, tl.exp(s - own_lse[None, :]), 0.0)
            p = p - tl.where(real & (classes == c)[:, None], 1.0, 0.0)
            total += tl.dot(p, g, input_precision="ieee")
    scale = tl.load(grad) * inverse_temperature / tl.maximum(tl.load(used_anchors), 1).to(tl.float32)
    out = through_unit(total, m, m_inverse) * scale
    tl.store(to + classes[:, None] * K + k[None, :], out, mask=(classes < C)[:, None] & (k < K)[None, :])


def _sizes(anchors: Tensor) -> dict[str, int]:
    classes, _, k = anchors.shape
    width = padded(k, 16)  # a product's least size
    return {"C": classes, "CB": padded(classes, 16), "K": k, "KB": width}


def _tile(width: int) -> tuple[int, int]:
    """Rows of a tile and warps of a program, so that everything stays in registers."""
    return (32, 4) if width <= 32 else (16, 8)


def _used(anchors: Tensor, anchor_counts: Tensor, prototype_counts: Tensor) -> Tensor:
    """How many anchors have a prototype: [] int64."""
    return torch.where(prototype_counts > 0, anchor_counts.clamp_max(anchors.shape[1]), 0).sum()


def voxel_infonce(
    anchors: Tensor,
    anchor_counts: Tensor,
    prototypes: Tensor,
    prototype_counts: Tensor,
    negatives: Tensor,
    negative_counts: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """`sslfast::voxel_infonce`."""
    classes, capacity, _ = anchors.shape
    sizes = _sizes(anchors)
    tile, warps = _tile(sizes["KB"])
    tiles = triton.cdiv(capacity, tile)
    lse = anchors.new_empty((classes, capacity), dtype=torch.float32)
    parts = anchors.new_zeros((classes, max(tiles, 1)), dtype=torch.float64)
    if tiles:
        with on_device(anchors):
            loss_kernel[(tiles, classes)](
                anchors.contiguous(), anchor_counts, prototypes.contiguous(), prototype_counts, negatives.contiguous(),
                negative_counts, 1 / temperature, lse, parts, capacity, negatives.shape[1], **sizes, BA=tile, BQ=tile, num_warps=warps,
            )  # fmt: skip
    count = _used(anchors, anchor_counts, prototype_counts)
    return (parts.sum() / count.clamp_min(1)).float(), lse


def voxel_infonce_backward(
    grad: Tensor,
    lse: Tensor,
    anchors: Tensor,
    anchor_counts: Tensor,
    prototypes: Tensor,
    prototype_counts: Tensor,
    negatives: Tensor,
    negative_counts: Tensor,
    temperature: float,
    keys: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`sslfast::voxel_infonce_backward`."""
    classes, capacity, _ = anchors.shape
    number = negatives.shape[1]
    sizes = _sizes(anchors)
    tile, warps = _tile(sizes["KB"])
    anchors, prototypes, negatives = (t.contiguous() for t in (anchors, prototypes, negatives))
    to_anchors = torch.empty_like(anchors)
    to_prototypes, to_negatives = (
        torch.empty_like(t) if keys else anchors.new_empty(0) for t in (prototypes, negatives)
    )
    used = _used(anchors, anchor_counts, prototype_counts)
    common = grad, lse, used, anchors, anchor_counts
    rows, columns = triton.cdiv(capacity, tile), triton.cdiv(number, tile)
    width = {name: sizes[name] for name in ("K", "KB")}
    with on_device(anchors):
        if rows:
            anchors_kernel[(rows, classes)](
                *common, prototypes, prototype_counts, negatives, negative_counts, 1 / temperature, to_anchors,
                capacity, number, **sizes, BA=tile, BQ=tile, num_warps=warps,
            )  # fmt: skip
        if keys:
            prototypes_kernel[(1,)](
                *common,
                prototypes,
                prototype_counts,
                1 / temperature,
                to_prototypes,
                capacity,
                **sizes,
                BA=tile,
                num_warps=8,
            )
        if keys and columns:
            negatives_kernel[(columns, classes)](
                *common, prototype_counts, negatives, negative_counts, 1 / temperature, to_negatives, capacity, number,
                **width, BA=tile, BQ=tile, num_warps=warps,
            )  # fmt: skip
    return to_anchors, to_prototypes, to_negatives
