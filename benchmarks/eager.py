"""The baseline: the step, and the networks' layers, as a good user writes them in plain PyTorch.

It has boolean gathers and `randperm`, and the published code's host percentile or `torch.kthvalue`. It computes what
`sslfast.DualContrastiveLoss` does at its defaults.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslfast.networks import NormAct

Percentile = Callable[[Tensor, float], Tensor | float]


def numpy_percentile(values: Tensor, percentile: float) -> float:
    """On the host, as published."""
    return float(np.percentile(values.float().cpu().numpy().ravel(), percentile))


def kthvalue_percentile(values: Tensor, percentile: float) -> Tensor:
    """On the device, without interpolation."""
    rank = int(percentile / 100 * (values.numel() - 1))
    return values.flatten().kthvalue(rank + 1).values


def dice_loss(p: Tensor, onehot: Tensor) -> Tensor:
    """Mean over the foreground classes of 1 - Dice."""
    voxels = (0, 2, 3, 4)
    overlap, size = (p * onehot).sum(voxels), (p * p).sum(voxels) + onehot.sum(voxels)
    return (1 - (2 * overlap + 1e-5) / (size + 1e-5))[1:].mean()


def dual_supervised(logits_a: Tensor, logits_b: Tensor, labels: Tensor, threshold: float = 0.6) -> list[Tensor]:
    """Cross-entropy, Dice and discrepancy loss of both networks: [ce_a, ce_b, dice_a, dice_b, discrepancy_a, ...]."""
    classes = logits_a.shape[1]
    onehot = F.one_hot(labels, classes).movedim(-1, 1).float()
    ce, dice, confident, probabilities = [], [], [], []
    for logits in (logits_a.float(), logits_b.float()):
        ce.append(F.cross_entropy(logits, labels))
        p = logits.softmax(1)
        dice.append(dice_loss(p, onehot))
        confidence, predicted = p.detach().max(1)
        confident.append(torch.where(confidence >= threshold, predicted, 0))
        probabilities.append(p)
    mask = (confident[0] != confident[1]).float()
    discrepancy = [(mask * (p - onehot).square().sum(1)).mean() / 2 for p in probabilities]
    return [*ce, *dice, *discrepancy]


@torch.no_grad()
def reliability(logits: Tensor, percentile: float, find: Percentile) -> tuple[Tensor | float, Tensor, Tensor]:
    """A network's threshold, its reliable voxels and its classes."""
    p = logits.float().softmax(1)
    entropy = -(p * torch.log(p + 1e-10)).sum(1)
    threshold = find(entropy, percentile)
    return threshold, entropy < threshold, p.max(1).indices  # argmax along a stride takes eight times as long


def pseudo_supervised(logits: Tensor, reliable: Tensor, label: Tensor) -> Tensor:
    """A network's cross-entropy and Dice on the reliable voxels."""
    logits = logits.float()
    ce = F.cross_entropy(logits, label, reduction="none")
    inside = reliable.unsqueeze(1)
    onehot = F.one_hot(label, logits.shape[1]).movedim(-1, 1).float()
    return (ce * reliable).sum() / reliable.sum().clamp_min(1) + dice_loss(logits.softmax(1) * inside, onehot * inside)


def teacher_consistency(logits: Tensor, teacher: Tensor, sure: Tensor, label: Tensor) -> Tensor:
    """A student's cross-entropy rectified by its agreement with a sure teacher, their cosine distance and Dice."""
    log_p, log_q = logits.float().log_softmax(1), teacher.float().log_softmax(1)
    return rectified(log_p, log_q, sure, label) + distance(log_p, log_q)


def rectified(log_p: Tensor, log_q: Tensor, sure: Tensor, label: Tensor) -> Tensor:
    """A student's cross-entropy with a teacher's class, rectified by their agreement, where the teacher is sure."""
    kl = F.kl_div(log_p, log_q.detach(), reduction="none", log_target=True).sum(1)
    ce = F.nll_loss(log_p, label, reduction="none")
    return (((-kl).exp() * ce + kl) * sure).sum() / sure.sum().clamp_min(1)


