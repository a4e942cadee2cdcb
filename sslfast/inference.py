"""Segmentation of whole volumes: sliding windows, mean of the softmax of both networks."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from monai.data.utils import compute_importance_map, dense_patch_slices
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from sslfast.atomic_io import make_folder
from sslfast.data.dicom_seg import make_dicom_seg, write_dicom_seg
from sslfast.data.nifti import OWN, Volume, check_not_empty, read_channels, write_label
from sslfast.data.volumes import from_grid, image_to_grid, shown, spacing_of
from sslfast.errors import UserError, plural
from sslfast.model import Model
from sslfast.options import Device, Precision, Windows
from sslfast.precision import autocast_dtype

OTHER_SPACING = 0.2  # share by which a volume's spacing may differ from that in training without a warning


def choose_device(name: Device) -> torch.device:
    """The device named by `--device`.

    Raises:
        UserError: there is no GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this torch sees no GPU; `python -m sslfast.doctor` says why. Use --device cpu.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


@torch.inference_mode()
def probability_slabs(
    model: Model, image: np.ndarray, *, precision: Precision = "auto", windows: Windows | None = None
) -> Iterator[Tensor]:
    """Class probabilities of a preprocessed volume: the mean of both networks' softmax, averaged over windows.

    Windows are blended on the networks' device. A slab of rows along the first axis is yielded as soon as no further
    window reaches it, so that only the thickness of a patch is held at a time. With constant weights and strides 18, 18
    and 4 this is the test protocol of arXiv 2311.12617.

    Args:
        model: model with networks in evaluation mode.
        image: [M, X, Y, Z] float32 on the networks' grid, with the model's channels.
        windows: positions and weights of the windows.

    Yields:
        [C, rows, Y, Z] float32 on the CPU, from the first row to the last.

    Raises:
        ValueError: the image has another shape.
    """
    if image.ndim != 4 or len(image) != len(model.channels):
        raise ValueError(f"image has shape {image.shape}; it must be [{len(model.channels)}, X, Y, Z]")
    windows = windows or Windows()
    device = next(model.network_a.parameters()).device
    dtype = autocast_dtype(precision, device)
    patch, size = model.patch, image.shape[1:]
    missing = [max(p - s, 0) for p, s in zip(patch, size, strict=True)]
    scan = torch.from_numpy(np.asarray(image))
    if any(missing):
        margins = [m for n in reversed(missing) for m in (n // 2, n - n // 2)]
        scan = torch.stack([F.pad(channel, margins, value=float(channel.min())) for channel in scan])
    first, *inner = (slice(n // 2, n // 2 + s) for n, s in zip(missing, size, strict=True))  # without padding
    strides = windows.strides or tuple(max(1, int(p * (1 - windows.overlap))) for p in patch)
    locations = dense_patch_slices(scan.shape[1:], patch, [min(s, p) for s, p in zip(strides, patch, strict=True)])
    weight = compute_importance_map(patch, mode=windows.blend, device=device)
    at_once = windows.at_once or (4 if device.type == "cuda" else 1)

    sums = torch.zeros(len(model.classes), patch[0], *scan.shape[2:], device=device)  # rows from `begin` on
    weights = torch.zeros(sums.shape[1:], device=device)
    begin = 0
    for start, row in itertools.groupby(locations, key=lambda location: location[0].start):
        if start > begin:
            yield _mean(sums, weights, begin, start, first, inner)
            for buffer in (sums, weights.unsqueeze(0)):
                kept = patch[0] - (start - begin)
                buffer[:, :kept] = buffer[:, start - begin :].clone()
                buffer[:, kept:] = 0
            begin = int(start)
        of_row = list(row)
        for group in (of_row[i : i + at_once] for i in range(0, len(of_row), at_once)):
            patches = torch.stack([scan[(slice(None), *location)] for location in group]).to(device)
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                logits = [network(patches)[0] for network in (model.network_a, model.network_b)]
            mean_probabilities = (logits[0].float().softmax(1) + logits[1].float().softmax(1)) / 2
            for (_, *plane), probabilities in zip(group, mean_probabilities, strict=True):
                sums[:, :, plane[0], plane[1]] += weight * probabilities
                weights[:, plane[0], plane[1]] += weight
    yield _mean(sums, weights, begin, begin + patch[0], first, inner)


def _mean(sums: Tensor, weights: Tensor, begin: int, end: int, first: slice, inner: Sequence[slice]) -> Tensor:
    """Mean probabilities of the rows from `begin`, where the sums start, to `end`, without padding."""
    rows = slice(max(first.start - begin, 0), min(end, first.stop) - begin)
    return (sums[:, rows, inner[0], inner[1]] / weights[rows, inner[0], inner[1]]).cpu()


def predict_probabilities(
    model: Model, image: np.ndarray, *, precision: Precision = "auto", windows: Windows | None = None
) -> Tensor:
    """All slabs of `probability_slabs` together: [C, X, Y, Z] float32 on the CPU."""
    return torch.cat(list(probability_slabs(model, image, precision=precision, windows=windows)), 1)


def segment(
    model: Model, volume: Volume, *, precision: Precision = "auto", windows: Windows | None = None
) -> np.ndarray:
    """The label map of a volume on its own grid: [X, Y, Z] with the classes' values.

    If the model does not resample, only a slab of probabilities is held at a time.
    """
    values = np.array([*model.classes], np.uint8 if max(model.classes) < 256 else np.int16)  # of the classes, by index
    image = image_to_grid(volume, model.preprocessing)
    if model.preprocessing.spacing is None:
        slabs = probability_slabs(model, image, precision=precision, windows=windows)
        labels = torch.cat([slab.argmax(0).to(torch.uint8) for slab in slabs])
        return values[from_grid(labels.unsqueeze(0), volume, model.preprocessing)[0].numpy()]
    probabilities = predict_probabilities(model, image, precision=precision, windows=windows)
    best = torch.zeros(volume.shape)
    labels = torch.zeros(volume.shape, dtype=torch.uint8)
    for label, of_class in enumerate(probabilities.unsqueeze(1)):  # resampled one class at a time to save memory
        probability = from_grid(of_class, volume, model.preprocessing)[0]
        labels[probability > best] = label
        best = torch.maximum(best, probability)
    return values[labels.numpy()]


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


def predict_cases(
    model: Model,
    images: Mapping[str, Sequence[Path]],
    output: Path,
    precision: Precision = "auto",
    windows: Windows | None = None,
    descriptions: Mapping[str, str] | None = None,
    dicom_seg: bool = False,
) -> None:
    """Segments every volume and writes `output`/<case>.nii.gz.

    Args:
        images: the files of each case's channels.
        descriptions: the description in the header of each case's segmentation.
        dicom_seg: the volumes are DICOM series, and `output`/<case>.dcm is written as well.

    Raises:
        UserError: some volumes could not be segmented; raised after all the others are. Or the folder cannot be
            written.
    """
    make_folder(output)
    failed = []
    for name, paths in tqdm(images.items(), desc="segment", unit="volume", leave=False):
        try:
            volume = read_channels(paths)
            if len(volume.array) != len(model.channels):
                has, names = plural(len(volume.array), "channel"), ", ".join(model.channels)
                raise UserError(f"{paths[0]} has {has}; the networks were trained with {len(model.channels)}: {names}")
            check_not_empty(volume, paths)
            if warning := other_spacing(model, volume):
                tqdm.write(f"warning: {paths[0]}: {warning}", file=sys.stderr)
            labels = segment(model, volume, precision=precision, windows=windows)
            description = (descriptions or {}).get(name, OWN)
            segmentation = make_dicom_seg(labels, model.classes, paths[0], description) if dicom_seg else None
        except Exception as error:  # whatever it is, the other volumes do not depend on it
            cause = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            failed.append(f"- {'' if str(paths[0]) in str(error) else f'{paths[0]}: '}{cause}{error}")
            continue
        write_label(output / f"{name}.nii.gz", labels, volume, description)
        if segmentation is not None:
            write_dicom_seg(output / f"{name}.dcm", segmentation)
    if failed:
        raise UserError(f"{len(failed)} of {len(images)} volumes could not be segmented:\n" + "\n".join(failed))
