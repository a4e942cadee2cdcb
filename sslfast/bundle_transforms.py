"""What a MONAI bundle made by sslfast (Apache-2.0) has beyond MONAI's own transforms.

`sslfast.bundle` copies this file to scripts/transforms.py of a bundle. It needs MONAI and nibabel, not sslfast.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor, NibabelReader, NibabelWriter
from monai.inferers import SlidingWindowInferer
from monai.transforms import Compose, Invertd, MapTransform
from nibabel.funcs import squeeze_image
from nibabel.orientations import io_orientation
from torch import Tensor
from torch.nn import functional as F

MM = {"meter": 1e3, "micron": 1e-3}  # per unit of a header's affine; others are mm
SAME_PLACE = 0.1  # voxels by which the corners of two channels may differ, for headers are rounded


def find_scans(folder: str, channels: int) -> list[dict[str, Any]]:
    """The scans in a folder, by name: each has its files under "image" and its name under "case".

    The files are case.nii.gz, or case_0000.nii.gz, case_0001.nii.gz and so on with a channel each.

    Raises:
        ValueError: there is none, two have one name, or a channel lacks.
    """
    names = {
        path: re.sub(r"\.nii(\.gz)?$", "", path.name, flags=re.IGNORECASE)
        for path in sorted(Path(folder).iterdir())
        if path.name.lower().endswith((".nii", ".nii.gz")) and not path.name.startswith(".")
    }
    if not names:
        raise ValueError(f"{folder} holds no NIfTI files, *.nii.gz or *.nii")
    numbered = channels > 1 or all(name.endswith("_0000") for name in names.values())
    scans: dict[str, list[str]] = {}
    for path, name in names.items():
        match = re.fullmatch(r"(.+)_(\d{4})", name) if numbered else None
        files = scans.setdefault(match[1] if match else name, [])
        if (int(match[2]) if match else 0) != len(files):
            raise ValueError(f"{path} follows {files or 'no other file'}; a channel lacks, or is there twice")
        files.append(str(path))
    for name, files in scans.items():
        if len(files) not in (1, channels):
            raise ValueError(f"{folder}: {name} has {len(files)} channels, not {channels}")
    return [{"image": files, "case": name} for name, files in scans.items()]


class ScanReader(NibabelReader):
    """Reads NIfTI files with the affine of the header, in mm; further channels onto the grid of the first."""

    def read(self, data: Any, **kwargs: Any) -> Any:
        """The image of a file, or of each file.

        Raises:
            ValueError: the channels do not lie on one grid.
        """
        self.filenames = (data,) if isinstance(data, (str, Path)) else tuple(data)
        images = [_in_mm(nib.load(path, **kwargs)) for path in self.filenames]
        for number, image in enumerate(images[1:], 1):
            images[number] = self._on_grid_of(images[0], image)
        return images if len(images) > 1 else images[0]

    def _on_grid_of(self, first: Any, other: Any) -> Any:
        to_voxels = np.linalg.inv(first.affine)
        other = other.as_reoriented(io_orientation(to_voxels @ other.affine))
        corners = np.array(np.meshgrid(*[(0, n - 1) for n in first.shape[:3]], [1])).reshape(4, -1)
        apart = np.abs(to_voxels @ (other.affine - first.affine) @ corners).max()
        if other.shape != first.shape or apart > SAME_PLACE:
            raise ValueError(f"{self.filenames}: the channels do not lie on one grid; resample them onto the first")
        return type(other)(other.dataobj, first.affine, other.header)


def _in_mm(image: Any) -> Any:
    image = squeeze_image(image)  # of axes of one voxel behind the third
    try:
        unit = MM.get(image.header.get_xyzt_units()[0], 1.0)
    except KeyError:  # a code that no standard has
        unit = 1.0
    return type(image)(image.dataobj, np.diag([unit, unit, unit, 1.0]) @ image.affine, image.header)


class NormaliseChannelsd(MapTransform):
    """Intensities of each channel by itself.

    zscore: zero mean and unit variance over the volume. ct: clip to the window, then zscore. none: as stored.

    Raises:
        ValueError: there is another number of channels, or nothing to see in one of them.
    """

    def __init__(self, keys: Sequence[str], intensity: Sequence[str], window: Sequence[float] = ()) -> None:
        super().__init__(keys)
        self.intensity = intensity
        self.window = window

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The same data with other intensities."""
        data = dict(data)
        for key in self.keys:
            image = data[key]
            name = image.meta.get("filename_or_obj", key)
            if image.ndim != 4 or len(image) != len(self.intensity):
                raise ValueError(f"{name} has shape {tuple(image.shape)}; it must be [{len(self.intensity)}, X, Y, Z]")
            channels = [self._normalise(*each, name) for each in zip(image.numpy(), self.intensity, strict=True)]
            data[key] = MetaTensor(
                torch.from_numpy(np.stack(channels)), meta=image.meta, applied_operations=image.applied_operations
            )
        return data

    def _normalise(self, array: np.ndarray, intensity: str, name: str) -> np.ndarray:
        if not np.isfinite(array).all():
            raise ValueError(f"{name} has voxels that are NaN or infinite; replace them")
        if intensity == "ct":
            low, high = self.window
            array = array.clip(low, high)
        if array.min() == array.max():
            clipped = f" when clipped to {self.window}" if intensity == "ct" else ""
            raise ValueError(f"{name} is empty: every voxel is {array.min():g}{clipped}")
        if intensity != "none":
            array = (array - array.mean(dtype=np.float64)) / array.std(dtype=np.float64)
        return array.astype(np.float32)