def distance(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Cosine distance and Dice loss of two networks' probabilities."""
    p, q = log_p.exp(), log_q.exp()
    products, p_squared, q_squared = p * q, p * p, q * q
    # F.cosine_similarity along a stride takes sixty times as long
    cosine = products.sum(1) * (p_squared.sum(1) * q_squared.sum(1)).rsqrt()
    overlap, square_p, square_q = (x.sum((0, 2, 3, 4)) for x in (products, p_squared, q_squared))
    dice = (2 * overlap + 1e-5) / (square_p + square_q + 1e-5)
    return (1 - cosine).mean() + (1 - dice[1:]).mean()


def masked_consistency(student: Tensor, teacher: Tensor, max_entropy: float) -> Tensor:
    """Squared distance of the probabilities where the teacher's entropy is low."""
    p, q = student.float().softmax(1), teacher.detach().float().softmax(1)
    certain = -(q * torch.log(q + 1e-10)).sum(1) < max_entropy
    return ((p - q).square().mean(1) * certain).sum() / certain.sum().clamp_min(1)


def contrast(
    features: Tensor, reliable: Tensor, label: Tensor, classes: int, anchors: int, negatives: int, temperature: float
) -> Tensor:
    """InfoNCE of sampled unreliable voxels against prototypes and sampled reliable voxels."""
    rows = features.movedim(1, -1)  # [U, D, H, W, K]
    with torch.no_grad():
        kept, kept_label = F.normalize(rows[reliable].float(), dim=1), label[reliable]
        present = [c for c in range(classes) if (kept_label == c).any()]
        if not present:
            return features.sum() * 0
        prototypes = F.normalize(torch.stack([kept[kept_label == c].sum(0) for c in present]), dim=1)
    losses = []
    others, others_label = rows[~reliable], label[~reliable]
    for index, c in enumerate(present):
        candidates = (others_label == c).nonzero().squeeze(1)
        drawn = candidates[torch.randperm(len(candidates), device=features.device)[:anchors]]
        anchor = F.normalize(others[drawn].float(), dim=1)
        pool = (kept_label != c).nonzero().squeeze(1)
        negative = kept[pool[torch.randperm(len(pool), device=features.device)[:negatives]]]
        similarity = anchor @ torch.cat((prototypes, negative)).T / temperature
        target = torch.full((len(anchor),), index, device=features.device)
        losses.append(F.cross_entropy(similarity, target, reduction="none"))
    return torch.cat(losses).mean() if sum(map(len, losses)) else features.sum() * 0


def dual_contrastive(
    logits_a: Tensor,
    logits_b: Tensor,
    features_a: Tensor,
    features_b: Tensor,
    labels: Tensor,
    percentile: float,
    find: Percentile,
    contrast_weight: float,
    teacher: Tensor | None = None,
) -> Tensor:
    """The whole step; the winner is the network with the lower Dice loss on this batch.

    A teacher [U, C, D, H, W] takes the place of the other network on the unlabelled volumes.
    """
    labelled = len(labels)
    ce_a, ce_b, dice_a, dice_b, discrepancy_a, discrepancy_b = dual_supervised(
        logits_a[:labelled], logits_b[:labelled], labels
    )
    a, b = logits_a[labelled:], logits_b[labelled:]
    if teacher is None:
        (_, sure_a, label_a), (_, sure_b, label_b) = (reliability(z.detach(), percentile, find) for z in (a, b))
        log_p, log_q = a.float().log_softmax(1), b.float().log_softmax(1)
        agreed = rectified(log_p, log_q, sure_b, label_b) + rectified(log_q, log_p, sure_a, label_a)
        agreed = agreed + distance(log_p, log_q)
    else:
        _, sure_a, label_a = _, sure_b, label_b = reliability(teacher, percentile, find)
        agreed = sum(
            (teacher_consistency(z, teacher, sure_a, label_a) for z in (a, b)), torch.zeros((), device=a.device)
        )
    loss = ce_a + ce_b + dice_a + dice_b + 0.5 * (discrepancy_a + discrepancy_b) + agreed
    if contrast_weight == 0:
        return loss
    b_wins = bool(dice_b < dice_a)
    pulled, reliable, label = (features_a, sure_b, label_b) if b_wins else (features_b, sure_a, label_a)
    return loss + contrast_weight * contrast(pulled[labelled:], reliable, label, logits_a.shape[1], 256, 512, 0.1)


class PlainNormAct(nn.Module):
    """What a `NormAct` computes, by torch's modules."""

    def __init__(self, fused: NormAct) -> None:
        super().__init__()
        channels = len(fused.weight)
        self.relu = fused.relu
        self.norm: nn.Module = (
            nn.InstanceNorm3d(channels, affine=True) if fused.norm == "instance" else nn.BatchNorm3d(channels)
        )
        self.norm.load_state_dict(fused.state_dict(), strict=False)
        self.norm.train(fused.training)

    def forward(self, x: Tensor, *, residual: Tensor | None = None, skip: Tensor | None = None) -> Tensor:
        """As `NormAct`."""
        y: Tensor = self.norm(x)
        if residual is not None:
            y = y + residual
        if self.relu:
            y = F.relu(y, inplace=True)
        return y if skip is None else y + skip


def plain_network(network: nn.Module) -> nn.Module:
    """A copy of a network of ours without the package's layers, contiguous."""
    plain: Any = copy.deepcopy(network)
    plain.to(memory_format=torch.contiguous_format)  # torch's stubs lack the argument
    for parent in list(plain.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, NormAct):
                parent.register_module(name, PlainNormAct(child))
    return cast(nn.Module, plain)
