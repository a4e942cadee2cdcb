"""`norm_act` on the GPU: a pass for the statistics and one for the activations; backward, one for sums and one more.

Tiles are [channels, voxels]. Whichever of the two is contiguous in memory is spread over neighbouring threads.

Bytes per number of s bytes: statistics s, activations 2 s, sums 2 s, gradient 3 s; a residual, its gradient and a skip
take s more each where they occur, but the backward pass reads the residual for the ReLU only.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sslfast.kernels.voxels import BLOCKS, PROGRAMS, no_sums, on_device, padded

TILE = 2048  # numbers in a program's tile: 16 per thread
MOST_CHANNELS = 64  # in a tile, if channels are contiguous
PARTIALS = 1024  # in a block of those that are combined
BLOCKS_TO_WRITE = 4  # the most blocks of a program that writes voxels: programs finish at about the same time


class Parts(NamedTuple):
    """The layout of the tensors, and the division of each volume's voxels into parts, one per program, for kernels."""

    channels: int
    voxels: int  # per volume
    channel: int  # stride, as is the next
    voxel: int
    parts: int  # per volume
    blocks: int  # tiles per part
    size: int  # voxels per part; the last has fewer
    partials: int  # parts per group: those of a volume, or those of the batch

    @classmethod
    def of(cls, x: Tensor, groups: int, blocks: int) -> tuple[tuple[int], Parts, dict[str, int]]:
        """The grid, the division into parts of at most `blocks` tiles, and the sizes of the tiles."""
        volumes, channels, voxels = len(x), x.shape[1], math.prod(x.shape[2:])
        if voxels > 1 and x.is_contiguous():
            strides = voxels, 1
            block = min(padded(voxels, 64), TILE)
            width = TILE // block
        else:
            strides = 1, channels
            width = min(padded(channels), MOST_CHANNELS)
            block = TILE // width
        tiles, wide = triton.cdiv(voxels, block), volumes * triton.cdiv(channels, width)
        each = min(max(triton.cdiv(wide * tiles, PROGRAMS), 1), blocks)  # does not depend on the device: nor do sums
        parts = triton.cdiv(tiles, each)
        division = cls(channels, voxels, *strides, parts, each, each * block, volumes * parts // groups)
        return (wide * parts,), division, {"CB": width, "VB": block}


@triton.jit
def find_part(division, CB: tl.constexpr, REVERSED: tl.constexpr = False):
    """The program's volume, part of it, channels [CB], group of statistics, and partial within the group.

    Reversed, the first programs read what the last programs of the kernel before may have left in the L2 cache.
    """
    program = tl.program_id(0)
    if REVERSED:
        program = tl.num_programs(0) - 1 - program
    across = tl.cdiv(division.channels, CB)
    part = program // across
    c = (program - part * across) * CB + tl.arange(0, CB)
    group, volume = part // division.partials, part // division.parts
    return volume.to(tl.int64), part - volume * division.parts, c, group, part - group * division.partials


@triton.jit
def find_tile(place, i, division, VB: tl.constexpr):
    """Offsets of the part's i-th tile [CB, VB], and which of its numbers exist."""
    volume, part, c, _, _ = place
    first = part.to(tl.int64) * division.size + i * VB
    start = volume * division.channels * division.voxels + first * division.voxel
    voxel = tl.arange(0, VB)
    inside = (c < division.channels)[:, None] & (first + voxel < division.voxels)[None, :]
    offsets = c.to(tl.int64)[:, None] * division.channel + voxel.to(tl.int64)[None, :] * division.voxel
    return start + offsets, inside


@triton.jit
def load_tile(values, tile):
    """A tile as float32; 0 for numbers that do not exist."""
    offsets, inside = tile
    return tl.load(values + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_tile(values, tile, numbers):
    """Stores a tile in the dtype of `values`; rounds once."""
    offsets, inside = tile
    tl.store(values + offsets, numbers.to(values.dtype.element_ty), mask=inside)


@triton.jit
def store_partial(partials, slot: tl.constexpr, values, place, division):
    """Stores a value per channel [CB] into partials [groups, 2, channels, partials]."""
    _, _, c, group, index = place
    row = (group.to(tl.int64) * 2 + slot) * division.channels + c
    tl.store(partials + row * division.partials + index, values, mask=c < division.channels)


@triton.jit
def load_pair(pairs, place, division):
    """Two values per channel [CB] float64, from pairs [groups, 2, channels]."""
    _, _, c, group, _ = place
    first = pairs + group.to(tl.int64) * 2 * division.channels + c
    real = c < division.channels
    return tl.load(first, mask=real, other=0.0), tl.load(first + division.channels, mask=real, other=0.0)


@triton.jit
def from_moments(mean, variance, eps):
    """The mean in float32, its rounding error, and 1 / sqrt(variance + eps)."""
    center = mean.to(tl.float32)
    error = (mean - center.to(tl.float64)).to(tl.float32)
    return center, error, 1.0 / tl.sqrt(variance.to(tl.float32) + eps)


@triton.jit
def load_affine(statistics, weight, bias, eps, place, division):
    """Per channel [CB]: `from_moments`; then scale and shift of x minus the mean in float32."""
    mean, variance = load_pair(statistics, place, division)
    center, error, inverse = from_moments(mean, variance, eps)
    c = place[2]
    scale = tl.load(weight + c, mask=c < division.channels, other=0.0) * inverse
    shift = tl.load(bias + c, mask=c < division.channels, other=0.0) - error * scale
    return center, error, inverse, scale, shift


@triton.jit
def before_relu(centered, residual, tile, scale, shift):
    """The argument of the ReLU: the same bits in the forward pass and backward."""
    z = tl.fma(centered, scale[:, None], shift[:, None])
    if residual is not None:
        z += load_tile(residual, tile)
    return z


@triton.jit
def load_gradient(grad, centered, residual, tile, scale, shift, RELU: tl.constexpr):
    """A tile of the gradient before the ReLU."""
    dz = load_tile(grad, tile)
    if RELU:
        dz = tl.where(before_relu(centered, residual, tile, scale, shift) <= 0.0, 0.0, dz)
    return dz


@triton.jit
def statistics_kernel(x, partials, division, CB: tl.constexpr, VB: tl.constexpr):
    """Stores mean and sum of squared deviations of each channel in the program's part.

    The numbers are shifted by the mean of the first tile. At most `BLOCKS` tiles follow, so whatever the numbers are,
    the subtraction in the last lines loses no more than a factor of about `BLOCKS` in precision.
    """
    place = find_part(division, CB)
    tile = find_tile(place, 0, division, VB)
    volume, part, c, _, _ = place
    first = part.to(tl.int64) * division.size
    start = volume * division.channels * division.voxels + first * division.voxel
    shift = tl.load(x + start + c.to(tl.int64) * division.channel, mask=c < division.channels, other=0.0)
    shift = shift.to(tl.float32)  # of one voxel, so that a constant channel has a variance of exactly 0
    apart = tl.where(tile[1], load_tile(x, tile) - shift[:, None], 0.0)
    shift += tl.sum(apart, 1) / tl.minimum(division.voxels - first, VB).to(tl.float32)
    total, squares = no_sums(2, (CB, VB))
    for i in range(division.blocks):
        tile = find_tile(place, i, division, VB)
        apart = tl.where(tile[1], load_tile(x, tile) - shift[:, None], 0.0)
        total += apart
        squares += apart * apart
    total, squares = tl.sum(total, 1).to(tl.float64), tl.sum(squares, 1).to(tl.float64)
    mean = total / tl.minimum(division.voxels - first, division.size).to(tl.float64)
    squares -= total * mean
    store_partial(partials, 0, shift.to(tl.float64) + mean, place, division)
    store_partial(partials, 1, tl.where(squares < 0.0, 0.0, squares), place, division)


@triton.jit
def find_slot(partials, division):
    """For one program per group and channel: index in [groups, 2, channels] and partials, each of the first value."""
    program = tl.program_id(0).to(tl.int64)
    slot = program // division.channels * division.channels + program
    return slot, partials + slot * division.partials


@triton.jit
def combine_kernel(partials, statistics, volumes, division, BLOCK: tl.constexpr):
    """Mean and variance of a group of `volumes` volumes from those of its parts, in float64 (Chan et al. 1983)."""
    slot, means = find_slot(partials, division)
    deviations = means + tl.cast(division.channels, tl.int64) * division.partials
    shift = tl.load(means)
    zeros = tl.zeros((BLOCK,), tl.float64)
    total, between, within = zeros, zeros, zeros
    for first in range(0, division.partials, BLOCK):
        i = first + tl.arange(0, BLOCK)
        real = i < division.partials
        before = (i % division.parts).to(tl.int64) * division.size
        count = tl.minimum(division.voxels - before, division.size).to(tl.float64)
        apart = tl.load(means + i, mask=real, other=0.0) - shift
        total += tl.where(real, count * apart, 0.0)
        between += tl.where(real, count * apart * apart, 0.0)
        within += tl.load(deviations + i, mask=real, other=0.0)
    count = tl.cast(division.voxels, tl.float64) * volumes
    mean = tl.sum(total) / count
    variance = (tl.sum(within) + (tl.sum(between) - tl.sum(total) * mean)) / count
    tl.store(statistics + slot, shift + mean)
    tl.store(statistics + slot + division.channels, tl.where(variance < 0.0, 0.0, variance))


@triton.jit
def apply_kernel(
    x, statistics, weight, bias, eps, residual, skip, y, division, RELU: tl.constexpr, CB: tl.constexpr,
    VB: tl.constexpr,
):  # fmt: skip
    place = find_part(division, CB, REVERSED=True)
    center, _, _, scale, shift = load_affine(statistics, weight, bias, eps, place, division)
    for i in range(division.blocks):
        tile = find_tile(place, i, division, VB)
        z = before_relu(load_tile(x, tile) - center[:, None], residual, tile, scale, shift)
        if RELU:
            z = tl.where(z <= 0.0, 0.0, z)  # unlike the maximum, keeps a NaN
        if skip is not None:
            z += load_tile(skip, tile)
        store_tile(y, tile, z)


@triton.jit
def backward_sums_kernel(
    grad, x, statistics, weight, bias, eps, residual, partials, division, RELU: tl.constexpr, CB: tl.constexpr,
    VB: tl.constexpr,
):  # fmt: skip
    place = find_part(division, CB)
    center, _, _, scale, shift = load_affine(statistics, weight, bias, eps, place, division)
    total, products = no_sums(2, (CB, VB))
    for i in range(division.blocks):
        tile = find_tile(place, i, division, VB)
        centered = load_tile(x, tile) - center[:, None]
        dz = load_gradient(grad, centered, residual, tile, scale, shift, RELU)
        total += dz
        products += dz * centered
    store_partial(partials, 0, tl.sum(total, 1), place, division)
    store_partial(partials, 1, tl.sum(products, 1), place, division)


@triton.jit
def combine_sums_kernel(partials, statistics, eps, sums, division, BLOCK: tl.constexpr):
    """Adds up the parts, in float64: sums of dz and of dz · (x - center), and from these of dz · normalised x."""
    slot, totals = find_slot(partials, division)
    others = totals + tl.cast(division.channels, tl.int64) * division.partials
    total, products = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for first in range(0, division.partials, BLOCK):
        i = first + tl.arange(0, BLOCK)
        real = i < division.partials
        total += tl.load(totals + i, mask=real, other=0.0).to(tl.float64)
        products += tl.load(others + i, mask=real, other=0.0).to(tl.float64)
    mean, variance = tl.load(statistics + slot), tl.load(statistics + slot + division.channels)
    _, error, inverse = from_moments(mean, variance, eps)
    tl.store(sums + slot, tl.sum(total))
    tl.store(sums + slot + division.channels, (tl.sum(products) - error * tl.sum(total)) * inverse)


@triton.jit
def backward_kernel(
    grad, x, statistics, weight, bias, eps, residual, means, grad_x, grad_residual, division, RELU: tl.constexpr,
    CB: tl.constexpr, VB: tl.constexpr,
):  # fmt: skip
    """scale (dz - mean dz - normalised x · mean (dz · normalised x)), as scale dz + slope (x - mean) + rest."""
    place = find_part(division, CB, REVERSED=True)
    center, error, inverse, scale, shift = load_affine(statistics, weight, bias, eps, place, division)
    mean, product = load_pair(means, place, division)
    slope = -scale * inverse * product.to(tl.float32)
    rest = -scale * mean.to(tl.float32) - slope * error
    for i in range(division.blocks):
        tile = find_tile(place, i, division, VB)
        centered = load_tile(x, tile) - center[:, None]
        dz = load_gradient(grad, centered, residual, tile, scale, shift, RELU)
        if grad_residual is not None:
            store_tile(grad_residual, tile, dz)
        store_tile(grad_x, tile, scale[:, None] * dz + (slope[:, None] * centered + rest[:, None]))


def norm_statistics(x: Tensor, per_volume: bool) -> Tensor:
    """`sslfast::norm_statistics`."""
    groups = len(x) if per_volume else 1
    if x.numel() == 0:
        return x.new_zeros((groups, 2, x.shape[1]), dtype=torch.float64)
    grid, division, sizes = Parts.of(x, groups, BLOCKS)
    partials = x.new_empty((groups, 2, division.channels, division.partials), dtype=torch.float64)
    statistics = x.new_empty((groups, 2, division.channels), dtype=torch.float64)
    with on_device(x):
        statistics_kernel[grid](x, partials, division, **sizes)
        combine_kernel[(groups * division.channels,)](partials, statistics, len(x) // groups, division, BLOCK=PARTIALS)
    return statistics


def norm_apply(
    x: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor, eps: float, relu: bool, residual: Tensor | None,
    skip: Tensor | None, y: Tensor,
) -> None:  # fmt: skip
    """`sslfast::norm_apply`."""
    _write(apply_kernel, x, len(statistics), relu, x, statistics, weight, bias, eps, residual, skip, y)


def norm_backward_sums(
    grad: Tensor, x: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor, eps: float, relu: bool,
    residual: Tensor | None,
) -> Tensor:  # fmt: skip
    """`sslfast::norm_backward_sums`."""
    groups, _, channels = statistics.shape
    if x.numel() == 0:
        return x.new_zeros((groups, 2, channels), dtype=torch.float64)
    grid, division, sizes = Parts.of(x, groups, BLOCKS)
    partials = x.new_empty((groups, 2, channels, division.partials), dtype=torch.float32)
    sums = x.new_empty((groups, 2, channels), dtype=torch.float64)
    with on_device(x):
        backward_sums_kernel[grid](
            grad, x, statistics, weight, bias, eps, residual, partials, division, RELU=relu, **sizes
        )
        combine_sums_kernel[(groups * channels,)](partials, statistics, eps, sums, division, BLOCK=PARTIALS)
    return sums


def norm_backward(
    grad: Tensor, x: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor, eps: float, relu: bool,
    residual: Tensor | None, means: Tensor, grad_x: Tensor, grad_residual: Tensor | None,
) -> None:  # fmt: skip
    """`sslfast::norm_backward`."""
    arguments = grad, x, statistics, weight, bias, eps, residual, means, grad_x, grad_residual
    _write(backward_kernel, x, len(statistics), relu, *arguments)


def _write(kernel: Any, x: Tensor, groups: int, relu: bool, *arguments: Any) -> None:
    """Runs a kernel that writes tensors like `x`."""
    if x.numel() == 0:
        return
    grid, division, sizes = Parts.of(x, groups, BLOCKS_TO_WRITE)
    with on_device(x):
        kernel[grid](*arguments, division, RELU=relu, **sizes)
