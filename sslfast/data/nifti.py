"""Reads volumes, NIfTI by itself, and writes NIfTI. Each is checked; its geometry is kept to the last bit."""

from __future__ import annotations

import gzip
import hashlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

from sslfast.atomic_io import whole_file
from sslfast.data.files import NIFTI, case_name, free_memory, is_series, parts_of
from sslfast.data.itk import read_itk
from sslfast.errors import UserError

IGNORE = -1  # voxel that is not annotated, whatever value the file uses for it
MM = {"meter": 1e3, "mm": 1.0, "micron": 1e-3, "unknown": 1.0}  # per unit of a header's affine
SAME_PLACE = 0.1  # voxels by which the corners of two grids may differ, for headers are rounded
TOO_LARGE = 32768  # first label that int16 does not hold
WHOLE = 1e-3  # distance from a whole number that a label may have, for some programs store scaled labels
DEFLATE = 1032  # bytes that one compressed byte can hold at most
OWN = "sslfast"  # begins the description in the header of a segmentation


@dataclass(frozen=True)
class Volume:
    """One volume as stored: no axis is flipped or reordered."""

    array: np.ndarray  # [X, Y, Z], or [M, X, Y, Z] of M channels
    affine: np.ndarray  # [4, 4] float64, voxel index -> mm (RAS+), whatever unit the file has
    header: Any  # the file's header: units, qform and sform codes

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along each stored axis."""
        x, y, z = self.array.shape[-3:]
        return x, y, z

    @property
    def channels(self) -> list[Volume]:
        """The volume of each channel."""
        return [Volume(array, self.affine, self.header) for array in self.array.reshape(-1, *self.shape)]

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance between neighbouring voxels along each stored axis, mm."""
        x, y, z = voxel_sizes(self.affine)
        return float(x), float(y), float(z)


def read_channels(paths: Sequence[Path]) -> Volume:
    """Reads an image as float32 [M, X, Y, Z] from a file for each channel, or from one for all, 3D or 4D.

    Raises:
        UserError: see `read_image`; or the channels do not lie on one grid.
    """
    if len(paths) == 1:
        volume = _finite(_read(paths[0], several=True), paths[0])
        return Volume(volume.array.reshape(-1, *volume.shape), volume.affine, volume.header)
    first, *others = (read_image(path) for path in paths)
    moved = [on_grid_of(first, other, paths[0], path) for other, path in zip(others, paths[1:], strict=True)]
    return Volume(np.stack([volume.array for volume in (first, *moved)]), first.affine, first.header)


def read_image(path: Path) -> Volume:
    """Reads an image as float32 [X, Y, Z].

    Raises:
        UserError: the file is missing, corrupt, truncated, not 3D, in colours or complex numbers; a voxel is NaN or
            infinite; or the affine is singular.
    """
    return _finite(_read(path), path)


def _finite(volume: Volume, path: Path) -> Volume:
    bad = int(volume.array.size - np.isfinite(volume.array).sum())
    if bad:
        first = tuple(int(i) for i in np.argwhere(~np.isfinite(volume.array))[0])
        count = "1 voxel is" if bad == 1 else f"{bad} voxels are"
        raise UserError(
            f"{path}: {count} NaN or infinite, the first at {first}. Replace them; they are often background, "
            "with the value 0 or the minimum."
        )
    return volume


def read_header(paths: Sequence[Path]) -> Volume:
    """The geometry of an image; its voxels [M, X, Y, Z] are not read, and are 0 here."""
    volume = _read(paths[0], several=len(paths) == 1, voxels=False)
    count = len(paths) if volume.array.ndim == 3 else len(volume.array)
    return Volume(np.broadcast_to(np.float32(0), (count, *volume.shape)), volume.affine, volume.header)


def check_not_empty(volume: Volume, paths: Sequence[Path]) -> None:
    """Raises UserError if all voxels of a channel are alike, so that there is nothing to see."""
    channels = volume.channels
    for number, channel in enumerate(channels):
        if channel.array.min() == channel.array.max():
            of = f", channel {number}," if len(paths) < len(channels) else ""
            raise UserError(
                f"{paths[min(number, len(paths) - 1)]}{of} is empty: every voxel is {channel.array.min():g}. "
                "Remove it or export it again."
            )


