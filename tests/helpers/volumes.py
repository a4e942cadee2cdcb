"""Small datasets on disk."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from helpers.options import SEED
from sslfast.data.volumes import DecodedCase


def noise(*size: int) -> np.ndarray:
    """Normally distributed float32, of torch's generator, which the test's seed sets."""
    return torch.randn(*size).numpy()


def write_volume(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    """Writes a NIfTI file and gives its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([2.0, 2.0, 2.0, 1.0]) if affine is None else affine), path)
    return path


def decoded_case(folder: Path, name: str, image: np.ndarray, label: np.ndarray | None = None) -> DecodedCase:
    """A case on the networks' grid, in files in `folder`; an image [X, Y, Z] is its only channel."""
    case = DecodedCase(name, folder / f"{name}.image.npy", None if label is None else folder / f"{name}.label.npy")
    case.save(image if image.ndim == 4 else image[None], label)
    return case


def write_cases(
    folder: Path, cases: int, labelled: int, size: tuple[int, int, int] = (20, 18, 16), classes: int = 2
) -> Path:
    """A dataset in plain folders: bright boxes in noise, one a class; the first `labelled` cases have a label file."""
    random = np.random.default_rng(SEED)
    for i in range(cases):
        image = random.normal(size=size).astype(np.float32)
        label = np.zeros(size, np.uint8)
        for c in range(1, classes):
            corner = random.integers(2, 6, 3)
            box = tuple(slice(int(k) + 4 * (c - 1), int(k) + 4 * (c - 1) + 6) for k in corner)
            image[box] += 3 * c
            label[box] = c
        write_volume(folder / "images" / f"case_{i}.nii.gz", image)
        if i < labelled:
            write_volume(folder / "labels" / f"case_{i}.nii.gz", label)
    return folder
