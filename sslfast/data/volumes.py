"""From a file to the networks' grid and back: orientation, spacing, intensity, and the cache of decoded volumes."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Spacing, SpatialResample
from torch import Tensor

from sslfast.atomic_io import cache_folder, whole_file
from sslfast.data.files import free_memory, parts_of
from sslfast.data.folder import Case
from sslfast.data.nifti import (
    Volume,
    check_not_empty,
    on_grid_of,
    read_channels,
    read_header,
    read_label,
)
from sslfast.errors import MAX_CLASSES, UserError, plural
from sslfast.options import Intensity, Preprocessing

FORMAT = 3  # version of the cached files; changing it invalidates them
RESAMPLED = 40  # bytes of memory that a voxel takes while it is resampled


def image_to_grid(volume: Volume, preprocessing: Preprocessing) -> np.ndarray:
    """An image as float32 [M, X, Y, Z] on the networks' grid: reoriented to R, A, S, resampled, intensities normalised.

    Each channel is normalised by itself.

    Raises:
        UserError: all voxels are alike after clipping to the window, so that nothing is left to see; or the volume does
            not fit into memory at this spacing; or `preprocessing` names another number of channels.
    """
    kinds = preprocessing.intensities(len(volume.channels))
    return np.stack([_channel_to_grid(*each, preprocessing) for each in zip(volume.channels, kinds, strict=True)])


def _channel_to_grid(volume: Volume, intensity: Intensity, preprocessing: Preprocessing) -> np.ndarray:
    array, _ = _to_grid(volume, preprocessing.spacing, "bilinear")
    if intensity == "ct":
        low, high = preprocessing.window
        array = array.clip(low, high)
        if array.min() == array.max():
            raise UserError(
                f"every voxel is {'below' if array.min() == low else 'above'} --window {low:g} {high:g}; are these "
                "Hounsfield units? For other images choose --intensity zscore"
            )
    if intensity != "none":
        deviation = float(array.std(dtype=np.float64))
        array = (array - array.mean(dtype=np.float64)) / (deviation or 1.0)
    return np.ascontiguousarray(array, dtype=np.float32)


def label_to_grid(volume: Volume, preprocessing: Preprocessing) -> np.ndarray:
    """A label map as int16 [X, Y, Z] on the networks' grid, resampled by nearest neighbour."""
    return np.ascontiguousarray(_to_grid(volume, preprocessing.spacing, "nearest")[0], dtype=np.int16)


def from_grid(probabilities: Tensor, volume: Volume, preprocessing: Preprocessing) -> Tensor:
    """Class probabilities [C, *networks' grid] moved to the grid of `volume`: [C, X, Y, Z]."""
    volume = volume.channels[0]
    upright, affine, orientation = _upright(volume)
    if preprocessing.spacing is not None:
        _, grid_affine = _to_grid(volume, preprocessing.spacing, "nearest")
        resample = SpatialResample(mode="bilinear", padding_mode="border", align_corners=True)
        source = MetaTensor(probabilities, affine=torch.from_numpy(grid_affine))
        probabilities = resample(source, dst_affine=torch.from_numpy(affine), spatial_size=upright.shape).as_tensor()
    axes = [1 + int(axis) for axis in orientation[:, 0]]  # stored axis i is RAS axis orientation[i]
    flips = [1 + i for i, direction in enumerate(orientation[:, 1]) if direction < 0]
    return probabilities.permute(0, *axes).flip(flips).contiguous()


def grid_spacing(images: Iterable[Sequence[Path]], preprocessing: Preprocessing) -> tuple[float, float, float]:
    """The spacing of the networks' grid, mm: without `--spacing`, the median of these images along R, A and S."""
    if preprocessing.spacing is None:
        x, y, z = np.median([spacing_of(read_header(paths)) for paths in images], axis=0)
    else:
        x, y, z = preprocessing.spacing
    return float(x), float(y), float(z)


def spacing_of(volume: Volume) -> tuple[float, float, float]:
    """The spacing of a volume along R, A and S, mm."""
    x, y, z = np.linalg.norm(_upright(volume.channels[0])[1][:3, :3], axis=0)
    return float(x), float(y), float(z)


def upright_shape(volume: Volume) -> tuple[int, int, int]:
    """Voxels of a volume along R, A and S."""
    x, y, z = _upright(volume.channels[0])[0].shape
    return x, y, z


def _to_grid(volume: Volume, spacing: tuple[float, ...] | None, mode: str) -> tuple[np.ndarray, np.ndarray]:
    upright, affine, _ = _upright(volume)
    if spacing is None:
        return upright, affine
    voxels = math.prod(
        1 + (n - 1) * length / target
        for n, length, target in zip(upright.shape, np.linalg.norm(affine[:3, :3], axis=0), spacing, strict=True)
    )
    if RESAMPLED * voxels > free_memory():
        raise UserError(
            f"with --spacing {shown(spacing)} it would have {voxels:.3g} voxels, which do not fit into memory; its own "
            f"spacing is {shown(volume.spacing)} mm. Choose a larger --spacing, or "
            "correct its header."
        )
    resample = Spacing(pixdim=spacing, mode=mode, padding_mode="border", align_corners=True)
    source = MetaTensor(torch.from_numpy(upright.astype(np.float32))[None], affine=torch.from_numpy(affine))
    result = resample(source)
    return result.as_tensor()[0].numpy(), result.affine.numpy().astype(np.float64)


def shown(spacing: Iterable[float]) -> str:
    """A spacing in words: one number if all axes have the same."""
    words = [f"{length:.4g}" for length in spacing]
    return words[0] if len({*words}) == 1 else " ".join(words)


