"""`sample_voxels`: a uniform sample of voxels without replacement, the same on every backend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from sslfast.ops.backend import ops_for, runs_fused
from sslfast.ops.buffers import zeros_like
from sslfast.ops.check import (
    check_choice,
    check_device,
    check_map,
    check_num_classes,
    check_range,
    check_reducer,
    check_step,
    check_tensor,
    check_values,
    described,
    scalar,
    to_compute_dtype,
)
from sslfast.ops.flags import is_reliable, pseudo_label
from sslfast.ops.philox import voxel_priority
from sslfast.ops.reduce import SINGLE_PROCESS, Reducer
from sslfast.ops.registry import define, no_result
from sslfast.renamed import old_arguments

Role = Literal["anchors", "negatives"]


class VoxelSample(NamedTuple):
    """Sampled voxels of each class, at a fixed capacity."""

    indices: Tensor  # [C, max quota] int64, linear into the flags, ascending; -1 where unused
    counts: Tensor  # [C] int64, voxels sampled


@old_arguments(ranks="reducer", state="flags")
def sample_voxels(
    flags: Tensor,
    quotas: Sequence[int],
    seed: int,
    step: int | Tensor,
    *,
    role: Role = "anchors",
    reducer: Reducer = SINGLE_PROCESS,
) -> VoxelSample:
    """Draws at most `quotas[c]` voxels for each class c, uniformly and without replacement.

    Anchors of class c are unreliable voxels of class c; its negatives are reliable voxels of any other class. The
    priority of voxel v is the first word of Philox4x32-10 with key `seed` and counter (v, step, stream), stream = 2c
    for anchors and 2c + 1 for negatives. The candidates with the smallest (priority, v) are drawn. The sample depends
    only on (seed, step, flags), not on device, number of threads or backend.

    Args:
        flags: [U, *spatial] uint8, from `reliability`. A voxel of a class from C on is another class to all.
        quotas: C numbers, each 0 to 2^31 - 1.
        seed: 64 bits.
        step: 32 bits; each step has its own draw. A tensor [] int64 on the device can change between the replays of a
            CUDA graph.
        role: which voxels are drawn.
        reducer: process group from whose voxels the sample is drawn; v counts them in the order of the ranks, and each
            rank gets its own sampled voxels. If ranks hold different numbers of voxels, the sample is uniform but
            differs from that of one process.

    Raises:
        ValueError, TypeError: wrong dtype or range.
        RuntimeError: a CUDA graph is being captured and step is a number; every replay would draw the same sample.
    """
    check_tensor("flags", flags, (torch.uint8,))
    if not isinstance(quotas, (list, tuple)):
        raise TypeError(f"quotas is {described(quotas)}; it must be a list of numbers, one a class")
    check_num_classes("the length of quotas", len(quotas))
    for quota in quotas:
        check_range("a number of quotas", quota, 0, 2**31 - 1, whole=True)
    check_range("seed", seed, -(2**63), 2**64 - 1, whole=True)
    check_step(step, flags.device)
    check_choice("role", role, get_args(Role))
    check_reducer(reducer)
    first = reducer.rank * flags.numel()
    if runs_fused(flags):
        number = scalar(step, torch.int64, flags.device)
        result = ops_for(flags).sample_voxels(flags, list(quotas), signed(seed), number, role == "negatives", first)
    else:
        result = sample_voxels_ref(flags, quotas, seed, step, role, first)
    return (
        VoxelSample(*result)
        if reducer.size == 1
        else _sample_of_rank(VoxelSample(*result), quotas, seed, step, role, first, reducer)
    )


def _sample_of_rank(
    sample: VoxelSample, quotas: Sequence[int], seed: int, step: int | Tensor, role: Role, first: int, reducer: Reducer
) -> VoxelSample:
    """The candidates of this rank that are in the sample of all ranks."""
    classes, capacity = sample.indices.shape
    streams = range(int(role == "negatives"), 2 * classes, 2)
    priorities = torch.stack(
        [
            voxel_priority(voxels + first, seed, step, stream)
            for voxels, stream in zip(sample.indices, streams, strict=True)
        ]
    )
    priorities = torch.where(sample.indices >= 0, priorities, 2**33)  # after every candidate
    everyone = reducer.gather(priorities).permute(1, 0, 2).flatten(1)  # [C, size * capacity], in the order of voxels
    position = everyone.sort(dim=1, stable=True).indices.argsort(1)
    quota = torch.stack([everyone.new_full((1,), q) for q in quotas])  # [C, 1], without a copy from the host
    chosen = (position < quota) & (everyone < 2**33)
    mine = chosen.view(classes, reducer.size, capacity)[:, reducer.rank]
    counts = mine.sum(1)
    nowhere = torch.iinfo(torch.int64).max
    indices = torch.where(mine, sample.indices, nowhere).sort(1).values
    return VoxelSample(torch.where(indices == nowhere, -1, indices), counts)


def gather_over_ranks(rows: Tensor, counts: Tensor, reducer: Reducer) -> tuple[Tensor, Tensor]:
    """The rows [C, Q, K] of all ranks' samples in order, and their counts; `rows` holds `counts` [C] of this rank."""
    if reducer.size == 1:
        return rows, counts
    everyone = reducer.gather(counts)  # [ranks, C]
    before = everyone[: reducer.rank].sum(0)
    row = torch.arange(rows.shape[1], device=rows.device)
    position = (row + before.unsqueeze(1)).clamp_max(rows.shape[1] - 1)  # [C, Q]
    used = (row < counts.unsqueeze(1)).unsqueeze(2)
    placed = torch.zeros_like(rows).scatter_add(1, position.unsqueeze(2).expand_as(rows), torch.where(used, rows, 0))
    return reducer.sum(placed), everyone.sum(0)


