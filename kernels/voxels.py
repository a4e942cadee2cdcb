"""Shared parts of the Triton kernels: division of voxels among programs, mathematics of one voxel, and sums.

The mathematics is that of csrc/voxel_math.h.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sslfast.ops import flags
from sslfast.ops.sums import SumsOp

CLASS = tl.constexpr(flags.CLASS)
RELIABLE = tl.constexpr(flags.RELIABLE)

THREADS = tl.constexpr(128)  # threads of a program: Triton's default of 4 warps
TILE = 1024  # numbers in a program's tile [classes, voxels]
PROGRAMS = 1024  # about so many programs; fixed, so that sums do not depend on the device
BLOCKS = 16  # the most blocks that a program adds up in float32; programs are added up in float64


class VoxelMap(NamedTuple):
    """A tensor [volumes, channels, *spatial] for kernels: a pointer, and one stride for all spatial dimensions."""

    pointer: Tensor  # a copy if the spatial dimensions have no common stride
    volume: int  # stride, as are the next two
    channel: int
    voxel: int

    @classmethod
    def of(cls, values: Tensor) -> VoxelMap:
        """The map of `values`."""
        sizes = [(size, stride) for size, stride in zip(values.shape[2:], values.stride()[2:], strict=True) if size > 1]
        inner = [outer[1] == size * stride for outer, (size, stride) in zip(sizes, sizes[1:], strict=False)]
        if not all(inner):
            return cls.of(values.contiguous())
        return cls(values, values.stride(0), values.stride(1), sizes[-1][1] if sizes else 1)


class Division(NamedTuple):
    """How the voxels are divided among programs, for kernels."""

    volumes: int
    voxels: int  # voxels per volume
    blocks: int  # blocks per program


def divide(
    volumes: int, voxels: int, block: int, programs: int = PROGRAMS, blocks: int | None = None
) -> tuple[int, Division]:
    """The number of programs, and the division: about `programs`, or more so that each has at most `blocks` blocks."""
    number = volumes * triton.cdiv(voxels, block)
    each = max(triton.cdiv(number, programs), 1)
    each = each if blocks is None else min(each, blocks)
    return triton.cdiv(number, each), Division(volumes, voxels, each)


def padded(count: int, least: int = 1) -> int:
    """The next power of two, at least `least`: tiles in Triton have no other sizes."""
    return max(int(triton.next_power_of_2(count)), least)


def on_device(values: Tensor) -> Any:
    """A context in which kernels run on the device of `values`."""
    return torch.cuda.device(values.device) if values.is_cuda else nullcontext()


def over_logits(logits: Tensor) -> tuple[tuple[int], Division, dict[str, int]]:
    """The grid for logits [volumes, C, *spatial], the division of the voxels, and the sizes of the tiles."""
    classes = logits.shape[1]
    width = padded(classes)
    block = max(TILE // width, 64)
    programs, division = divide(len(logits), math.prod(logits.shape[2:]), block, blocks=BLOCKS)
    warps = 4 * width * block // TILE  # 8 numbers of a tile per thread, so that the sums fit in registers
    return (programs,), division, {"BLOCK": block, "C": classes, "CB": width, "num_warps": warps}


def voxel_sums(op: SumsOp, kernel: Any, maps: Sequence[Tensor], *arguments: Any) -> Tensor:
    """The sums [n] float64 of an op over the voxels of maps [volumes, C, *spatial], in the order of its slots.

    Args:
        kernel: takes the maps, `arguments`, the partials, the division and the tile's sizes; stores the partials
            of each program.
    """
    like, classes = maps[0], maps[0].shape[1]
    if like.numel() == 0:
        return like.new_zeros(op.scalars + op.rows * classes, dtype=torch.float64)
    grid, division, sizes = over_logits(like)
    partials = like.new_empty((op.scalars + op.rows * sizes["CB"], *grid), dtype=torch.float64)
    with on_device(like):
        kernel[grid](*map(VoxelMap.of, maps), *arguments, partials, division, **sizes)
    sums = like.new_empty(op.scalars + op.rows * classes, dtype=torch.float64)
    add_up(partials, sums, op.scalars, classes)
    return sums


def voxel_gradients(
    kernel: Any, grad_sums: Tensor, maps: Sequence[Tensor], *arguments: Any, to: Sequence[Tensor]
) -> None:
    """Writes the gradients of the first maps into `to`; the kernel takes the arguments in this order."""
    if maps[0].numel() == 0:
        return
    grid, division, sizes = over_logits(maps[0])
    with on_device(maps[0]):
        inputs, outputs = map(VoxelMap.of, maps), map(VoxelMap.of, to)
        kernel[grid](grad_sums.contiguous(), *inputs, *arguments, *outputs, division, **sizes)


def add_up(partials: Tensor, sums: Tensor, plain: int, classes: int = 1) -> None:
    """Adds up the programs' partials [slots, programs] in a fixed order, in float64; removes the padding of classes."""
    rows = max((len(sums) - plain) // classes, 1)
    with on_device(partials):
        width = (len(partials) - plain) // rows
        add_kernel[(len(sums),)](partials, sums, partials.shape[1], plain, classes, width, BLOCK=256)


@triton.jit
def add_kernel(partials, sums, programs, plain, classes, width, BLOCK: tl.constexpr):
    """One program per sum. Rows per class: length `classes` in `sums`, `width` in `partials`; the background is 0."""
    slot = tl.program_id(0).to(tl.int64)
    row = tl.maximum(slot - plain, 0) // classes
    c = tl.where(slot < plain, slot, slot - plain - row * classes)
    source = partials + (tl.where(slot < plain, 0, plain + row * width) + c) * programs
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, programs, BLOCK):
        program = first + tl.arange(0, BLOCK)
        total += tl.load(source + program, mask=program < programs, other=0.0).to(tl.float64)
    value = tl.where((slot < plain) | (c > 0), tl.sum(total), 0.0)
    tl.store(sums + slot, value.to(sums.dtype.element_ty))


