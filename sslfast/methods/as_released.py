"""`as-released`: what the code published with arXiv 2311.12617 computes, for comparison only.

Its unlabelled losses are computed from detached probabilities, so unlabelled volumes give no gradient. They act only
through BatchNorm's statistics.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sslfast.losses import DualLoss, ramp_up
from sslfast.methods.method import Method
from sslfast.ops.check import check_batch, to_compute_dtype
from sslfast.ops.class_prototypes import unit
from sslfast.ops.dual_supervised import dual_supervised
from sslfast.ops.flags import RELIABLE
from sslfast.ops.reduce import SINGLE_PROCESS, Reducer, exact_percentiles
from sslfast.ops.reliability import exact_percentile
from sslfast.ops.sample_voxels import gather_voxels, sample_voxels
from sslfast.ops.sums import SMOOTH

PERCENTILE = 20.0  # a voxel is reliable if its entropy is below this percentile
DISCREPANCY_WEIGHT = 0.5
CONTRAST_WEIGHT = 0.1  # relative to the pseudo-label loss


class AsReleased(Method):
    """`as_released_loss` with a ramp as long as the run. It has no options."""

    def step(self, network_a: nn.Module, network_b: nn.Module, images: Tensor, labels: Tensor, step: int) -> DualLoss:
        (logits_a, features_a), (logits_b, features_b) = network_a(images), network_b(images)
        return as_released_loss(
            logits_a,
            logits_b,
            features_a,
            features_b,
            labels,
            step,
            ramp_steps=self.steps,
            seed=self.seed,
            reducer=self.reducer,
        )


def as_released_loss(
    logits_a: Tensor,
    logits_b: Tensor,
    features_a: Tensor,
    features_b: Tensor,
    labels: Tensor,
    step: int,
    *,
    ramp_steps: int = 6000,
    anchors: int = 256,
    seed: int = 1337,
    reducer: Reducer = SINGLE_PROCESS,
) -> DualLoss:
    """Both networks' losses: CE + Dice + 0.5 discrepancy + ramp (pseudo-labels + 0.1 contrast).

    The last two have no gradient:

    - A voxel is reliable if the entropy of either network is below the 20th percentile of that network's entropies. Its
      pseudo-label is the higher of the two networks' classes.
    - The pseudo-label loss uses a network's probabilities as logits: softmax(softmax(z)). It is the mean cross-entropy
      over the reliable voxels, times voxels / reliable voxels.
    - The contrast uses the features of the network with the higher Dice loss, and is added to that network's loss. All
      vectors are scaled to unit length. It is the mean distance of the sampled unreliable voxels to the prototype of
      their class, summed over the classes, plus the distance between the prototypes of classes 0 and 1.

    Args:
        logits_a, logits_b: [N, C, *spatial].
        features_a, features_b: [N, K, *spatial].
        labels: [L, *spatial] integers in 0..C-1, or -1 where not annotated; the first L volumes are labelled.
        step: training step, for the ramp and the voxel sample.
        ramp_steps: length of the ramp.
        anchors: unreliable voxels sampled per class.
        seed: seed of the voxel sample.
        reducer: process group over which sums are all-reduced.

    Returns:
        Losses and terms as of `sslfast.DualContrastiveLoss`. NaN or infinite logits give a NaN loss.

    Raises:
        ValueError, TypeError: as of `sslfast.DualContrastiveLoss`.
    """
    check_batch(logits_a, logits_b, features_a, features_b, labels, step, None, reducer, contrast=True)
    num_labelled = len(labels)
    supervised = dual_supervised(logits_a[:num_labelled], logits_b[:num_labelled], labels, reducer=reducer)
    dtype = supervised.ce.dtype
    with torch.no_grad():
        winner = (supervised.dice[1] < supervised.dice[0]).long()
        loser_mask = torch.stack((winner == 1, winner == 0)).to(dtype)  # [2]
        unlabelled = logits_a[num_labelled:], logits_b[num_labelled:]
        log_p = torch.stack([to_compute_dtype(z).log_softmax(1) for z in unlabelled])  # [2, U, C, *spatial]
        thresholds, reliable, label = _reliability(log_p, reducer)
        num_classes = logits_a.shape[1]
        member = torch.stack([reliable & (label == c) for c in range(num_classes)], -1).flatten(0, -2)  # [V, C]
        voxels = reducer.sum(member.new_full((), len(member), dtype=torch.int64))
        counts = reducer.sum(member.sum(0))  # [C] reliable voxels

        pseudo, pseudo_dice = _pseudo_label_loss(log_p.exp().movedim(2, -1).flatten(1, -2), member, counts, reducer)
        pseudo = pseudo * (voxels / counts.sum().clamp_min(1))

        features = torch.where(winner == 0, features_b[num_labelled:], features_a[num_labelled:])  # the loser's
        flags = (label + RELIABLE * reliable).to(torch.uint8)
        sample = sample_voxels(flags, [anchors] * num_classes, seed, step, role="anchors", reducer=reducer)
        rows = gather_voxels(features, sample.indices)  # [C, A, K]
        contrast = _distances(rows, sample.counts, _prototypes(features, member, reducer), counts, reducer).to(dtype)

        nan_guard = thresholds.sum().to(dtype) * 0  # NaN if an unlabelled logit is NaN or infinite, else 0
        constant = ramp_up(step, ramp_steps) * (pseudo + CONTRAST_WEIGHT * loser_mask * contrast) + nan_guard
    losses = supervised.ce + supervised.dice + DISCREPANCY_WEIGHT * supervised.discrepancy + constant  # [2]
    terms = {
        **supervised.learned,
        "discrepancy": supervised.discrepancy.detach(),
        "mask_voxels": supervised.mask_voxels,
        "winner": winner,
        "thresholds": thresholds,
        "pseudo": pseudo,
        "pseudo_dice": pseudo_dice,
        "contrast": contrast,
        "kept_fraction": counts.sum() / voxels.clamp_min(1),
        "reliable": counts,
        "anchors": reducer.sum(sample.counts),
    }
    return DualLoss(losses[0], losses[1], terms)


def _reliability(log_p: Tensor, reducer: Reducer) -> tuple[Tensor, Tensor, Tensor]:
    """Both networks' thresholds [2]; and per voxel [U, *spatial], if it is reliable, and the higher of the two classes.

    `log_p`: [2, U, C, *spatial].
    """
    entropies = -(log_p.exp() * log_p).sum(2).clamp_max(0)  # [2, U, *spatial]; rounding cannot make it negative
    if reducer.size == 1:
        thresholds = torch.stack([exact_percentile(h.flatten(), PERCENTILE) for h in entropies])
    else:
        wanted = torch.tensor(PERCENTILE, dtype=torch.float64, device=log_p.device)
        thresholds = torch.stack([exact_percentiles(h.flatten(), wanted, reducer) for h in entropies])
    below = [h < threshold for h, threshold in zip(entropies, thresholds, strict=True)]
    return thresholds, below[0] | below[1], log_p.max(2).indices.amax(0)


def _pseudo_label_loss(p: Tensor, member: Tensor, counts: Tensor, reducer: Reducer) -> tuple[Tensor, Tensor]:
    """Cross-entropy and Dice loss [2] of softmax(p) on the reliable voxels; Dice is only reported.

    `p`: both networks' probabilities [2, V, C]; `member`: one-hot pseudo-labels of the reliable voxels [V, C].
    """
    log_q = p.log_softmax(2)
    q = torch.where(member.any(1, keepdim=True), log_q.exp(), 0)
    per_class = torch.stack((torch.where(member, -log_q, 0), torch.where(member, q, 0), q.square())).sum(2)
    ce, overlap, square = reducer.sum(per_class.double())  # each [2, C]
    dice = 1 - (2 * overlap + SMOOTH) / (square + counts + SMOOTH)
    return (ce.sum(1) / counts.sum().clamp_min(1)).to(p.dtype), dice[:, 1:].mean(1).to(p.dtype)


def _prototypes(features: Tensor, member: Tensor, reducer: Reducer) -> Tensor:
    """Prototypes [C, K]: the sum of each class's unit features, scaled to unit length. `member` [V, C]: as above."""
    directions = unit(to_compute_dtype(features), dim=1).movedim(1, -1).flatten(0, -2)  # [V, K]
    return unit(reducer.sum(torch.stack([torch.where(m.unsqueeze(1), directions, 0).sum(0) for m in member.T])), dim=1)


def _distances(rows: Tensor, drawn: Tensor, prototypes: Tensor, counts: Tensor, reducer: Reducer) -> Tensor:
    """The contrast [] of anchors [C, A, K]; the first `drawn` [C] are used, if their class has a prototype."""
    used = (torch.arange(rows.shape[1], device=rows.device) < drawn.unsqueeze(1)) & (counts > 0).unsqueeze(1)  # [C, A]
    distances = torch.linalg.vector_norm(unit(rows, dim=2) - prototypes.unsqueeze(1), dim=2)
    to_own = reducer.sum(torch.where(used, distances, 0).sum(1)) / reducer.sum(used.sum(1)).clamp_min(1)
    between = torch.linalg.vector_norm(prototypes[1] - prototypes[0])
    return to_own.sum() + torch.where((counts[:2] > 0).all(), between, 0)
