"""`reliability`: exact entropy percentiles of the unlabelled volumes and one byte a voxel that says what follows."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sslfast.ops.backend import define, fake, kernels, runs_fused
from sslfast.ops.check import check_logits, check_range, working
from sslfast.ops.linear_logits import Logits, join, readable, split, stored
from sslfast.ops.ranks import ALONE, Ranks, exact_percentiles
from sslfast.ops.state import RELIABLE, SURE_A, SURE_B

Mode = Literal["winner", "union", "both"]
LabelOf = Literal["winner", "union"]
AnchorLabelOf = Literal["winner", "loser"]
MODES: tuple[Mode, ...] = ("winner", "union", "both")


class Reliability(NamedTuple):
    """What the unlabelled losses need to know of each voxel."""

    thresholds: Tensor  # [2], or [2, C] with per_class: entropy percentile of network a and b, nats
    state: Tensor  # [U, *spatial] uint8, see sslfast.ops.state


def reliability(
    logits_a: Logits,
    logits_b: Logits,
    percentile: float,
    *,
    mode: Mode = "winner",
    winner: Tensor | int,
    label: LabelOf = "winner",
    anchor_label: AnchorLabelOf = "winner",
    per_class: bool = False,
    ranks: Ranks = ALONE,
) -> Reliability:
    """Splits the unlabelled voxels into reliable and unreliable (arXiv 2311.12617, its entropy masks).

    A voxel is reliable where its entropy H = -sum p log p lies strictly below the `percentile` of all voxels' entropies
    in the batch, interpolated linearly as `numpy.percentile` does with the rank in float64. NaN or infinite logits make
    the threshold NaN.

    Args:
        logits_a, logits_b: [U, C, *spatial], 2 <= C <= 32. No gradient flows.
        percentile: 0..100.
        mode: whose entropy decides: the winner's, either network's ("union") or both networks'.
        winner: 0 (network a) or 1 (network b), a number or an integer tensor [].
        label: pseudo-label: the winner's class, or the higher class of the two networks ("union").
        anchor_label: whose class an unreliable voxel carries (it is an anchor's class and nothing else).
        per_class: a percentile for each predicted class of its own instead of one for all voxels.
        ranks: the processes over whose voxels the percentiles go.

    Returns:
        thresholds, float32 (float64 for float64 logits; 0 where there is no voxel), and the byte map.
    """
    check_logits(logits_a, logits_b)
    check_range("percentile", percentile, 0, 100)
    for name, value, allowed in (
        ("mode", mode, MODES),
        ("label", label, ("winner", "union")),
        ("anchor_label", anchor_label, ("winner", "loser")),
    ):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
    winner = torch.as_tensor(winner, device=logits_a.device)
    fused = runs_fused(logits_a, logits_b)
    logits_a, logits_b = (readable(z.detach()) if fused else stored(z) for z in (logits_a, logits_b))
    given = None if ranks.size == 1 else _thresholds(logits_a, logits_b, percentile, per_class, fused, ranks)
    if not fused:
        return reliability_ref(
            stored(logits_a),
            stored(logits_b),
            percentile,
            mode,
            winner,
            label,
            anchor_label,
            per_class,
            given,
        )
    (values_a, weights_a), (values_b, weights_b) = split(logits_a), split(logits_b)
    return Reliability(
        *kernels(values_a).reliability(
            values_a,
            values_b,
            percentile,
            MODES.index(mode),
            winner.long(),
            label == "union",
            anchor_label == "loser",
            per_class,
            given,
            weights_a,
            weights_b,
        )
    )


@torch.no_grad()
def _thresholds(
    logits_a: Logits, logits_b: Logits, percentile: float, per_class: bool, fused: bool, ranks: Ranks
) -> Tensor:
    """The percentiles over the voxels of all ranks: [2] or [2, C]."""
    logits = logits_a, logits_b
    entropies = [kernels(z).voxel_entropy(*split(z)) if fused else _entropy(stored(z)) for z in logits]
    group = torch.stack([stored(z).argmax(1).flatten() for z in logits]) if per_class else None
    groups = logits_a.shape[1] if per_class else 1
    found = exact_percentiles(torch.stack([h.flatten() for h in entropies]), group, groups, percentile, ranks)
    return found if per_class else found.squeeze(1)


@torch.no_grad()
def reliability_ref(
    logits_a: Tensor,
    logits_b: Tensor,
    percentile: float,
    mode: Mode,
    winner: Tensor,
    label: LabelOf,
    anchor_label: AnchorLabelOf,
    per_class: bool,
    given: Tensor | None = None,
) -> Reliability:
    """The specification of `reliability` in plain PyTorch."""
    num_classes = logits_a.shape[1]
    entropies, classes = zip(*((_entropy(logits), logits.argmax(1)) for logits in (logits_a, logits_b)), strict=True)
    if given is not None:
        thresholds = given
    elif per_class:
        thresholds = torch.stack(
            [
                torch.stack([exact_percentile(h[y == c], percentile) for c in range(num_classes)])
                for h, y in zip(entropies, classes, strict=True)
            ]
        )  # [2, C]
    else:
        thresholds = torch.stack([exact_percentile(h.flatten(), percentile) for h in entropies])  # [2]
    below = [h < (t[y] if per_class else t) for h, y, t in zip(entropies, classes, thresholds, strict=True)]

    b_wins = winner.bool()
    winner_class = torch.where(b_wins, classes[1], classes[0])
    loser_class = torch.where(b_wins, classes[0], classes[1])
    if mode == "winner":
        reliable = torch.where(b_wins, below[1], below[0])
    else:
        reliable = below[0] | below[1] if mode == "union" else below[0] & below[1]
    taught = winner_class if label == "winner" else torch.maximum(*classes)
    pulled = taught if anchor_label == "winner" else loser_class
    state = torch.where(reliable, taught, pulled) + RELIABLE * reliable + SURE_A * below[0] + SURE_B * below[1]
    return Reliability(thresholds, state.to(torch.uint8))


def _entropy(logits: Tensor) -> Tensor:
    """Entropy of each voxel [U, *spatial]."""
    shifted = working(logits) - working(logits).amax(1, keepdim=True)  # H loses no digits however large the logits are
    exp = shifted.exp()
    total = exp.sum(1)
    return (total.log() - (exp * shifted).sum(1) / total).clamp_min(0)  # never below 0 by rounding


def exact_percentile(values: Tensor, percentile: float) -> Tensor:
    """`numpy.percentile(values, percentile)` with linear interpolation, at any size: a tensor [] of the dtype of `values`.

    The rank and the interpolation are computed in float64. NaN if any value is; 0 for no value.
    """
    count = values.numel()
    if count == 0:
        return values.new_zeros(())
    rank = percentile / 100 * (count - 1)
    low = min(math.floor(rank), count - 1)
    fraction = rank - low
    value = values.kthvalue(low + 1).values.double()
    if fraction > 0:
        above = values.kthvalue(low + 2).values.double()
        value = value + (above - value) * fraction if fraction < 0.5 else above - (above - value) * (1 - fraction)
    return torch.where(values.isnan().any(), torch.nan, value).to(values.dtype)


define(
    "reliability(Tensor logits_a, Tensor logits_b, float percentile, int mode, Tensor winner,"
    " bool union_label, bool loser_anchor, bool per_class, Tensor? given=None, Tensor? weights_a=None, Tensor? weights_b=None)"
    " -> (Tensor thresholds, Tensor state)"
)
define("voxel_entropy(Tensor logits, Tensor? weights=None) -> Tensor")


@fake("reliability")
def _(
    logits_a: Tensor,
    logits_b: Tensor,
    percentile: float,
    mode: int,
    winner: Tensor,
    union_label: bool,
    loser_anchor: bool,
    per_class: bool,
    given: Tensor | None = None,
    weights_a: Tensor | None = None,
    weights_b: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    groups = (2, join(logits_a, weights_a).shape[1]) if per_class else (2,)
    return logits_a.new_empty(groups, dtype=torch.float32), _state_like(logits_a, torch.uint8)


@fake("voxel_entropy")
def _(logits: Tensor, weights: Tensor | None = None) -> Tensor:
    return _state_like(logits, torch.float32)


def _state_like(logits: Tensor, dtype: torch.dtype) -> Tensor:
    return logits.new_empty((logits.shape[0], *logits.shape[2:]), dtype=dtype)
