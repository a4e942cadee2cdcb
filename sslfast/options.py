"""Settings that commands share, as plain dataclasses: their docstrings are the help of the flags."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MethodName = Literal[
    "supervised",
    "ssl-contrastive",
    "as-released",
    "dual-networks",
    "mcf",
    "cps",
    "mean-teacher",
    "ua-mt",
    "u2pl",
    "bcp",
]
Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "fp32", "bf16"]
NetworkName = Literal["vnet", "resvnet"]
Norm = Literal["batch", "instance"]
Augment = Literal["all", "flip", "intensity", "affine", "none"]


LAST = "checkpoint_last.pt"  # in a run's folder: after the last step done
BEST = "checkpoint_best.pt"  # after the step with the best validation Dice


@dataclass(frozen=True)
class Preprocessing:
    """How a scan becomes what the networks see. A checkpoint keeps it."""

    spacing: float | None = None
    """Isotropic grid to resample to, mm; None keeps the voxels as they are."""
    intensity: Literal["zscore", "ct", "none"] = "zscore"
    """zscore: zero mean, unit variance over the volume. ct: clipped to the window before. none: as stored."""
    window: tuple[float, float] = (-125.0, 275.0)
    """Lowest and highest value kept by ct, Hounsfield units."""


@dataclass(frozen=True)
class NetworkOptions:
    """The two networks. Different ones make different mistakes, and learn from each other by them."""

    network_a: NetworkName = "vnet"
    """First network."""
    network_b: NetworkName = "resvnet"
    """Second network."""
    width: int = 16
    """Channels of the first stage; each further stage doubles them."""
    depth: int = 5
    """Stages; a patch must be a multiple of 2^(depth-1)."""
    dropout: float = 0.5
    """Rate of the channel dropout at the bottleneck and before the classifier."""
    norm: Norm = "batch"
    """Normalisation: batch, as published; instance, where scans differ much in contrast."""
    checkpointing: bool = False
    """Forget the activations of the full grid and compute them again in the backward pass: less memory, a little more time."""

    @property
    def factor(self) -> int:
        """Every axis of a patch must be a multiple of this."""
        return int(2 ** (self.depth - 1))


@dataclass(frozen=True)
class Windows:
    """How a scan larger than the patch is covered: by windows of its size, whose probabilities are averaged."""

    overlap: float = 0.5
    """Share by which neighbouring windows overlap; more is smoother and slower."""
    strides: tuple[int, int, int] | None = None
    """Voxels from window to window along each axis, in place of --overlap. 18 18 4 is published for the left atrium."""
    blend: Literal["gaussian", "constant"] = "gaussian"
    """Weights of a window's voxels. gaussian: its centre counts most. constant: all alike, as published."""
    at_once: int | None = None
    """Windows computed together. None: 1 on a CPU, whose caches hold no more, 4 on a GPU."""


@dataclass(frozen=True)
class MethodOptions:
    """Settings of the semi-supervised methods."""

    preset: Literal["recommended", "paper"] = "recommended"
    """recommended: both networks learn rectified pseudo-labels of their teacher. paper: the loser learns the winner's class on the
    reliable voxels, and the discrepancy is a mean over its mask, as in arXiv 2311.12617; if you do not set them, without views,
    with a percentile of 80 to 100, and without Dice of pseudo-labels."""
    percentile: tuple[float, float] | None = None
    """A voxel is reliable if its teacher's entropy lies below this percentile: at the first step, and at the end of the ramp.
    None: the preset's, 20 20 or 80 100."""
    views: bool | None = None
    """ssl-contrastive shows both networks the unlabelled volumes rotated (to 30 degrees about each axis) and zoomed (0.7 to 1.4),
    and teaches them there what they say on average of the volumes as they are. Turned as voxels, so give a --spacing where
    slices are thick. --no-views: each network teaches the other. None: with the preset recommended, not with paper."""
    discrepancy_weight: float = 0.5
    """Weight of the loss where the networks' confident predictions disagree."""
    pseudo_weight: float = 1.0
    """Weight of the pseudo-labels' cross-entropy, and of the cosine, at the end of the ramp."""
    pseudo_dice_weight: float | None = None
    """Weight of Dice with the teacher, in the preset paper with the pseudo-labels, at the end of the ramp. None: the preset's, 1 or 0."""
    consistency_weight: float = 0.1
    """Weight of what mcf, cps, mean-teacher and ua-mt learn from unlabelled volumes, at the end of the ramp."""
    contrast_weight: float = 0.1
    """Weight of the contrastive loss at the end of the ramp."""
    ramp: float | None = None
    """Share of the run in which these weights rise to their full value. None: the method's own, 1 for ssl-contrastive and
    dual-networks, 0.6 for mcf, cps, mean-teacher and ua-mt."""
    temperature: float = 0.1
    """Of the contrastive softmax."""
    anchors: int = 256
    """Unreliable voxels drawn for each class and step."""
    negatives: int = 512
    """Reliable voxels of other classes drawn for each class and step."""
    memory: int = 30_000
    """Negatives of a class that u2pl keeps from step to step, and 5/3 as many of the background; 0: those of the step alone."""
