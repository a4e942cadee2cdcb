"""From a file to the networks' grid and back: orientation, spacing, intensity, and the cache of decoded volumes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Spacing, SpatialResample
from torch import Tensor

from sslfast.atomic_io import cache_folder, whole_file
from sslfast.data.folder import Case
from sslfast.data.nifti import Volume, check_same_grid, read_image, read_label
from sslfast.errors import UserError
from sslfast.options import Preprocessing

FORMAT = 1  # version of the cached files; changing it invalidates them


def image_to_grid(volume: Volume, preprocessing: Preprocessing) -> np.ndarray:
    """An image as float32 [X, Y, Z] on the networks' grid: reoriented to R, A, S, resampled, intensities normalised."""
    array, _ = _to_grid(volume, preprocessing.spacing, "bilinear")
    if preprocessing.intensity == "ct":
        array = array.clip(*preprocessing.window)
    if preprocessing.intensity != "none":
        array = (array - array.mean(dtype=np.float64)) / max(float(array.std(dtype=np.float64)), 1e-6)
    return np.ascontiguousarray(array, dtype=np.float32)


def label_to_grid(volume: Volume, preprocessing: Preprocessing) -> np.ndarray:
    """A label map as int16 [X, Y, Z] on the networks' grid, resampled by nearest neighbour."""
    return np.ascontiguousarray(_to_grid(volume, preprocessing.spacing, "nearest")[0], dtype=np.int16)


def from_grid(probabilities: Tensor, volume: Volume, preprocessing: Preprocessing) -> Tensor:
    """Class probabilities [C, *networks' grid] moved to the grid of `volume`: [C, X, Y, Z]."""
    upright, affine, orientation = _upright(volume)
    if preprocessing.spacing is not None:
        _, grid_affine = _to_grid(volume, preprocessing.spacing, "nearest")
        resample = SpatialResample(mode="bilinear", padding_mode="border", align_corners=True)
        source = MetaTensor(probabilities, affine=torch.from_numpy(grid_affine))
        probabilities = resample(source, dst_affine=torch.from_numpy(affine), spatial_size=upright.shape).as_tensor()
    axes = [1 + int(axis) for axis in orientation[:, 0]]  # stored axis i is RAS axis orientation[i]
    flips = [1 + i for i, direction in enumerate(orientation[:, 1]) if direction < 0]
    return probabilities.permute(0, *axes).flip(flips).contiguous()


def _to_grid(volume: Volume, spacing: float | None, mode: str) -> tuple[np.ndarray, np.ndarray]:
    upright, affine, _ = _upright(volume)
    if spacing is None:
        return upright, affine
    resample = Spacing(pixdim=(spacing,) * 3, mode=mode, padding_mode="border", align_corners=True)
    source = MetaTensor(torch.from_numpy(upright.astype(np.float32))[None], affine=torch.from_numpy(affine))
    result = resample(source)
    return result.as_tensor()[0].numpy(), result.affine.numpy().astype(np.float64)


def _upright(volume: Volume) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The array reordered and flipped to R, A, S (nearest axes), its new affine, and its old orientation."""
    orientation = nib.orientations.io_orientation(volume.affine)
    array = nib.orientations.apply_orientation(volume.array, orientation)
    return array, volume.affine @ nib.orientations.inv_ornt_aff(orientation, volume.array.shape), orientation


@dataclass(frozen=True)
class DecodedCase:
    """A case on the networks' grid, memory-mapped, so that workers and processes share one copy."""

    name: str
    image: np.ndarray  # [X, Y, Z] float32
    label: np.ndarray | None  # [X, Y, Z] int16, -1 where not annotated
    foreground: np.ndarray | None  # [M, 3] int32, indices of the voxels of class 1 and above


def decode(case: Case, preprocessing: Preprocessing, *, num_classes: int, ignore_label: int) -> DecodedCase:
    """Reads and checks a case at its first call; later calls map the cached arrays.

    The cache entry of an image does not depend on its label, so a case without a label never opens a label file.

    Raises:
        UserError: see `read_image`, `read_label`, `check_same_grid`.
    """
    image_entry = _entry(case.image, preprocessing)
    label_entry = _entry(case.label, preprocessing, ignore_label, image_entry.name) if case.label else None
    if not image_entry.exists() or (label_entry and not label_entry.exists()):
        image = read_image(case.image)
        if case.label and label_entry:
            label = read_label(case.label, num_classes=num_classes, ignore_label=ignore_label)
            check_same_grid(image, label, case.image, case.label)
            _save(label_entry, label_to_grid(label, preprocessing))
        _save(image_entry, image_to_grid(image, preprocessing))
    label_array = foreground = None
    if case.label and label_entry:
        label_array = np.load(label_entry, mmap_mode="c")
        if label_array.max(initial=0) >= num_classes:  # cached for more classes: this raises the error
            read_label(case.label, num_classes=num_classes, ignore_label=ignore_label)
        foreground = np.argwhere(label_array > 0).astype(np.int32)
    return DecodedCase(case.name, np.load(image_entry, mmap_mode="c"), label_array, foreground)


def count_classes(cases: tuple[Case, ...], ignore_label: int) -> int:
    """The number of classes in the label maps of `cases`: the highest label + 1, at least 2."""
    top = 1
    for case in cases:
        if case.label:
            top = max(top, int(read_label(case.label, ignore_label=ignore_label).array.max(initial=0)))
            if top > 31:
                raise UserError(f"{case.label}: the labels reach {top}; they must be 0 to 31. Is this file an image?")
    return top + 1


def _entry(path: Path, *settings: object) -> Path:
    """Path in the cache of a decoded file. It changes with the file's size, its modification time and the settings."""
    stat = path.stat() if path.is_file() else None
    facts = [FORMAT, str(path.resolve()), stat and stat.st_size, stat and stat.st_mtime_ns, *map(repr, settings)]
    return cache_folder() / "volumes" / (hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32] + ".npy")


def _save(entry: Path, array: np.ndarray) -> None:
    with whole_file(entry) as part, open(part, "wb") as file:
        np.save(file, array)
