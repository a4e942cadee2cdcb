"""Segments volumes with a trained pair of networks, on the volumes' own grids, and says how far to trust the result."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from tempfile import TemporaryFile

import nibabel as nib
import numpy as np
import torch
from torch import Tensor

from sslfast.data.nifti import Volume, check_not_empty, read_channels
from sslfast.data.volumes import from_grid, image_to_grid, shown, spacing_of
from sslfast.errors import UserError, plural
from sslfast.inference import choose_device, predict_probabilities, probability_slabs
from sslfast.model import Model
from sslfast.options import Device, Precision, Windows
from sslfast.quality import (
    SCORES,
    WindowScores,
    disagreement,
    entropy_of,
    largest_components,
    measure,
    most_probable,
    mutual_information,
)
from sslfast.training.checkpoint import load_model

Given = str | PathLike[str] | Sequence[str | PathLike[str]] | np.ndarray
"""A volume: a file, a file for each channel, or an array."""
OTHER_SPACING = 0.2  # share by which a volume's spacing may differ from that in training without a warning


@dataclass(frozen=True)
class Extras:
    """What is made of a volume besides its segmentation."""

    largest: tuple[int, ...] = ()
    """Values of the classes of which only the largest connected component is kept."""
    probabilities: tuple[int, ...] = ()
    """Values of the classes whose probabilities are written."""
    uncertainty: bool = False
    """Entropy of the mean probabilities and mutual information of the networks, in nats."""
    disagreement: bool = False
    """The share of the windows in which the networks' classes differ, weighted as the windows are."""

    @property
    def details(self) -> list[Callable[[Tensor], Tensor]]:
        """Those of `probability_slabs`."""
        of_uncertainty = [mutual_information] if self.uncertainty else []
        return [*of_uncertainty, *([disagreement] if self.disagreement else [])]

    def names(self, classes: Mapping[int, str]) -> list[str]:
        """Paths of the maps within the output folder, with {} for the case."""
        paths = [f"probabilities/{{}}_{value}-{file_word(classes[value])}" for value in self.probabilities]
        paths += ["uncertainty/{}_entropy", "uncertainty/{}_mutual-information"] if self.uncertainty else []
        return [f"{path}.nii.gz" for path in [*paths, *(["disagreement/{}"] if self.disagreement else [])]]


@dataclass(frozen=True)
class Segmentation:
    """The segmentation of a volume, on its own grid."""

    labels: np.ndarray
    """[X, Y, Z] with the classes' values."""
    quality: dict[str, dict[str, float]]
    """`sslfast.quality.MEASURES` of each class but the background, by name."""
    maps: np.ndarray | None = None
    """[K, *networks' grid] float32, those of `Extras.names`; on disk."""


def segment(
    model: Model,
    volume: Volume,
    *,
    precision: Precision = "auto",
    windows: Windows | None = None,
    extras: Extras | None = None,
    scratch: Path | None = None,
) -> Segmentation:
    """Segments a volume and measures what is known of the result.

    If the model does not resample, only a slab of probabilities is held at a time. Maps are in a file without a name
    in the folder `scratch`; None: that for temporary files.
    """
    extras = extras or Extras()
    image = image_to_grid(volume, model.preprocessing)
    scores = WindowScores(len(model.classes))
    maps = _on_disk((len(extras.names(model.classes)), *image.shape[1:]), scratch)
    slabs = probability_slabs(model, image, precision=precision, windows=windows, scores=scores, details=extras.details)
    if maps is not None:
        slabs = _kept(slabs, maps, extras, [*model.classes])
    labels = _most_probable(slabs, volume, model)
    foreground = [*model.classes][1:]
    if extras.largest:
        largest_components(labels, extras.largest)
    measures = measure(labels, foreground, math.prod(volume.spacing) / 1000)
    by_score = scores.scores()
    quality = {
        model.classes[value]: {**measured, **{name: by_score[name][c] for name in SCORES}}
        for c, (value, measured) in enumerate(zip(foreground, measures, strict=True))
    }
    return Segmentation(labels, quality, maps)


def _most_probable(slabs: Iterator[Tensor], volume: Volume, model: Model) -> np.ndarray:
    """The label map of a volume on its own grid: [X, Y, Z] with the classes' values."""
    values = np.array([*model.classes], np.uint8 if max(model.classes) < 256 else np.int16)  # of the classes, by index
    if model.preprocessing.spacing is None:
        labels = torch.cat([most_probable(slab) for slab in slabs])
        return values[from_grid(labels.unsqueeze(0), volume, model.preprocessing)[0].numpy()]
    probabilities = torch.cat(list(slabs), 1)
    best = torch.zeros(volume.shape)
    labels = torch.zeros(volume.shape, dtype=torch.uint8)
    for label, of_class in enumerate(probabilities.unsqueeze(1)):  # resampled one class at a time to save memory
        probability = from_grid(of_class, volume, model.preprocessing)[0]
        labels[probability > best] = label
        best = torch.maximum(best, probability)
    return values[labels.numpy()]


