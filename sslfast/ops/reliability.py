"""`reliability`: the exact entropy percentile of the unlabelled volumes, and the flags."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sslfast.ops.backend import ops_for, runs_fused
from sslfast.ops.check import (
    FLOATS,
    INTEGERS,
    check_classes,
    check_map,
    check_range,
    check_reducer,
    check_scalar,
    scalar,
    to_compute_dtype,
)
from sslfast.ops.flags import RELIABLE
from sslfast.ops.linear_logits import Logits, for_kernels, materialize, unpack_logits
from sslfast.ops.reduce import SINGLE_PROCESS, Reducer, exact_percentiles
from sslfast.ops.registry import define
from sslfast.renamed import old_arguments


class Reliability(NamedTuple):
    """Entropy threshold and flags of a teacher."""

    threshold: Tensor  # [] entropy at the percentile, nats
    flags: Tensor  # [U, *spatial] uint8, see sslfast.ops.flags


@old_arguments(ranks="reducer")
@torch.no_grad()
def reliability(logits: Logits, percentile: float | Tensor, *, reducer: Reducer = SINGLE_PROCESS) -> Reliability:
    """Splits the unlabelled voxels into reliable and unreliable ones (arXiv 2311.12617, its entropy masks).

    A voxel is reliable if its entropy H = -sum p log p is strictly below the `percentile` of all voxels' entropies in
    the batch. The percentile is `numpy.percentile` with linear interpolation and the rank in float64. NaN or infinite
    logits make the threshold NaN.

    Args:
        logits: [U, C, *spatial], 2 <= C <= 32. No gradient.
        percentile: 0..100, a number or a tensor []. One out of range that is on a GPU makes the threshold NaN, because
            checking would synchronise.
        reducer: process group over whose voxels the percentile is taken.

    Returns:
        The threshold, float32 (float64 for float64 logits; 0 if there is no voxel), and the flags.
    """
    check_map("logits", logits)
    check_classes("logits", logits)
    check_reducer(reducer)
    if isinstance(percentile, Tensor):
        check_scalar("percentile", percentile, logits.device, (*FLOATS, *INTEGERS))
        if logits.device.type == "cpu" and not torch.compiler.is_compiling():
            check_range("percentile", percentile.item(), 0, 100)
    else:
        check_range("percentile", percentile, 0, 100)
    fused = runs_fused(logits)
    logits = for_kernels(logits.detach()) if fused else materialize(logits.detach())
    wanted = scalar(percentile, torch.float64, logits.device)
    given = None
    if reducer.size > 1:
        entropies = (
            ops_for(logits).voxel_entropy(*unpack_logits(logits)) if fused else voxel_entropy_ref(materialize(logits))
        )
        given = exact_percentiles(entropies.flatten(), wanted, reducer)
    if fused:
        return Reliability(*ops_for(logits).reliability(*unpack_logits(logits), wanted, given))
    return reliability_ref(materialize(logits), wanted, given)


@torch.no_grad()
def reliability_ref(logits: Tensor, percentile: Tensor, given: Tensor | None = None) -> Reliability:
    """The specification of `reliability` in plain PyTorch."""
    entropies = voxel_entropy_ref(logits)
    threshold = exact_percentile(entropies.flatten(), float(percentile)) if given is None else given
    return Reliability(threshold, (logits.argmax(1) + RELIABLE * (entropies < threshold)).to(torch.uint8))


def voxel_entropy_ref(logits: Tensor) -> Tensor:
    """Entropy of each voxel [U, *spatial].

    On some CPUs torch computes the last voxels of a tensor, which fill no vector, with other roundings than the rest:
    equal logits may have entropies that differ in the last bit.
    """
    # shifted, so that large logits cost no precision
    shifted = to_compute_dtype(logits) - to_compute_dtype(logits).amax(1, keepdim=True)
    exp = shifted.exp()
    total = exp.sum(1)
    return (total.log() - (exp * shifted).sum(1) / total).clamp_min(0)  # rounding cannot make it negative


def exact_percentile(values: Tensor, percentile: float) -> Tensor:
    """`numpy.percentile(values, percentile)` with linear interpolation, at any size, as a tensor [] of the same dtype.

    Rank and interpolation are computed in float64. NaN if any value is or the percentile is out of range; 0 if there
    are no values.
    """
    count = values.numel()
    if count == 0:
        return values.new_zeros(())
    if not 0 <= percentile <= 100:
        return values.new_full((), torch.nan)
    rank = percentile / 100 * (count - 1)
    low = min(math.floor(rank), count - 1)
    fraction = rank - low
    value = values.kthvalue(low + 1).values.double()
    if fraction > 0:
        above = values.kthvalue(low + 2).values.double()
        value = value + (above - value) * fraction if fraction < 0.5 else above - (above - value) * (1 - fraction)
    return torch.where(values.isnan().any(), torch.nan, value).to(values.dtype)


def _voxels_like(logits: Tensor, dtype: torch.dtype) -> Tensor:
    return logits.new_empty((logits.shape[0], *logits.shape[2:]), dtype=dtype)


define(
    "reliability(Tensor logits, Tensor? logits_weights, Tensor percentile, Tensor? given=None)"
    " -> (Tensor threshold, Tensor flags)",
    lambda logits, *_: (logits.new_empty((), dtype=torch.float32), _voxels_like(logits, torch.uint8)),
)
define(
    "voxel_entropy(Tensor logits, Tensor? logits_weights) -> Tensor",
    lambda logits, _: _voxels_like(logits, torch.float32),
)
