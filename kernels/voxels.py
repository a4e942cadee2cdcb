"""What the Triton kernels share: how a program finds its voxels, and the mathematics of a voxel (csrc/voxel_math.h)."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # voxels that a program takes at a time
PROGRAMS = 1024  # at most; each takes a fixed share of the blocks, so that sums do not depend on the device

CLASS = tl.constexpr(31)  # the byte map, see sslfast/ops/state.py
RELIABLE = tl.constexpr(32)
SURE_A = tl.constexpr(64)
SURE_B = tl.constexpr(128)


class VoxelMap(NamedTuple):
    """A tensor [volumes, channels, *spatial] as the kernels see it: one stride for all spatial dimensions."""

    values: Tensor  # kept alive: a copy where the spatial dimensions have no common stride
    volume_stride: int
    channel_stride: int
    voxel_stride: int

    @classmethod
    def of(cls, values: Tensor) -> VoxelMap:
        """The map of `values`."""
        sizes = [(size, stride) for size, stride in zip(values.shape[2:], values.stride()[2:], strict=True) if size > 1]
        inner = [outer[1] == size * stride for outer, (size, stride) in zip(sizes, sizes[1:], strict=False)]
        if not all(inner):
            return cls.of(values.contiguous())
        return cls(values, values.stride(0), values.stride(1), sizes[-1][1] if sizes else 1)

    @property
    def arguments(self) -> tuple[Tensor, int, int, int]:
        """As a kernel takes them."""
        return self.values, self.volume_stride, self.channel_stride, self.voxel_stride


class Grid(NamedTuple):
    """How many programs share the voxels, and the blocks of each."""

    programs: int
    blocks: int  # a program
    volumes: int
    voxels: int  # of a volume
    block: int

    @classmethod
    def over(cls, values: Tensor, block: int = BLOCK, programs: int = PROGRAMS) -> Grid:
        """The voxels of a map [volumes, channels, *spatial]."""
        voxels = values[0, 0].numel() if len(values) else 0
        blocks = len(values) * triton.cdiv(voxels, block)
        share = max(triton.cdiv(blocks, programs), 1)
        return cls(max(triton.cdiv(blocks, share), 1), share, len(values), voxels, block)

    @property
    def constants(self) -> dict[str, int]:
        """The kernel's keyword arguments."""
        return {"volumes": self.volumes, "voxels": self.voxels, "blocks": self.blocks, "BLOCK": self.block}


def padded(count: int, least: int = 1) -> int:
    """The next power of two: Triton's tiles have no other sizes."""
    return max(int(triton.next_power_of_2(count)), least)


def over_logits(logits: Tensor) -> tuple[Grid, dict[str, int]]:
    """The programs that share the voxels of logits [volumes, C, *spatial], and their kernel's keyword arguments."""
    width = padded(logits.shape[1])
    grid = Grid.over(logits, block=max(1024 // width, 64))
    return grid, {**grid.constants, "C": logits.shape[1], "CB": width}


def on_device(values: Tensor) -> Any:
    """A context in which kernels run on the device of `values`."""
    return torch.cuda.device(values.device) if values.is_cuda else nullcontext()


@triton.jit
def find_block(index, volumes, voxels, BLOCK: tl.constexpr):
    """The index-th block of all volumes' voxels: its volume, its voxels within that, and which of them exist."""
    a_volume = tl.cast(tl.cdiv(voxels, BLOCK), tl.int64)  # a number of 1 arrives as a constant, which has no .to
    volume = index // a_volume
    voxel = (index % a_volume) * BLOCK + tl.arange(0, BLOCK)
    return volume, voxel, (voxel < voxels) & (volume < volumes)


@triton.jit
def load_map(
    pointer, volume_stride, channel_stride, voxel_stride, volume, voxel, inside, C: tl.constexpr, CB: tl.constexpr
):
    """A tile [CB, BLOCK] of floats; 0 beyond the channels and the voxels."""
    c = tl.arange(0, CB).to(tl.int64)
    places = volume * volume_stride + c[:, None] * channel_stride + voxel[None, :] * voxel_stride
    return tl.load(pointer + places, mask=(c < C)[:, None] & inside[None, :], other=0.0).to(tl.float32)


@triton.jit
def store_map(
    pointer,
    volume_stride,
    channel_stride,
    voxel_stride,
    volume,
    voxel,
    inside,
    values,
    C: tl.constexpr,
    CB: tl.constexpr,
):
    """The reverse; rounds once."""
    c = tl.arange(0, CB).to(tl.int64)
    places = volume * volume_stride + c[:, None] * channel_stride + voxel[None, :] * voxel_stride
    tl.store(pointer + places, values.to(pointer.dtype.element_ty), mask=(c < C)[:, None] & inside[None, :])


@triton.jit
def add_column(parts, column, programs, width, PB: tl.constexpr):
    """The programs' sums of one column, in a fixed order."""
    program = tl.arange(0, PB)
    return tl.sum(tl.load(parts + program.to(tl.int64) * width + column, mask=program < programs, other=0.0))


@triton.jit
def exp_shifted(z, C: tl.constexpr, CB: tl.constexpr):
    """e = exp(z - max z) [CB, BLOCK], their sum and max z [BLOCK]; NaN sums for NaN or infinite logits."""
    real = (tl.arange(0, CB) < C)[:, None]
    highest = tl.max(tl.where(real, z, float("-inf")), 0)
    e = tl.where(real, tl.exp(z - highest[None, :]), 0.0)
    return e, tl.sum(e, 0) + tl.sum(z * 0.0, 0), highest


@triton.jit
def predict(z, C: tl.constexpr, CB: tl.constexpr):
    """Softmax of a tile of logits and its logarithm."""
    e, total, highest = exp_shifted(z, C, CB)
    return e / total[None, :], z - highest[None, :] - tl.log(total)[None, :]


@triton.jit
def best_class(z, C: tl.constexpr, CB: tl.constexpr):
    """argmax z, the lowest class where several share it."""
    real = (tl.arange(0, CB) < C)[:, None]
    return tl.argmax(tl.where(real, z, float("-inf")), 0, tie_break_left=True).to(tl.int32)


@triton.jit
def describe(z, threshold, C: tl.constexpr, CB: tl.constexpr):
    """Of a tile of logits: probabilities, log of the sum, max, and confident foreground class."""
    e, total, highest = exp_shifted(z, C, CB)
    confident = tl.where(1.0 / total >= threshold, best_class(z, C, CB), 0)
    return e / total[None, :], tl.log(total), highest, confident


@triton.jit
def entropy(z, C: tl.constexpr, CB: tl.constexpr):
    """-sum p log p in nats, never below 0."""
    e, total, highest = exp_shifted(z, C, CB)
    weighted = tl.sum(e * (z - highest[None, :]), 0)
    h = tl.log(total) - weighted / total
    return tl.where(h <= 0, h * 0.0, h)