def _on_disk(shape: tuple[int, ...], folder: Path | None) -> np.ndarray | None:
    """A float32 array in a file without a name, which goes when the array does; None if it would hold no map.

    Raises:
        OSError: the disk is full. A map of a file that is not there as a whole would end the process.
    """
    if not shape[0]:
        return None
    with TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, 4 * math.prod(shape))
        return np.memmap(file, np.float32, shape=shape)


def _kept(slabs: Iterator[Tensor], maps: np.ndarray, extras: Extras, values: Sequence[int]) -> Iterator[Tensor]:
    """The probabilities of the slabs, whose maps are written to `maps`."""
    begin = 0
    for slab in slabs:
        probabilities, details = slab[: len(values)], slab[len(values) :]
        rows = [probabilities[values.index(value)] for value in extras.probabilities]
        rows += [entropy_of(probabilities, 0)] if extras.uncertainty else []
        rows += [*details]
        for of, row in zip(maps, rows, strict=True):
            of[begin : begin + row.shape[0]] = row.numpy()
        begin += slab.shape[1]
        yield probabilities


def file_word(name: str) -> str:
    """A class name as part of a file name."""
    return re.sub(r"[^\w-]+", "-", name).strip("-")[:60] or "class"


def other_spacing(model: Model, volume: Volume) -> str:
    """A warning if a volume has another spacing than those in training, and the model does not resample; else empty."""
    if model.preprocessing.spacing is not None or model.spacing is None:
        return ""
    own = spacing_of(volume)
    if all(abs(a / b - 1) <= OTHER_SPACING for a, b in zip(own, model.spacing, strict=True)):
        return ""
    return (
        f"its voxels have {shown(own)} mm, those in training had {shown(model.spacing)}, and these networks take "
        "voxels as they are; train with --spacing for volumes of several spacings"
    )


class Segmenter:
    """A trained pair of networks that segments volumes.

        segmenter = sslfast.load("runs/mine")
        result = segmenter.segment("scan.nii.gz")
        result.labels                  # [X, Y, Z] with the classes' values, on the scan's grid
        result.quality["atrium"]       # volume_ml, agreement, entropy, mutual_information, components, touches_border
        segmenter.segment(array, spacing=(0.7, 0.7, 3))

    A volume is a file (NIfTI, NRRD, MetaImage, a folder with a DICOM series), a sequence of files with a channel each,
    or an array [X, Y, Z] or [M, X, Y, Z] whose axes run from left to right, back to front and foot to head. An array
    needs its `spacing` along these axes, mm.

    The methods raise UserError: the volume cannot be read, has other channels than the networks, or no spacing.
    """

    def __init__(
        self,
        model: Model,
        *,
        precision: Precision = "auto",
        windows: Windows | None = None,
        largest: Sequence[int] = (),
    ) -> None:
        """Networks in evaluation mode on their device; `largest`: values of classes that keep one component."""
        check_windows(model, windows)
        self.model = model
        self.precision: Precision = precision
        self.windows = windows
        self.extras = Extras(largest=tuple(largest))

    @property
    def classes(self) -> dict[int, str]:
        """Class names by their values in the label maps, the background's 0 first."""
        return dict(self.model.classes)

    def segment(self, volume: Given, *, spacing: Sequence[float] | None = None) -> Segmentation:
        """The label map of a volume on its own grid, and what is known of its quality."""
        return segment(
            self.model,
            as_volume(volume, self.model, spacing),
            precision=self.precision,
            windows=self.windows,
            extras=self.extras,
        )

    def probabilities(self, volume: Given, *, spacing: Sequence[float] | None = None) -> np.ndarray:
        """Class probabilities [C, X, Y, Z] float32 of a volume on its own grid: the mean of both networks."""
        taken = as_volume(volume, self.model, spacing)
        image = image_to_grid(taken, self.model.preprocessing)
        of = predict_probabilities(self.model, image, precision=self.precision, windows=self.windows)
        return from_grid(of, taken, self.model.preprocessing).numpy()

    def agreement(self, volume: Given, *, spacing: Sequence[float] | None = None) -> dict[str, float]:
        """Dice between the two networks' own predictions, by class; nan where neither predicts the class."""
        quality = self.segment(volume, spacing=spacing).quality
        return {name: measured["agreement"] for name, measured in quality.items()}


