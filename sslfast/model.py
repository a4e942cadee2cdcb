"""A trained pair of networks with all that prediction needs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from sslfast.networks import build_networks
from sslfast.options import MIRROR, PATCH_SIZES, MirrorAxis, NetworkOptions, Preprocessing
from sslfast.ranges import check_ranges


@dataclass(frozen=True)
class Model:
    """Two networks with their classes, patch size and preprocessing: all that a segmentation needs."""

    options: NetworkOptions
    preprocessing: Preprocessing
    classes: dict[int, str]
    """Class names by their values in the label maps, rising; a network's class is the position in this order."""
    patch: tuple[int, int, int]
    network_a: nn.Module
    network_b: nn.Module
    channels: tuple[str, ...] = ("image",)
    """Names of the channels of an image, in their order."""
    merged: dict[int, int] = field(default_factory=dict)
    """Further values of the label maps, and the value of the class as which they counted in training."""
    spacing: tuple[float, float, float] | None = None
    """Spacing of the networks' grid in training, mm, along R, A and S; None in checkpoints of earlier versions."""
    mirrored: tuple[MirrorAxis, ...] = ()
    """Axes along which volumes were mirrored in training."""

    def to(self, device: torch.device) -> Model:
        """The same model with its networks on `device`."""
        return replace(self, network_a=self.network_a.to(device), network_b=self.network_b.to(device))

    def state(self) -> dict[str, Any]:
        """Everything that `restore` needs, as tensors and plain values."""
        return {
            "networks": asdict(self.options),
            "preprocessing": asdict(self.preprocessing),
            "classes": self.classes,
            "channels": self.channels,
            "merged": self.merged,
            "spacing": self.spacing,
            "patch": self.patch,
            "mirrored": self.mirrored,
            "network_a": self.network_a.state_dict(),
            "network_b": self.network_b.state_dict(),
        }

    @staticmethod
    def restore(state: dict[str, Any]) -> Model:
        """The model of a checkpoint's `model` entry.

        Raises:
            LookupError, TypeError, ValueError, AttributeError, RuntimeError: the entry is not what `state` gives.
        """
        options = NetworkOptions(**{**state["networks"], "pooling": tuple(state["networks"].get("pooling", ()))})
        preprocessing = Preprocessing(**{**state["preprocessing"], "window": tuple(state["preprocessing"]["window"])})
        for settings in (options, preprocessing):
            check_ranges(settings)
        values, (x, y, z) = [*state["classes"]], state["patch"]
        rising = all(isinstance(v, int) for v in values) and values == sorted({0, *values}) and values[-1] < 32768
        fits = all(
            isinstance(size, int) and size % factor == 0
            for size, factor in zip((x, y, z), options.factors, strict=True)
        )
        named = all(isinstance(name, str) for name in state["classes"].values())
        merged = dict(state.get("merged", {}))
        spacing = state.get("spacing")
        if spacing is not None:
            spacing = (float(spacing[0]), float(spacing[1]), float(spacing[2]))
        rising = rising and all(isinstance(v, int) and of in values for v, of in merged.items())
        channels = tuple(state.get("channels", ("image",)))
        mirrored = tuple(axis for axis in MIRROR if axis in state.get("mirrored", ()))
        preprocessing.intensities(len(channels))
        named = named and channels != () and all(isinstance(name, str) for name in channels)
        if not (rising and named and fits and len(preprocessing.window) == 2) or PATCH_SIZES.fault((x, y, z)):
            raise ValueError(
                f"classes {state['classes']}, {merged}, channels {channels}, patch {state['patch']}, "
                f"window {preprocessing.window}"
            )
        network_a, network_b = build_networks(options, len(state["classes"]), len(channels))
        for name, network in (("network_a", network_a), ("network_b", network_b)):
            if not all(value.isfinite().all() and not value.is_complex() for value in state[name].values()):
                raise ValueError(f"weights of {name} are NaN, infinite or complex")
            network.load_state_dict(state[name])
        networks = network_a, network_b
        classes = dict(state["classes"])
        return Model(options, preprocessing, classes, (x, y, z), *networks, channels, merged, spacing, mirrored)
