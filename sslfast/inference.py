"""Class probabilities of whole volumes: sliding windows, mean of the softmax of both networks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from monai.data.utils import compute_importance_map, dense_patch_slices
from torch import Tensor
from torch.nn import functional as F

from sslfast.data.mirror import AXES, other_sides
from sslfast.errors import UserError
from sslfast.model import Model
from sslfast.options import Device, Precision, Windows
from sslfast.precision import autocast_dtype
from sslfast.quality import WindowScores


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
    model: Model,
    image: np.ndarray,
    *,
    precision: Precision = "auto",
    windows: Windows | None = None,
    scores: WindowScores | None = None,
    details: Sequence[Callable[[Tensor], Tensor]] = (),
) -> Iterator[Tensor]:
    """Class probabilities of a preprocessed volume: the mean of both networks' softmax, averaged over windows.

    Windows are blended on the networks' device. A slab of rows along the first axis is yielded as soon as no further
    window reaches it, so that only the thickness of a patch is held at a time. With constant weights and strides 18, 18
    and 4 this is the test protocol of arXiv 2311.12617.

    Args:
        model: model with networks in evaluation mode.
        image: [M, X, Y, Z] float32 on the networks' grid, with the model's channels.
        windows: positions and weights of the windows.
        scores: counts each window.
        details: make of both networks' probabilities [2, C, D, H, W] further maps [D, H, W], which are blended too.

    Yields:
        [C, rows, Y, Z] float32 on the CPU, from the first row to the last; the further maps follow the classes.

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
    inside: Tensor | None = None
    if any(missing):
        inside = torch.zeros(scan.shape[1:], device=device)
        inside[(first, *inner)] = 1
    strides = windows.strides or tuple(max(1, int(p * (1 - windows.overlap))) for p in patch)
    locations = dense_patch_slices(scan.shape[1:], patch, [min(s, p) for s, p in zip(strides, patch, strict=True)])
    weight = compute_importance_map(patch, mode=windows.blend, device=device)
    at_once = windows.at_once or (4 if device.type == "cuda" else 1)

    maps = len(model.classes) + len(details)
    sums = torch.zeros(maps, patch[0], *scan.shape[2:], device=device)  # rows from `begin` on
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
            by_network = _network_probabilities(model, patches, dtype, windows.mirror)
            for i, (_, *plane) in enumerate(group):
                sums[: len(model.classes), :, plane[0], plane[1]] += weight * by_network[:, i].mean(0)
                weights[:, plane[0], plane[1]] += weight
                for number, detail in enumerate(details, len(model.classes)):
                    sums[number, :, plane[0], plane[1]] += weight * detail(by_network[:, i])
                if scores is not None:
                    scores.add(by_network[:, i], weight if inside is None else weight * inside[group[i]])
    yield _mean(sums, weights, begin, begin + patch[0], first, inner)


def _network_probabilities(model: Model, patches: Tensor, dtype: torch.dtype | None, mirror: bool) -> Tensor:
    """Probabilities [2, N, C, D, H, W] float32 of both networks for patches [N, M, D, H, W].

    With `mirror` the mean over the patches as they are and mirrored along each of the model's axes.
    """
    axes = [AXES[axis] for axis in model.mirrored] if mirror else []
    others = other_sides([*model.classes.values()])
    sums: Tensor | None = None
    for flips in itertools.chain.from_iterable(itertools.combinations(axes, n) for n in range(len(axes) + 1)):
        dims = [axis - 3 for axis in flips]
        with torch.autocast(patches.device.type, dtype=dtype, enabled=dtype is not None):
            logits = [network(patches.flip(dims))[0] for network in (model.network_a, model.network_b)]
        probabilities = torch.stack([of.float().softmax(1) for of in logits]).flip(dims)
        if AXES["left-right"] in flips and others:
            probabilities = probabilities[:, :, others]
        sums = probabilities if sums is None else sums + probabilities
    assert sums is not None
    return sums / 2 ** len(axes) if axes else sums


def _mean(sums: Tensor, weights: Tensor, begin: int, end: int, first: slice, inner: Sequence[slice]) -> Tensor:
    """Mean probabilities of the rows from `begin`, where the sums start, to `end`, without padding."""
    rows = slice(max(first.start - begin, 0), min(end, first.stop) - begin)
    return (sums[:, rows, inner[0], inner[1]] / weights[rows, inner[0], inner[1]]).cpu()


def predict_probabilities(
    model: Model, image: np.ndarray, *, precision: Precision = "auto", windows: Windows | None = None
) -> Tensor:
    """All slabs of `probability_slabs` together: [C, X, Y, Z] float32 on the CPU."""
    return torch.cat(list(probability_slabs(model, image, precision=precision, windows=windows)), 1)
