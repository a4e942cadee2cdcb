"""Settings that commands share, as plain dataclasses: their docstrings are the help of the flags."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
    """Base of the options that a method declares in its own file, as the class `Options`. A method without any uses this."""