def read_label(
    path: Path,
    *,
    classes: Sequence[int] | None = None,
    merged: Mapping[int, int] | None = None,
    num_classes: int | None = None,
    ignore_label: int = IGNORE,
) -> Volume:
    """Reads a label map as int16 [X, Y, Z]; voxels that hold `ignore_label` become -1.

    Args:
        classes: the value of each class in the file, from 0 to 32767, rising; a voxel then becomes the index of its
            class. None: the values stay.
        merged: further such values, and the value of the class as which they count.
        num_classes: short for the classes 0 to num_classes - 1.

    Raises:
        UserError: the file cannot be read, as in `read_image`; a value is not within 0.001 of a whole number, is not
            among the classes, or is below 0 or above 32767.
    """
    if num_classes is not None:
        classes = range(num_classes)
    volume = _read(path)
    whole = np.rint(volume.array)
    ignored = whole == ignore_label
    with np.errstate(invalid="ignore"):
        distance = volume.array - whole  # NaN of what is not finite
    if not np.abs(distance, out=distance).max() <= WHOLE:
        values = np.unique(volume.array[~(ignored & (distance <= WHOLE))])
        raise UserError(
            f"{path}: a label map must hold whole numbers, this one holds {_short(values)}. "
            "Is it an image or a probability map?"
        )
    whole[ignored] = 0
    if whole.min() >= 0 and whole.max() < TOO_LARGE:
        labels = whole.astype(np.int16)
        labels[ignored] = IGNORE
        found = np.zeros(TOO_LARGE + 1, bool)
        found[labels] = True  # IGNORE is the last
        values = found[:-1].nonzero()[0]
    else:
        labels, values = np.empty((), np.int16), np.unique(whole[~ignored])
    merged = merged or {}
    allowed = np.arange(TOO_LARGE) if classes is None else np.array(sorted({*classes, *merged}))
    wrong = values[~np.isin(values, allowed)]
    if len(wrong):
        known = "outside 0 to 32767" if classes is None else f"not among the classes {_short(allowed)}"
        possible = wrong[(wrong > 0) & (wrong < TOO_LARGE)]
        remedy = f"name its classes in dataset.json or by --classes, such as --classes {suggest_classes(possible)}"
        if not len(possible):
            remedy = f"give --ignore-label {int(wrong[0])} if its voxels are not annotated"
        raise UserError(
            f"{path}: labels {_short(wrong)} are {known}, nor the ignore label {ignore_label}. Correct the file, or "
            f"{remedy}."
        )
    if classes is not None:
        index = {value: position for position, value in enumerate(classes)}
        indices = np.zeros(TOO_LARGE + 1, np.int16)
        indices[allowed.astype(int)] = [index[merged.get(value, value)] for value in allowed.tolist()]
        indices[IGNORE] = IGNORE
        labels = indices[labels]
    return Volume(labels, volume.affine, volume.header)


def suggest_classes(values: Iterable[float]) -> str:
    """An example for --classes, with up to three of these label values."""
    return " ".join(f"name_{value:g}={value:g}" for value in [*values][:3])


def on_grid_of(image: Volume, label: Volume, image_path: Path, label_path: Path) -> Volume:
    """The label map, or another channel, on the grid of `image`: its voxels in the order of the image's, and the
    image's affine to the bit.

    Headers are rounded, so the label's own affine would resample it to another shape, or turn it to other axes.

    Raises:
        UserError: after reordering and flipping axes, the shapes differ, or a corner of the label lies more than 0.1
            voxels of the image away from the image's.
    """
    axes = io_orientation(np.linalg.inv(image.affine) @ label.affine)  # the image's axis of each of the label's axes
    array = apply_orientation(label.array, axes)
    if array.shape != image.shape:
        raise UserError(
            f"{image_path} has shape {image.shape}, {label_path} has {label.array.shape}. "
            "Resample the second onto the first."
        )
    affine = label.affine @ inv_ornt_aff(axes, label.array.shape)
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in array.shape], [1])).reshape(4, -1)
    offsets = (affine - image.affine) @ corners
    if np.abs(np.linalg.inv(image.affine) @ offsets).max() > SAME_PLACE:
        apart = np.linalg.norm(offsets, axis=0).max()
        raise UserError(
            f"{image_path} and {label_path} lie up to {apart:.3g} mm apart: their affines differ. "
            "Resample the second onto the first, or correct its header."
        )
    return Volume(np.ascontiguousarray(array), image.affine, image.header)


