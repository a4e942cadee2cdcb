"""`sample_voxels` and `gather_voxels` on the GPU.

Of n candidates the k with the smallest priorities are wanted: a priority above (k + 8 sqrt k + 16) / n 2^32 is not among them
(8 standard deviations: once in 10^15 draws one voxel too few would be found), so only those below are kept, and sorted.
Bytes a voxel: 2, the state read twice.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sslfast.kernels.voxels import CLASS, RELIABLE, Grid, VoxelMap, on_device, padded

NEVER = 2**62


@triton.jit
def voxel_priority(voxel, seed, step, stream):
    """First word of Philox4x32-10 (Salmon et al., SC 2011) for counter (voxel: 64 bits, step, stream) and a 64-bit key."""
    x0 = voxel.to(tl.uint32)
    x1 = (voxel >> 32).to(tl.uint32)
    x2 = tl.zeros_like(x0) + tl.cast(step, tl.uint32)
    x3 = tl.zeros_like(x0) + tl.cast(stream, tl.uint32)
    key0 = tl.cast(seed, tl.uint32)
    key1 = tl.cast(tl.cast(seed, tl.int64) >> 32, tl.uint32)
    factor0 = tl.full((), 0xD2511F53, tl.uint32)
    factor1 = tl.full((), 0xCD9E8D57, tl.uint32)
    for _ in tl.static_range(10):
        high0 = tl.umulhi(x0, tl.zeros_like(x0) + factor0)
        low0 = x0 * factor0
        high1 = tl.umulhi(x2, tl.zeros_like(x2) + factor1)
        low1 = x2 * factor1
        x0 = high1 ^ x1 ^ key0
        x1 = low1
        x2 = high0 ^ x3 ^ key1
        x3 = low0
        key0 += tl.full((), 0x9E3779B9, tl.uint32)
        key1 += tl.full((), 0xBB67AE85, tl.uint32)
    return x0


@triton.jit
def count_kernel(state, counts, voxels, blocks, BLOCK: tl.constexpr):
    """How many voxels have each of the 256 bytes."""
    program = tl.program_id(0).to(tl.int64)
    bins = tl.arange(0, 256)
    total = tl.zeros((256,), tl.int32)
    for i in range(blocks):
        place = (program * blocks + i) * BLOCK + tl.arange(0, BLOCK)
        inside = place < voxels
        s = tl.load(state + place, mask=inside, other=0).to(tl.int32)
        total += tl.histogram(s, 256) - tl.where(bins == 0, tl.sum((~inside).to(tl.int32)), 0)
    tl.atomic_add(counts + bins, total.to(tl.int64), mask=total > 0)


@triton.jit
def bounds_kernel(bytes_found, quotas, bounds, counts, NEGATIVES: tl.constexpr):
    """A program for each class: how many are drawn, and the priority below which they surely are."""
    c = tl.program_id(0)
    s = tl.arange(0, 256)
    number = tl.load(bytes_found + s)
    if NEGATIVES:
        candidate = ((s & RELIABLE) != 0) & ((s & CLASS) != c)
    else:
        candidate = ((s & RELIABLE) == 0) & ((s & CLASS) == c)
    candidates = tl.sum(tl.where(candidate, number, 0))
    quota = tl.load(quotas + c)
    expected = quota.to(tl.float64) + 8 * tl.sqrt(quota.to(tl.float64)) + 16
    share = tl.minimum(expected / tl.maximum(candidates, 1).to(tl.float64), 1.0)
    drawn = tl.minimum(quota, candidates)
    tl.store(counts + c, drawn)
    tl.store(bounds + c, tl.where(drawn > 0, (share * 4294967296.0).to(tl.int64), 0))


@triton.jit(do_not_specialize=["seed", "step", "first"])
def collect_kernel(
    state, bounds, found, priorities, places, seed, step, first, voxels, blocks, capacity,
    BLOCK: tl.constexpr, C: tl.constexpr, NEGATIVES: tl.constexpr,
):  # fmt: skip
    """The candidates below their class's bound, in any order."""
    program = tl.program_id(0).to(tl.int64)
    for i in range(blocks):
        place = (program * blocks + i) * BLOCK + tl.arange(0, BLOCK)
        s = tl.load(state + place, mask=place < voxels, other=0).to(tl.int32)
        reliable = (s & RELIABLE) != 0
        for c in range(C):
            if NEGATIVES:
                candidate = reliable & ((s & CLASS) != c)
            else:
                candidate = ~reliable & ((s & CLASS) == c) & (place < voxels)
            bound = tl.load(bounds + c)
            if (tl.sum(candidate.to(tl.int32)) > 0) & (bound > 0):
                priority = voxel_priority(place + first, seed, step, 2 * c + NEGATIVES).to(tl.int64)
                kept = candidate & (priority < bound)
                number = tl.sum(kept.to(tl.int32))
                if number > 0:
                    slot = tl.atomic_add(found + c, number) + tl.cumsum(kept.to(tl.int32), 0) - 1
                    room = kept & (slot < capacity)
                    tl.store(priorities + c * capacity + slot, priority, mask=room)
                    tl.store(places + c * capacity + slot, place, mask=room)


