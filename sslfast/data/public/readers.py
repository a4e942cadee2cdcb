"""Reads the h5 files of public datasets, and merges their classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np

from sslfast.data.nifti import Volume
from sslfast.errors import UserError


def h5_readers(path: Path, spacing: float) -> tuple[Callable[[], Volume], Callable[[], Volume]]:
    """Functions that read the image and the label of an h5 file, which holds no geometry."""
    affine = np.diag([spacing, spacing, spacing, 1.0])

    def read(key: str, dtype: type) -> Volume:
        try:
            import h5py
        except ImportError as error:
            raise UserError(f"{path}: h5 files need h5py: pip install 'sslfast[h5]'") from error
        try:
            with h5py.File(path) as file:
                array: np.ndarray = np.asarray(file[key], dtype=dtype)
        except (OSError, KeyError) as error:
            raise UserError(f"{path} cannot be read or has no {key!r}: {error}. Download it again.") from error
        if array.ndim != 3:
            raise UserError(f"{path}: {key!r} has shape {array.shape}; it must be a 3D volume")
        return volume_of(array, affine)

    return lambda: read("image", np.float32), lambda: read("label", np.uint8)


def foreground(label: Callable[[], Volume]) -> Callable[[], Volume]:
    """A function that reads a label map with 1 for all values above 0."""

    def read() -> Volume:
        volume = label()
        return volume_of((volume.array > 0).astype(np.uint8), volume.affine)

    return read


def volume_of(array: np.ndarray, affine: np.ndarray) -> Volume:
    return Volume(array, affine, nib.Nifti1Header())