def write_label(path: Path, array: np.ndarray, like: Volume, description: str = OWN) -> None:
    """Writes a label map [X, Y, Z] with the affine, orientation and units of `like`, whole or not at all.

    Text in the header of `like`, which may name the patient, is not copied. `description` (80 bytes) takes its place.
    """
    dtype = np.uint8 if array.size == 0 or array.max() < 256 else np.int16
    _write(path, array.astype(dtype), like, description)


def write_map(path: Path, array: np.ndarray, like: Volume, description: str = OWN) -> None:
    """Writes a map of real numbers [X, Y, Z], as `write_label`: 16-bit numbers with a scale in the header."""
    _write(path, np.asarray(array, np.float32), like, description)


def _write(path: Path, array: np.ndarray, like: Volume, description: str) -> None:
    if array.shape != like.shape:
        raise ValueError(f"array has shape {array.shape}; it must have that of `like`, {like.shape}")
    header = nib.Nifti1Header.from_header(like.header, check=False)
    header["sizeof_hdr"] = header.sizeof_hdr  # from NIfTI-2 it would keep another
    header.set_data_dtype(np.uint16 if array.dtype.kind == "f" else array.dtype)
    header["cal_min"] = header["cal_max"] = 0
    for text in ("aux_file", "db_name", "data_type", "intent_name"):
        header[text] = b""
    header["descrip"] = description.encode()
    affine = like.affine / np.array([[_unit(header)]] * 3 + [[1]])
    with whole_file(path) as part:
        nib.save(nib.Nifti1Image(array, affine, header), part)


def description_of(path: Path) -> str:
    """The description in the header of a NIfTI file; empty if it cannot be read."""
    try:
        with _opened(path) as file:
            return bytes(_read_header(file)["descrip"]).rstrip(b"\0").decode(errors="replace")
    except Exception:  # of a foreign file nibabel raises whatever it stumbles over
        return ""


def digest_of(path: Path, more: str) -> str:
    """16 hexadecimal digits of the content of a file, or of those of a volume, and of `more`."""
    digest = hashlib.sha256(more.encode())
    for part in parts_of(path):
        with open(part, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def _read(path: Path, *, several: bool = False, voxels: bool = True) -> Volume:
    """Reads a volume as float32, and its affine in mm. Memory is claimed only for what the file can hold.

    Args:
        several: it may be 4D, with the channels along the last axis; they become the first.
        voxels: False: the array is of the right shape, takes no memory and holds zeros.
    """
    path = Path(path)
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path} is a symbolic link to a file that does not exist")
    if not path.is_file() and not is_series(path):
        raise UserError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    case_name(path)
    try:
        volume = _read_nifti(path, several, voxels) if path.name.lower().endswith(NIFTI) else _read_other(path, voxels)
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Change its permissions, or remove it.") from error
    except MemoryError as error:
        raise UserError(
            f"{path} does not fit into memory: {error or 'out of memory'}. Crop or downsample it."
        ) from error
    except Exception as error:  # of a corrupt file the libraries raise whatever they stumble over
        reason = str(error).strip() or type(error).__name__
        raise UserError(
            f"{path} cannot be read, it is corrupt or truncated ({reason}). Copy or export it again."
        ) from error
    affine = volume.affine
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) <= 1e-6 * lengths.prod():
        raise UserError(f"{path} has no usable affine:\n{affine}\nCorrect its header.")
    return volume