def signed(seed: int) -> int:
    """The 64 bits of a seed as a signed integer, for an op."""
    return (seed & 2**64 - 1) - (2**64 if seed & 2**63 else 0)


@torch.no_grad()
def sample_voxels_ref(
    flags: Tensor, quotas: Sequence[int], seed: int, step: int | Tensor, role: Role, first: int = 0
) -> VoxelSample:
    """The specification of `sample_voxels` in plain PyTorch."""
    flat = flags.flatten()
    reliable, label = is_reliable(flat), pseudo_label(flat)
    indices = flat.new_full((len(quotas), max(quotas)), -1, dtype=torch.int64)
    counts = flat.new_zeros(len(quotas), dtype=torch.int64)
    for c, quota in enumerate(quotas):
        candidate = ~reliable & (label == c) if role == "anchors" else reliable & (label != c)
        voxels = candidate.nonzero().squeeze(1)  # ascending
        priority = voxel_priority(voxels + first, seed, step, 2 * c + (role == "negatives"))
        drawn = voxels[priority.sort(stable=True).indices[:quota]].sort().values
        indices[c, : len(drawn)] = drawn
        counts[c] = len(drawn)
    return VoxelSample(indices, counts)


def gather_voxels(features: Tensor, indices: Tensor) -> Tensor:
    """The feature vectors of sampled voxels, float32 (float64 for float64 features).

    Args:
        features: [U, K, *spatial].
        indices: [...] int64, linear into [U, *spatial]; -1 gives zeros.

    Returns:
        [..., K].

    Raises:
        ValueError, TypeError: wrong shape, dtype or device; an index out of range. On a GPU such an index gives NaN and
            no gradient instead, because checking would synchronise.
    """
    check_tensor("features", features)
    check_map("features", features)
    check_tensor("indices", indices, (torch.int64,))
    check_device("indices", indices, "features", features)
    check_values("indices", indices, -1, features.shape[0] * math.prod(features.shape[2:]) - 1)
    if not runs_fused(features):
        return gather_voxels_ref(features, indices)
    rows: Tensor = _FusedGather.apply(features, indices)
    return rows


def gather_voxels_ref(features: Tensor, indices: Tensor) -> Tensor:
    """The specification of `gather_voxels` in plain PyTorch."""
    flat = features.flatten(2)  # [U, K, S]
    total = flat.shape[0] * flat.shape[2]
    missing = torch.where(indices == -1, 0, torch.nan).to(to_compute_dtype(features).dtype).unsqueeze(-1)
    if features.numel() == 0:
        return to_compute_dtype(features).sum() + missing.expand(*indices.shape, features.shape[1])
    used = (indices >= 0) & (indices < total)
    safe = torch.where(used, indices, 0)
    vectors = flat[safe // flat.shape[2], :, safe % flat.shape[2]]
    return torch.where(used.unsqueeze(-1), to_compute_dtype(vectors), missing)


define(
    "sample_voxels(Tensor flags, int[] quotas, int seed, Tensor step, bool negatives, int first=0)"
    " -> (Tensor indices, Tensor counts)",
    lambda flags, quotas, *_: (
        flags.new_empty((len(quotas), max(quotas)), dtype=torch.int64),
        flags.new_empty(len(quotas), dtype=torch.int64),
    ),
)
define(
    "gather_voxels(Tensor features, Tensor indices) -> Tensor",
    lambda features, indices: features.new_empty((*indices.shape, features.shape[1]), dtype=torch.float32),
)
define("gather_voxels_backward(Tensor grad_rows, Tensor indices, Tensor(a!) grad) -> ()", no_result)


class _FusedGather(torch.autograd.Function):
    """`gather_voxels` by the kernels, float32."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(features, indices)
        rows: Tensor = ops_for(features).gather_voxels(features, indices)
        return rows

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
        features, indices = ctx.saved_tensors
        grad = zeros_like(features)
        ops_for(features).gather_voxels_backward(grad_rows, indices, grad)
        return grad, None
