"""Settings shared by the commands, as plain dataclasses. The docstrings of the fields are the help of the flags."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from sslfast.ranges import Range

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "fp32", "bf16"]
NetworkName = Literal["vnet", "resvnet"]
Norm = Literal["batch", "sync-batch", "instance"]
MirrorAxis = Literal["left-right", "front-back", "head-foot"]
Augment = Literal["all", "no-flip", "flip", "intensity", "affine", "none"]

LAST = "checkpoint_last.pt"  # in the folder of a run: the state after the last step done
BEST = "checkpoint_best.pt"  # the state with the best validation Dice
MIRROR: tuple[MirrorAxis, ...] = ("left-right", "front-back", "head-foot")  # the default of --mirror
PATCH = (112, 112, 80)  # the default of --patch
PATCH_SIZES = Range(1, 4096)  # along each axis, voxels


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of the volumes. Checkpoints store it, and prediction repeats it."""

    spacing: Annotated[float | None, Range(1e-4, 1000)] = None
    """Resample to an isotropic grid of this spacing, mm. None: keep the voxels as they are."""
    intensity: Literal["zscore", "ct", "none"] = "zscore"
    """zscore: zero mean and unit variance over the volume. ct: clip to --window, then zscore. none: as stored."""
    window: Annotated[tuple[float, float], Range(-(10**9), 10**9, rising=True)] = (-125.0, 275.0)
    """Lowest and highest value that --intensity ct keeps, Hounsfield units."""


@dataclass(frozen=True)
class LabelOptions:
    """Meaning of the values in the label maps."""

    classes: tuple[str, ...] = ()
    """Classes and their values in the label maps, such as liver=5 spleen=1; the background is 0.
    None: those of dataset.json, or the values 1, 2, … in the label maps. Segmentations have the same values."""
    ignore_label: Annotated[int, Range(-(10**9), 10**9)] = -1
    """Value in the label maps for voxels that are not annotated."""


@dataclass(frozen=True)
class NetworkOptions:
    """The two networks. Different architectures make different mistakes, so each can learn from the other."""

    network_a: NetworkName = "vnet"
    """First network."""
    network_b: NetworkName = "resvnet"
    """Second network."""
    width: Annotated[int, Range(1, 256)] = 16
    """Channels of the first stage. Each further stage doubles them."""
    depth: Annotated[int, Range(2, 6)] = 5
    """Number of stages. Each axis of a patch must be a multiple of 2^(depth-1)."""
    dropout: Annotated[float, Range(0, below=1)] = 0.5
    """Rate of channel dropout at the bottleneck and before the classifier."""
    norm: Norm = "instance"
    """Normalisation. instance: of each patch by itself.
    batch: as published. Unlabelled volumes that differ from the labelled ones then spoil its averages, and with them
    every segmentation. sync-batch: with several processes, batch normalisation over the patches of all of them."""
    checkpointing: bool = False
    """Recompute full-resolution activations in the backward pass: less memory, a little more time."""

    @property
    def factor(self) -> int:
        """Each axis of a patch must be a multiple of this."""
        return int(2 ** (self.depth - 1))


@dataclass(frozen=True)
class Windows:
    """Sliding windows of the size of a training patch. Where they overlap, their probabilities are averaged."""

    overlap: Annotated[float, Range(0, below=1)] = 0.5
    """Overlap of neighbouring windows, as a fraction of their size. More is smoother and slower."""
    strides: Annotated[tuple[int, int, int] | None, Range(1, 4096)] = None
    """Step between windows along each axis, voxels; replaces --overlap. Published for the left atrium: 18 18 4."""
    blend: Literal["gaussian", "constant"] = "gaussian"
    """Weights of the voxels of a window. gaussian: highest at the centre. constant: all equal, as published."""
    at_once: Annotated[int | None, Range(1, 4096)] = None
    """Windows computed together. None: 4 on a GPU, 1 on a CPU, whose caches hold no more."""


@dataclass(frozen=True)
class MethodOptions:
    """Base class of `Options`, which a method declares in its own file. A method without options uses this class."""