def _read_nifti(path: Path, several: bool, voxels: bool) -> Volume:
    with _opened(path) as file:
        header = _read_header(file)
        proxy = nib.arrayproxy.ArrayProxy(file, header, mmap=False)
        shape = tuple(int(n) for n in proxy.shape)
        while len(shape) > 3 and shape[-1] == 1:
            shape = shape[:-1]
        if len(shape) not in ((3, 4) if several else (3,)) or min(shape) < 1:
            remedy = "Split the series into one file each." if len(shape) > 3 else "Remove it or export it again."
            raise UserError(f"{path} has shape {proxy.shape}; it must be a 3D volume. {remedy}")
        stored = header.get_data_dtype()
        if stored.kind not in "biuf":
            kind = "complex numbers" if stored.kind == "c" else "colours (RGB)" if stored.names else str(stored)
            raise UserError(f"{path} holds {kind}, not one intensity a voxel. Convert it to a grey image.")
        size = math.prod(shape) * stored.itemsize
        if proxy.offset < header.sizeof_hdr:
            raise ValueError(f"its voxels begin at byte {proxy.offset}, inside its header")
        if not _holds(path, proxy.offset + size):
            raise ValueError(f"its header claims {size} bytes of voxels, and the file holds fewer")
        taken, free = size + 4 * size // stored.itemsize, free_memory()
        if taken > free and voxels:
            raise MemoryError(f"it takes {taken / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
        array = np.asarray(proxy, np.float32).reshape(shape) if voxels else np.broadcast_to(np.float32(0), shape)
        if voxels:
            _check_sum(file)
        array = np.moveaxis(array, -1, 0) if len(shape) == 4 else array
        affine = np.asarray(header.get_best_affine(), dtype=np.float64) * np.array([[_unit(header)]] * 3 + [[1]])
    return Volume(array, affine, header)


def _read_other(path: Path, voxels: bool) -> Volume:
    """Reads the other formats; the header is that of a NIfTI file with the same geometry."""
    array, affine = read_itk(path, voxels)
    header = nib.Nifti1Header()
    header.set_data_shape(array.shape)
    header.set_xyzt_units("mm")
    header.set_sform(affine, "scanner")
    header.set_qform(affine, "scanner", strip_shears=True)
    return Volume(array, affine, header)


def _opened(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if path.name.lower().endswith(".gz") else open(path, "rb")


def _check_sum(file: BinaryIO) -> None:
    """Reads what follows the voxels, up to 64 MiB: at the end of compressed content, `gzip` compares its checksum.

    Raises:
        OSError, EOFError: the content is damaged.
    """
    try:
        for _ in range(1024):
            if not file.read(1 << 16):
                return
    except gzip.BadGzipFile as error:
        if "Not a gzipped file" not in str(error):  # bytes after the end are no damage
            raise


def _read_header(file: BinaryIO) -> Any:
    """The header without its extensions, whose sizes may be wrong and whose text is not ours to copy."""
    block = file.read(nib.Nifti2Header.sizeof_hdr)
    for kind in (nib.Nifti1Header, nib.Nifti2Header):
        if kind.may_contain_header(block):
            return kind(block[: kind.sizeof_hdr])
    raise ValueError("it does not begin with a NIfTI header")


def _holds(path: Path, size: int) -> bool:
    """True if the file, decompressed, has at least this many bytes. Takes no memory for them."""
    stored = path.stat().st_size
    if not path.name.lower().endswith(".gz"):
        return stored >= size
    if stored * DEFLATE < size:
        return False
    with open(path, "rb") as file:
        file.seek(-4, os.SEEK_END)
        if int.from_bytes(file.read(4), "little") >= size:  # what a file of one member ends with
            return True
    with gzip.open(path) as content:
        while size > 0 and (part := content.read(min(size, 1 << 20))):
            size -= len(part)
    return size <= 0


def _unit(header: Any) -> float:
    """Millimetres per unit of length of a header; 1 if it names none."""
    try:
        return MM.get(header.get_xyzt_units()[0], 1.0)
    except KeyError:
        return 1.0


def _short(values: Any) -> str:
    shown = ", ".join(f"{v:g}" for v in list(values)[:6])
    return shown + (", …" if len(values) > 6 else "")
