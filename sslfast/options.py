"""Settings shared by the commands, as plain dataclasses. The docstrings of the fields are the help of the flags."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Literal

from sslfast.errors import UserError, plural
from sslfast.ranges import Range

Triple = tuple[int, int, int]

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "fp32", "bf16"]
NetworkName = Literal["vnet", "resvnet", "dynunet", "segresnet", "unet"]
Norm = Literal["batch", "sync-batch", "instance"]
MirrorAxis = Literal["left-right", "front-back", "head-foot"]
Intensity = Literal["zscore", "ct", "none"]
Augment = Literal["all", "no-flip", "flip", "intensity", "affine", "none"]

LAST = "checkpoint_last.pt"  # in the folder of a run: the state after the last step done
BEST = "checkpoint_best.pt"  # the state with the best validation Dice
MIRROR: tuple[MirrorAxis, ...] = ("left-right", "front-back", "head-foot")  # the default of --mirror
PATCH = (112, 112, 80)  # the default of --patch
FROM_MONAI: tuple[NetworkName, ...] = ("dynunet", "segresnet", "unet")  # the others are sslfast's own
PATCH_SIZES = Range(1, 4096)  # along each axis, voxels


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of the volumes. Checkpoints store it, and prediction repeats it."""

    spacing: Annotated[tuple[float, ...] | None, Range(1e-4, 1000)] = None
    """Resample to a grid of this spacing, mm: one number, or one each from left to right, back to front and foot to
    head. None: keep the voxels as they are."""
    intensity: tuple[Intensity, ...] = ("zscore",)
    """zscore: zero mean and unit variance over the volume. ct: clip to --window, then zscore. none: as stored.
    One word for all channels, or one each."""
    window: Annotated[tuple[float, float], Range(-(10**9), 10**9, rising=True)] = (-125.0, 275.0)
    """Lowest and highest value that --intensity ct keeps, Hounsfield units."""

    def __post_init__(self) -> None:
        if self.spacing is not None:
            given = tuple(self.spacing) if isinstance(self.spacing, (tuple, list)) else (self.spacing,)
            if len(given) not in (1, 3):
                raise UserError(f"--spacing {' '.join(map(str, given))}: it must be one number or three")
            object.__setattr__(self, "spacing", given * (3 // len(given)))  # the class is frozen
        if isinstance(self.intensity, str):
            object.__setattr__(self, "intensity", (self.intensity,))

    def intensities(self, channels: int) -> tuple[Intensity, ...]:
        """`--intensity` of each channel.

        Raises:
            UserError: its words are neither one nor as many as the channels.
        """
        if len(self.intensity) not in (1, channels):
            each = (
                f", or one for each of {plural(channels, 'channel')}" if channels > 1 else ", as there is one channel"
            )
            raise UserError(f"--intensity {' '.join(self.intensity)}: it must be one word{each}")
        return self.intensity * (channels // len(self.intensity))


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
    """First network. vnet: V-Net. resvnet: V-Net's decoder on the encoder of a ResNet-34. From MONAI:
    dynunet: nnU-Net's network. segresnet: residual, without --pooling. unet: residual, with the first stage at half the
    resolution; --pooling does not change its kernels. Those of MONAI have no --checkpointing and no sync-batch."""
    network_b: NetworkName = "resvnet"
    """Second network, from the same list."""
    width: Annotated[int, Range(1, 256)] = 16
    """Channels of the first stage. Each further stage doubles them."""
    depth: Annotated[int, Range(2, 6)] = 5
    """Number of stages. By default each stage after the first halves every axis, and each axis of a patch must be a
    multiple of 2^(depth-1)."""
    pooling: tuple[str, ...] = ()
    """Axes that each stage after the first halves: 221 halves the first two, as where slices are thick. Until the
    third is halved, convolutions do not reach along it. None: 222 at each stage."""
    dropout: Annotated[float, Range(0, below=1)] = 0.5
    """Rate of channel dropout at the bottleneck and before the classifier."""
    norm: Norm = "instance"
    """Normalisation. instance: of each patch by itself.
    batch: as published. Unlabelled volumes that differ from the labelled ones then do harm: a little in
    ssl-contrastive, much in other methods and with the preset paper. sync-batch: with several processes, batch
    normalisation over the patches of all of them."""
    checkpointing: bool = False
    """Recompute full-resolution activations in the backward pass: less memory, a little more time."""

    @property
    def strides(self) -> tuple[Triple, ...]:
        """Strides along the axes of each stage after the first.

        Raises:
            UserError: `pooling` is not one word of three digits 1 or 2 for each of these stages.
        """
        words = self.pooling or ("222",) * (self.depth - 1)
        if len(words) != self.depth - 1 or not all(re.fullmatch("[12]{3}", word) for word in words):
            raise UserError(
                f"--pooling {' '.join(words)}: with --depth {self.depth} it must be {self.depth - 1} words of three "
                "digits 1 or 2, such as 221, which halves the first two axes"
            )
        return tuple((int(word[0]), int(word[1]), int(word[2])) for word in words)

    @property
    def factors(self) -> Triple:
        """What the axes of a patch must be multiples of."""
        x, y, z = (math.prod(along) for along in zip(*self.strides, strict=True))
        return x, y, z

    @property
    def foreign(self) -> list[str]:
        """The flags that choose a network of MONAI."""
        chosen = {"--network-a": self.network_a, "--network-b": self.network_b}
        return [f"{flag} {name}" for flag, name in chosen.items() if name in FROM_MONAI]

    def check(self) -> None:
        """Checks that both networks can be built with these settings.

        Raises:
            UserError: names the flag and the remedy.
        """
        foreign = self.foreign
        if foreign and self.norm == "sync-batch":
            raise UserError(
                f"--norm sync-batch with {foreign[0]}: only vnet and resvnet have it; use --norm instance or batch, or "
                "one of these networks"
            )
        if foreign and self.checkpointing:
            raise UserError(
                f"--checkpointing with {foreign[0]}: only vnet and resvnet recompute activations; remove it, or use "
                "these networks"
            )
        for flag in foreign:
            if flag.endswith("dynunet") and self.depth < 3:
                raise UserError(f"--depth {self.depth} with {flag}: this network has 3 stages or more; use --depth 3")
            if flag.endswith("segresnet") and {*self.strides} != {(2, 2, 2)}:
                raise UserError(
                    f"--pooling {' '.join(self.pooling)} with {flag}: each stage of this network halves all axes; "
                    "leave out --pooling, or use vnet, resvnet, dynunet or unet"
                )


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
    mirror: bool = False
    """Segment each window also mirrored, and average: along the axes in which the training mirrored volumes (--augment
    all or flip), so 2 to 8 times as long."""


@dataclass(frozen=True)
class MethodOptions:
    """Base class of `Options`, which a method declares in its own file. A method without options uses this class."""
