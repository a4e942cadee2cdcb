"""Reads and writes NIfTI volumes. Every file is checked when it is read; the geometry is kept to the last bit."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from sslfast.atomic_io import whole_file
from sslfast.errors import UserError

SUFFIXES = (".nii.gz", ".nii")
IGNORE = -1  # voxel that is not annotated, whatever value the file uses for it


@dataclass(frozen=True)
class Volume:
    """One 3D volume as stored: no axis is flipped or reordered."""

    array: np.ndarray  # [X, Y, Z]
    affine: np.ndarray  # [4, 4] float64, voxel index -> mm (RAS+)
    header: Any  # the file's header: units, qform and sform codes

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance between neighbouring voxels along each stored axis, mm."""
        x, y, z = voxel_sizes(self.affine)
        return float(x), float(y), float(z)


def case_name(path: Path) -> str:
    """The file name without its NIfTI suffix."""
    for suffix in SUFFIXES:
        if path.name.endswith(suffix):
            return path.name[: -len(suffix)]
    raise UserError(f"{path} is not a NIfTI file: its name must end in {' or '.join(SUFFIXES)}")


def nifti_files(folder: Path) -> dict[str, Path]:
    """The NIfTI files of a folder by case name, sorted; hidden files are skipped."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.name.endswith(SUFFIXES):
            continue
        name = case_name(path)
        if name in files:
            raise UserError(f"{files[name]} and {path} are the same case {name!r}: keep one of them")
        files[name] = path
    return files


def read_image(path: Path) -> Volume:
    """Reads an image as float32 [X, Y, Z].

    Raises:
        UserError: the file is missing, corrupt, truncated or not 3D, a voxel is NaN or infinite, or the affine is
            singular.
    """
    volume = _read(path, np.float32)
    bad = int(volume.array.size - np.isfinite(volume.array).sum())
    if bad:
        first = tuple(int(i) for i in np.argwhere(~np.isfinite(volume.array))[0])
        raise UserError(
            f"{path}: {bad} voxels are NaN or infinite, the first at {first}. Replace them; they are often background, "
            "with the value 0 or the minimum."
        )
    return volume


def read_label(path: Path, *, num_classes: int | None = None, ignore_label: int = IGNORE) -> Volume:
    """Reads a label map as int16 [X, Y, Z]; voxels that hold `ignore_label` become -1.

    Raises:
        UserError: as in `read_image`; or a value is not an integer, or outside 0..num_classes-1.
    """
    volume = _read(path, np.float32)
    values = np.unique(volume.array)
    if not np.isfinite(values).all() or (values != np.round(values)).any() or np.abs(values).max(initial=0) > 32767:
        raise UserError(
            f"{path}: a label map must hold whole numbers, this one holds {_short(values)}. "
            "Is it an image or a probability map?"
        )
    array = volume.array.astype(np.int16)
    array[volume.array == ignore_label] = IGNORE
    allowed_top = num_classes - 1 if num_classes is not None else 32767
    wrong = [int(v) for v in values if v != ignore_label and not 0 <= v <= allowed_top]
    if wrong:
        raise UserError(
            f"{path}: labels {_short(wrong)} are outside 0..{allowed_top} and are not the ignore label {ignore_label}. "
            "Correct the file, the class list in dataset.json, or --ignore-label."
        )
    return Volume(array, volume.affine, volume.header)


def check_same_grid(image: Volume, label: Volume, image_path: Path, label_path: Path) -> None:
    """Raises UserError unless both volumes have the same shape and affine (within 1e-3 mm over the whole grid)."""
    if image.array.shape != label.array.shape:
        raise UserError(
            f"{image_path} has shape {image.array.shape}, its label {label_path} has {label.array.shape}. "
            "Resample the label onto the image."
        )
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in image.array.shape], [1])).reshape(4, -1)
    apart = np.abs((image.affine - label.affine) @ corners).max()
    if apart > 1e-3:
        raise UserError(
            f"{image_path} and its label {label_path} lie up to {apart:.3g} mm apart: their affines differ. "
            "Resample the label onto the image, or correct its header."
        )


def write_label(path: Path, array: np.ndarray, like: Volume) -> None:
    """Writes a label map [X, Y, Z] with the affine, orientation and units of `like`, whole or not at all."""
    if array.shape != like.array.shape:
        raise ValueError(f"array has shape {array.shape}; it must have that of `like`, {like.array.shape}")
    case_name(path)
    dtype = np.uint8 if array.size == 0 or array.max() < 256 else np.int16
    header = nib.Nifti1Header.from_header(like.header)
    header.set_data_dtype(dtype)
    header["cal_min"] = header["cal_max"] = 0
    with whole_file(path) as part:
        nib.save(nib.Nifti1Image(array.astype(dtype), like.affine, header), part)


def _read(path: Path, dtype: type) -> Volume:
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    case_name(path)
    try:
        file = nib.load(path)
        shape = file.shape
        while len(shape) > 3 and shape[-1] == 1:
            shape = shape[:-1]
        if len(shape) != 3 or 0 in shape:
            raise UserError(
                f"{path} has shape {file.shape}; it must be a 3D volume. "
                "Split a 4D series into one file per channel or time point."
            )
        array = np.asarray(file.dataobj, dtype=dtype).reshape(shape)
        affine = np.asarray(file.affine, dtype=np.float64)
    except (ImageFileError, HeaderDataError, EOFError, OSError, ValueError, zlib.error) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} cannot be read, it is corrupt or truncated ({error}). Copy or export it again."
        ) from error
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise UserError(f"{path} has no usable affine:\n{affine}\nSet its sform or qform.")
    return Volume(array, affine, file.header)


def _short(values: Any) -> str:
    shown = ", ".join(f"{v:g}" for v in list(values)[:6])
    return shown + (", …" if len(values) > 6 else "")