def load(
    path: str | PathLike[str],
    *,
    device: Device = "auto",
    precision: Precision = "auto",
    windows: Windows | None = None,
    largest: Sequence[int] = (),
) -> Segmenter:
    """Loads the networks of a run for segmentation.

    Args:
        path: folder of a run (for its last checkpoint), or a checkpoint file. Nothing in it is executed.
        device: auto: the GPU if there is one, else the CPU.
        precision: auto: bf16 if the hardware multiplies it natively, else fp32.
        windows: positions and weights of the sliding windows; None: as `predict`.
        largest: values of classes of which only the largest connected component is kept.

    Raises:
        UserError: there is no checkpoint, it is damaged or of another version; there is no GPU; or the windows shall be
            mirrored, and those in training were not.
    """
    model = load_model(Path(path)).to(choose_device(device))
    if unknown := {*largest} - {*model.classes} | {*largest} & {0}:
        raise UserError(f"largest: {sorted(unknown)} are no values of classes; these are {[*model.classes][1:]}")
    return Segmenter(model, precision=precision, windows=windows, largest=largest)


def chosen_values(
    flag: str, entries: Sequence[str], classes: Mapping[int, str], background: bool = True
) -> tuple[int, ...]:
    """The values of the classes that a flag names, by name or value, or all of them.

    Raises:
        UserError: there is no such class.
    """
    possible = {value: name for value, name in classes.items() if background or value > 0}
    by_word = {str(value): value for value in possible} | {name: value for value, name in possible.items()}
    if entries == ("all",) and "all" not in by_word:
        return tuple(possible)
    if unknown := [entry for entry in entries if entry not in by_word]:
        names = ", ".join(f"{name} ({value})" for value, name in possible.items())
        raise UserError(f"{flag} {unknown[0]}: the networks have no such class; choose from {names}, or say all")
    return tuple(sorted({by_word[entry] for entry in entries}))


def check_windows(model: Model, windows: Windows | None) -> None:
    """Raises UserError if the windows shall be mirrored, and no volume was in training."""
    if windows and windows.mirror and not model.mirrored:
        raise UserError(
            "--mirror: these networks were trained without mirrored volumes, and may take left for right, or by an "
            "earlier version, which did not record it; leave it out, or train with --augment all"
        )


def as_volume(given: Given, model: Model, spacing: Sequence[float] | None = None) -> Volume:
    """The volume of a file, of a file for each channel, or of an array with its spacing; see `Segmenter`.

    Raises:
        UserError: it cannot be read, is empty, or has other channels than the networks.
    """
    if isinstance(given, np.ndarray):
        volume, where = _of_array(given, spacing), [Path("the array")]
    elif spacing is not None:
        raise UserError("spacing belongs to an array; a file has its own")
    else:
        where = [Path(given)] if isinstance(given, (str, PathLike)) else [Path(path) for path in given]
        if not where:
            raise UserError("there is no file to segment")
        volume = read_channels(where)
    if len(volume.array) != len(model.channels):
        has, names = plural(len(volume.array), "channel"), ", ".join(model.channels)
        raise UserError(f"{where[0]} has {has}; the networks were trained with {len(model.channels)}: {names}")
    check_not_empty(volume, where)
    return volume


def _of_array(array: np.ndarray, spacing: Sequence[float] | None) -> Volume:
    if array.ndim not in (3, 4) or array.dtype.kind not in "biuf" or 0 in array.shape:
        raise UserError(
            f"the array has shape {array.shape} and dtype {array.dtype}; it must be numbers, [X, Y, Z] or [M, X, Y, Z]"
        )
    if spacing is None or len(spacing) != 3 or not all(0 < length < math.inf for length in spacing):
        given = "has none" if spacing is None else f"has {tuple(spacing)}"
        raise UserError(f"an array needs its spacing, three positive numbers in mm along X, Y and Z; this one {given}")
    if not np.isfinite(array).all():
        raise UserError("the array has voxels that are NaN or infinite; replace them")
    affine = np.diag([*spacing, 1.0])
    header = nib.Nifti1Image(np.zeros((1, 1, 1), np.uint8), affine).header
    header.set_xyzt_units("mm")
    channels = array[None] if array.ndim == 3 else array
    return Volume(np.ascontiguousarray(channels, np.float32), affine, header)