@triton.jit
def no_sums(NUMBER: tl.constexpr, SHAPE: tl.constexpr):
    """A tuple of NUMBER tiles of zeros."""
    result = ()
    for _ in tl.static_range(NUMBER):
        result += (tl.zeros(SHAPE, tl.float32),)
    return result


@triton.jit
def add(sums, values):
    """Adds a value to each sum."""
    result = ()
    for i in tl.static_range(len(sums)):
        result += (sums[i] + values[i].to(tl.float32),)
    return result


@triton.jit
def store_partials(partials, sums, rows, CB: tl.constexpr):
    """Stores a program's partials: first of the plain sums [BLOCK], then of the rows per class [CB, BLOCK]."""
    target = partials + tl.program_id(0)
    for i in tl.static_range(len(sums)):
        tl.store(target + i * tl.num_programs(0), tl.sum(sums[i]).to(tl.float64))
    for i in tl.static_range(len(rows)):
        slots = len(sums) + i * CB + tl.arange(0, CB)
        tl.store(target + slots * tl.num_programs(0), tl.sum(rows[i], 1).to(tl.float64))


@triton.jit
def load_grad(grad_sums, scalar):
    """The gradient of a sum that is not per class."""
    return tl.load(grad_sums + scalar).to(tl.float32)


@triton.jit
def load_grad_row(grad_sums, scalars, row, C: tl.constexpr, CB: tl.constexpr):
    """The gradients [CB, 1] of a row per class; rows follow the `scalars` sums. 0 for the background."""
    c = tl.arange(0, CB)
    return tl.load(grad_sums + scalars + row * C + c, mask=(c > 0) & (c < C), other=0.0).to(tl.float32)[:, None]


@triton.jit
def find_block(i, division, BLOCK: tl.constexpr):
    """The program's i-th block: volume, voxels in the volume, which of them exist, and indices in [volumes, voxels]."""
    return _find(i, division, tl.arange(0, BLOCK), BLOCK)


@triton.jit
def find_voxels(i, division, BLOCK: tl.constexpr):
    """`find_block` for a tile of logits, in an order that Triton takes for runs of BLOCK / THREADS voxels.

    A thread then has no longer runs, but all classes (up to 8) of its voxels, and adds them up without other threads.
    """
    RUN: tl.constexpr = BLOCK // THREADS
    k = tl.arange(0, BLOCK)
    if RUN > 1:
        k = k // RUN * RUN + k % RUN
    else:
        k = BLOCK - 1 - k
    return _find(i, division, k, BLOCK)


