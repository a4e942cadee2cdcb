"""Reads the formats of public datasets besides NIfTI: h5, NRRD and DICOM series."""

from __future__ import annotations

import locale
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


def reader(path: Path, binary: bool = False) -> Callable[[], Volume]:
    """A function that reads an NRRD file or a folder with one DICOM series; `binary`: 1 for values above 0, else 0."""

    def read() -> Volume:
        try:
            import SimpleITK as sitk
        except ImportError as error:
            raise UserError(f"{path}: this file needs SimpleITK: pip install 'sslfast[dicom]'") from error
        try:
            with same_locale():
                if path.is_dir():
                    series = sitk.ImageSeriesReader()
                    series.SetFileNames(series.GetGDCMSeriesFileNames(str(path)))
                    image = series.Execute()
                else:
                    image = sitk.ReadImage(str(path))
        except RuntimeError as error:
            raise UserError(f"{path} cannot be read: {str(error).splitlines()[-1]}. Download it again.") from error
        # SimpleITK's arrays are [Z, Y, X]
        array: np.ndarray = np.asarray(sitk.GetArrayFromImage(image)).transpose(2, 1, 0)
        direction = np.array(image.GetDirection()).reshape(3, 3)
        affine = np.eye(4)
        affine[:3, :3], affine[:3, 3] = direction * np.array(image.GetSpacing()), image.GetOrigin()
        affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # from LPS to RAS
        return volume_of((array > 0).astype(np.uint8) if binary else array.astype(np.float32), affine)

    return read


@contextmanager
def same_locale() -> Iterator[None]:
    """Restores the locale. SimpleITK's DICOM code sets the C locale, in which non-ASCII output cannot be decoded."""
    before = locale.setlocale(locale.LC_CTYPE)
    try:
        yield
    finally:
        locale.setlocale(locale.LC_CTYPE, before)


def whole_tumour(label: Callable[[], Volume]) -> Callable[[], Volume]:
    def read() -> Volume:
        volume = label()
        return volume_of((volume.array > 0).astype(np.uint8), volume.affine)

    return read


def volume_of(array: np.ndarray, affine: np.ndarray) -> Volume:
    return Volume(array, affine, nib.Nifti1Header())