class PaddedWindowInferer(SlidingWindowInferer):
    """Sliding windows; a volume smaller than a window is padded with the lowest value of each channel."""

    def __call__(self, inputs: Tensor, network: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The network's output [N, C, X, Y, Z] for images [N, M, X, Y, Z]."""
        inputs = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        size = inputs.shape[2:]
        missing = [max(window - n, 0) for window, n in zip(self.roi_size, size, strict=True)]
        if not any(missing):
            output: Tensor = super().__call__(inputs, network, *args, **kwargs)
            return output
        margins = [m for n in reversed(missing) for m in (n // 2, n - n // 2)]
        padded = [F.pad(channel, margins, value=float(channel.min())) for channel in inputs.flatten(0, 1)]
        output = super().__call__(torch.stack(padded).unflatten(0, inputs.shape[:2]), network, *args, **kwargs)
        inner = [slice(m // 2, m // 2 + n) for m, n in zip(missing, size, strict=True)]
        return output[:, :, inner[0], inner[1], inner[2]]


class MostProbabled(MapTransform):
    """The label map of class probabilities, on the grid of the scan.

    Takes the probabilities back one class at a time, to save memory, by the inverse of `transform`.
    """

    def __init__(self, keys: Sequence[str], values: Sequence[int], transform: Compose, orig_keys: str) -> None:
        super().__init__(keys)
        self.values = values
        self.image = orig_keys
        self.invert = Invertd(keys="of_class", transform=transform, orig_keys=orig_keys, nearest_interp=False)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The same data with values of classes [1, X, Y, Z] in the place of probabilities [C, *networks' grid]."""
        data = dict(data)
        image = data[self.image]
        for key in self.keys:
            best: Tensor = torch.zeros(())
            labels: Tensor | None = None
            for value, of_class in zip(self.values, data[key].split(1), strict=True):
                to_scan = {self.image: image, "of_class": MetaTensor(of_class.cpu())}
                probability = self.invert(to_scan)["of_class"].as_tensor()
                if labels is None:
                    labels = torch.full(probability.shape, value, dtype=torch.int16)
                labels[probability > best] = value
                best = torch.maximum(best, probability)
            meta = {"filename_or_obj": f"{data['case']}.nii.gz" if "case" in data else image.meta["filename_or_obj"]}
            data[key] = MetaTensor(labels, affine=torch.as_tensor(image.meta["original_affine"]), meta=meta)
        return data


class LabelWriter(NibabelWriter):
    """Writes label maps [1, X, Y, Z] as [X, Y, Z], whatever the sizes; MONAI's drops a last axis of one voxel."""

    def set_data_array(self, data_array: Any, *args: Any, **kwargs: Any) -> None:
        """Takes the voxels."""
        self.data_obj = data_array[0]