@triton.jit
def _find(i, division, k, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * division.blocks + i
    a_volume = tl.cast(tl.cdiv(division.voxels, BLOCK), tl.int64)  # 1 arrives as a constant, which has no method .to
    volume = index // a_volume
    voxel = (index % a_volume) * BLOCK + k
    return volume, voxel, (voxel < division.voxels) & (volume < division.volumes), volume * division.voxels + voxel


@triton.jit
def _pointers(map, at, C: tl.constexpr, CB: tl.constexpr):
    volume, voxel, inside, _ = at
    c = tl.arange(0, CB).to(tl.int64)
    offsets = volume * map.volume + c[:, None] * map.channel + voxel[None, :] * map.voxel
    return map.pointer + offsets, (c < C)[:, None] & inside[None, :]


@triton.jit
def load_map(map, at, C: tl.constexpr, CB: tl.constexpr):
    """Loads a tile [CB, BLOCK] as float32; 0 beyond channels and voxels."""
    pointers, real = _pointers(map, at, C, CB)
    return tl.load(pointers, mask=real, other=0.0).to(tl.float32)


@triton.jit
def store_map(map, at, values, C: tl.constexpr, CB: tl.constexpr):
    """Stores a tile [CB, BLOCK] in the map's dtype; rounds once."""
    pointers, real = _pointers(map, at, C, CB)
    tl.store(pointers, values.to(map.pointer.dtype.element_ty), mask=real)


@triton.jit
def load_flags(flags, at):
    """Each voxel's class, whether it is reliable, and the flags themselves."""
    _, _, inside, voxel_index = at
    value = tl.load(flags + voxel_index, mask=inside, other=0).to(tl.int32)
    return value & CLASS, (value & RELIABLE) != 0, value


@triton.jit
def nan_if_out_of_range(loss, value, C: tl.constexpr):
    """The loss of each voxel, NaN where its flags are those of no class."""
    return tl.where(value >= RELIABLE + C, float("nan"), loss)


@triton.jit
def one_hot(label, CB: tl.constexpr):
    """One-hot labels [CB, BLOCK] float32; all 0 for label -1."""
    return tl.where(tl.arange(0, CB)[:, None] == label[None, :], 1.0, 0.0)


@triton.jit
def exp_shifted(z, C: tl.constexpr, CB: tl.constexpr):
    """e = exp(z - max z) [CB, BLOCK], the sum of e [BLOCK] (NaN for NaN or infinite logits), and z - max z."""
    real = (tl.arange(0, CB) < C)[:, None]
    shifted = z - tl.max(tl.where(real, z, float("-inf")), 0)[None, :]
    e = tl.where(real, tl.exp(shifted), 0.0)
    return e, tl.sum(e + z * 0.0, 0), shifted


@triton.jit
def best_class(shifted, C: tl.constexpr, CB: tl.constexpr):
    """argmax z [BLOCK]; the lowest class in a tie."""
    return tl.min(tl.where(shifted == 0.0, tl.arange(0, CB)[:, None], C - 1), 0)


@triton.jit
def predict(z, C: tl.constexpr, CB: tl.constexpr):
    """Softmax of a tile of logits, its logarithm, and the argmax."""
    e, total, shifted = exp_shifted(z, C, CB)
    return e / total[None, :], shifted - tl.log(total)[None, :], best_class(shifted, C, CB)


@triton.jit
def through_softmax(p, grad):
    """The gradient of logits z, from that of p = softmax(z)."""
    return p * (grad - tl.sum(p * grad, 0)[None, :])


@triton.jit
def inverse_length(values, axis: tl.constexpr):
    """1 / |v| along an axis of a tile, 0 where |v| < 1e-12."""
    length = tl.sqrt(tl.sum(values * values, axis))
    return tl.where(length < 1e-12, 0.0, 1.0 / tl.where(length < 1e-12, 1.0, length))


@triton.jit
def histogram(values, wanted, BINS: tl.constexpr):
    """Counts of 0, 1, .., BINS - 1 among the wanted values."""
    # others are counted in the first bin and subtracted: not every version of Triton has a mask for tl.histogram
    others = tl.where(tl.arange(0, BINS) == 0, tl.sum((~wanted).to(tl.int32)), 0)
    return tl.histogram(tl.where(wanted, values, 0), BINS) - others