def _upright(volume: Volume) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The array reordered and flipped to R, A, S (nearest axes), its new affine, and its old orientation."""
    orientation = nib.orientations.io_orientation(volume.affine)
    array = nib.orientations.apply_orientation(volume.array, orientation)
    return array, volume.affine @ nib.orientations.inv_ornt_aff(orientation, volume.array.shape), orientation


@dataclass(frozen=True)
class DecodedCase:
    """A case on the networks' grid. Each access maps a file of the cache anew.

    So workers and processes share one copy, receive paths instead of voxels, and no map holds a file open between two
    patches: a process may open about 1,000 files.
    """

    name: str
    image_entry: Path
    label_entry: Path | None

    @property
    def image(self) -> np.ndarray:
        """[M, X, Y, Z] float32, M channels."""
        return np.load(self.image_entry, mmap_mode="c")

    @property
    def label(self) -> np.ndarray | None:
        """[X, Y, Z] int16, -1 where not annotated; None without a label map."""
        return np.load(self.label_entry, mmap_mode="c") if self.label_entry else None

    @property
    def foreground(self) -> np.ndarray | None:
        """[M, 4] int32, indices and class of the voxels of class 1 and above, by class; None without a label map."""
        return np.load(_foreground_entry(self.label_entry), mmap_mode="c") if self.label_entry else None

    def save(self, image: np.ndarray, label: np.ndarray | None) -> None:
        """Writes the arrays to the entries."""
        if self.label_entry and label is not None:
            indices = np.argwhere(label > 0)
            classes = label[tuple(indices.T)]
            foreground = np.column_stack((indices, classes))[np.argsort(classes, kind="stable")]
            _save(_foreground_entry(self.label_entry), foreground.astype(np.int32))
            _save(self.label_entry, label)
        _save(self.image_entry, image)


def decode(
    case: Case,
    preprocessing: Preprocessing,
    *,
    classes: Sequence[int] | None = None,
    merged: Mapping[int, int] | None = None,
    num_classes: int | None = None,
    ignore_label: int,
    channels: int = 1,
) -> DecodedCase:
    """Reads and checks a case at its first call; later calls find the cached arrays.

    The cache entry of an image does not depend on its label, so a case without a label never opens a label file.

    Args:
        classes: the value of each class in the label maps, rising.
        merged: further values, and the value of the class as which they count.
        num_classes: short for the classes 0 to num_classes - 1; 32 if neither is given.
        channels: M, which the image must have.

    Raises:
        UserError: see `read_channels`, `check_not_empty`, `read_label`, `on_grid_of`; or the image has not M channels.
    """
    if classes is None:
        classes = range(MAX_CLASSES if num_classes is None else num_classes)
    image_entry = _entry(case.images, preprocessing)
    plain = not merged and len(classes) > classes[-1]  # one entry serves any number of classes
    values = [] if plain else [tuple(classes), *sorted((merged or {}).items())]
    label_entry = _entry([case.label], preprocessing, ignore_label, image_entry.name, *values) if case.label else None
    decoded = DecodedCase(case.name, image_entry, label_entry)
    if not _is_whole(decoded):
        image, label = read_channels(case.images), None
        _check_channels(case, len(image.array), channels)
        check_not_empty(image, case.images)
        if case.label:
            label = read_label(case.label, classes=classes, merged=merged, ignore_label=ignore_label)
            label = on_grid_of(image, label, case.image, case.label)
        try:
            array = image_to_grid(image, preprocessing)
        except UserError as error:
            raise UserError(f"{case.image}: {error}") from error
        decoded.save(array, None if label is None else label_to_grid(label, preprocessing))
    _check_channels(case, len(decoded.image), channels)
    cached = decoded.label
    if case.label and cached is not None and cached.max(initial=0) >= len(classes):  # of more classes: raises the error
        read_label(case.label, classes=classes, merged=merged, ignore_label=ignore_label)
    return decoded


def _check_channels(case: Case, found: int, wanted: int) -> None:
    if found != wanted:
        raise UserError(
            f"{case.image} has {plural(found, 'channel')}, and the dataset {wanted}; complete or remove the case "
            f"{case.name!r}, or correct the channels in dataset.json"
        )


def _is_whole(case: DecodedCase) -> bool:
    """True if the cache holds all arrays of the case; an entry that is truncated or foreign counts as absent."""
    try:
        image, label, foreground = case.image, case.label, case.foreground
        if image.dtype != np.float32 or image.ndim != 4:
            return False
        if label is None or foreground is None:
            return True
        indices = foreground.dtype == np.int32 and foreground.ndim == 2 and foreground.shape[1] == 4
        return indices and label.dtype == np.int16 and label.shape == image.shape[1:]
    except Exception:  # of a foreign file NumPy raises whatever it stumbles over, or gives something else
        return False


def _entry(paths: Sequence[Path], *settings: object) -> Path:
    """Path in the cache of a decoded volume. It changes with its files' sizes and modification times, and settings."""
    facts: list[object] = [FORMAT]
    for path in paths:
        stats = [part.stat() for part in parts_of(path)] if path.exists() else []
        facts += [os.path.realpath(path), *(number for stat in stats for number in (stat.st_size, stat.st_mtime_ns))]
    facts += map(repr, settings)
    return cache_folder() / "volumes" / (hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32] + ".npy")


def _foreground_entry(label_entry: Path) -> Path:
    return label_entry.with_suffix(".foreground.npy")


def _save(entry: Path, array: np.ndarray) -> None:
    with whole_file(entry) as part, open(part, "wb") as file:
        np.save(file, array)