@triton.jit
def gather_kernel(
    f, f_volume, f_channel, f_voxel, indices, rows, voxels, count, BLOCK: tl.constexpr, K: tl.constexpr, KB: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, KB)
    index = tl.load(indices + row, mask=row < count, other=-1)
    used = (index >= 0)[:, None] & (k < K)[None, :]
    places = (index // voxels * f_volume + index % voxels * f_voxel)[:, None] + k.to(tl.int64)[None, :] * f_channel
    values = tl.load(f + places, mask=used, other=0.0).to(tl.float32)
    tl.store(rows + row[:, None] * K + k[None, :], values, mask=(row < count)[:, None] & (k < K)[None, :])


@triton.jit
def scatter_kernel(
    rows, indices, order, f, f_volume, f_channel, f_voxel, voxels, count, K: tl.constexpr, KB: tl.constexpr
):  # fmt: skip
    """A program for each row in the voxels' order: the first row of a voxel adds all of them to what is there and writes once."""
    place = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, KB)
    index = tl.load(indices + place)
    before = tl.load(indices + place - 1, mask=place > 0, other=-1)
    if (index >= 0) & (index != before):
        target = f + index // voxels * f_volume + index % voxels * f_voxel + k.to(tl.int64) * f_channel
        total = tl.load(target, mask=k < K, other=0.0).to(tl.float32)
        here = index
        while here == index:
            row = tl.load(order + place)
            total += tl.load(rows + row * K + k, mask=k < K, other=0.0)
            place += 1
            here = tl.load(indices + place, mask=place < count, other=-1)
        tl.store(target, total.to(f.dtype.element_ty), mask=k < K)


def sample_voxels(
    state: Tensor, quotas: list[int], seed: int, step: int, negatives: bool, first: int = 0
) -> tuple[Tensor, Tensor]:
    """`sslfast::sample_voxels`."""
    classes, most = len(quotas), max(quotas)
    counts = state.new_zeros(classes, dtype=torch.int64)
    if state.numel() == 0 or most == 0:
        return state.new_full((classes, most), -1, dtype=torch.int64), counts
    state = state.contiguous()
    capacity = 2 * math.ceil(most + 8 * math.sqrt(most) + 16)
    # filled, not copied from the host, so that nothing waits and a graph can be captured
    wanted = torch.cat([state.new_full((1,), quota, dtype=torch.int64) for quota in quotas])
    bytes_found = state.new_zeros(256, dtype=torch.int64)
    bounds = torch.empty_like(counts)
    found = state.new_zeros(classes, dtype=torch.int32)
    priorities = state.new_full((classes, capacity), NEVER, dtype=torch.int64)
    places = state.new_full((classes, capacity), NEVER, dtype=torch.int64)
    grid = Grid.over(state.view(1, 1, -1), block=4096)
    with on_device(state):
        count_kernel[(grid.programs,)](state, bytes_found, grid.voxels, grid.blocks, BLOCK=grid.block)
        bounds_kernel[(classes,)](bytes_found, wanted, bounds, counts, NEGATIVES=negatives)
        grid = Grid.over(state.view(1, 1, -1), block=1024, programs=4096)
        collect_kernel[(grid.programs,)](
            state, bounds, found, priorities, places, seed, step, first, grid.voxels, grid.blocks, capacity,
            BLOCK=grid.block, C=classes, NEGATIVES=negatives,
        )  # fmt: skip
    places, order = places.sort(1)
    order = priorities.gather(1, order).sort(dim=1, stable=True).indices
    unused = torch.arange(most, device=state.device) >= counts.unsqueeze(1)
    drawn = places.gather(1, order)[:, :most].masked_fill(unused, NEVER).sort(1).values
    return drawn.masked_fill(unused, -1), counts


def gather_voxels(features: Tensor, indices: Tensor) -> Tensor:
    """`sslfast::gather_voxels`."""
    k = features.shape[1]
    rows = features.new_empty((*indices.shape, k), dtype=torch.float32)
    count, voxels = indices.numel(), max(features[:1, 0].numel(), 1)
    if count:
        with on_device(features):
            gather_kernel[(triton.cdiv(count, 16),)](
                *VoxelMap.of(features).arguments, indices.contiguous(), rows, voxels, count, BLOCK=16, K=k, KB=padded(k)
            )
    return rows


def gather_voxels_backward(grad_rows: Tensor, indices: Tensor, grad: Tensor) -> None:
    """`sslfast::gather_voxels_backward`."""
    k = grad.shape[1]
    voxels, order = indices.flatten().sort(stable=True)
    if len(voxels) == 0 or grad.numel() == 0:
        return
    with on_device(grad):
        scatter_kernel[(len(voxels),)](
            grad_rows.contiguous(), voxels, order, *VoxelMap.of(grad).arguments, grad[0, 0].numel(), len(voxels),
            K=k, KB=padded(k),
        )  # fmt: skip
