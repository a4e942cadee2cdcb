"""Reads NRRD, MetaImage and DICOM series through SimpleITK, which is the extra `dicom`."""

from __future__ import annotations

import locale
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np

from sslfast.data.files import DETACHED, LONGEST, free_memory, parts_of, series_files
from sslfast.errors import UserError

UNEVEN = 0.05  # of the distance between slices, by which one may differ
SHIFTED = 0.5  # pixels by which a slice may lie beside the axis of the others
COMPRESSED = re.compile(rb"(?mi)^(?:CompressedData *= *True|encoding: *gz(?:ip)?)\s*$")  # MetaImage, NRRD
SKIPS = re.compile(rb"(?mi)^(?:byte|line) ?skip:|^HeaderSize *= *-?[1-9]")  # what is before the voxels is left alone
VOXELS = re.compile(rb"(?i)ElementDataFile *= *LOCAL *\r?\n|\n\r?\n")  # before them, in the file of the header
TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # from DICOM's and ITK's axes, LPS


@dataclass(frozen=True)
class Series:
    """A DICOM series whose slices make a volume."""

    files: tuple[Path, ...]  # one a slice, in the order of their positions
    shape: tuple[int, int, int]  # columns, rows, slices
    affine: np.ndarray  # [4, 4] float64, voxel index -> mm (RAS+)


@dataclass(frozen=True)
class _Slice:
    file: Path
    series: str
    description: str
    grid: tuple[np.ndarray, ...]  # size, spacing and direction, which all slices share
    position: np.ndarray  # of the first pixel, mm


def read_itk(path: Path, voxels: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Reads a file, or a folder with one DICOM series: float32 [X, Y, Z], and its affine in mm (RAS+).

    Without `voxels`, the array takes no memory and holds zeros.

    Raises:
        UserError: SimpleITK is not installed; there are several components or not three axes; the slices of the series
            do not make a volume (see `find_series`).
        ValueError: the file is damaged.
        MemoryError: it does not fit.
    """
    with _itk(path) as sitk:
        return _read_series(sitk, path, voxels) if path.is_dir() else _read_file(sitk, path, voxels)


def find_series(folder: Path) -> Series:
    """The slices of the one DICOM series in a folder, in order.

    Raises:
        UserError: SimpleITK is not installed; a file is no image or is damaged; there are several series; slices are
            missing, doubled, of different sizes or shifted, as by a tilted gantry.
    """
    with _itk(folder) as sitk:
        return _find_series(sitk, folder)


@contextmanager
def _itk(path: Path) -> Iterator[ModuleType]:
    """SimpleITK, without its effects: on the locale, in which non-ASCII output cannot be decoded, and on stderr."""
    try:
        import SimpleITK as sitk
    except ImportError as error:
        kind = "a DICOM series" if path.is_dir() else f"{path.suffix} files"
        raise UserError(f"{path}: {kind} need SimpleITK: pip install 'sslfast[dicom]'") from error
    before = locale.setlocale(locale.LC_CTYPE)
    try:
        with _without_stderr():
            yield sitk
    finally:
        locale.setlocale(locale.LC_CTYPE, before)


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Leaves out what libraries write to the file descriptor of stderr."""
    try:
        kept = os.dup(2)
    except OSError:  # there is none
        yield
        return
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _read_file(sitk: Any, path: Path, voxels: bool) -> tuple[np.ndarray, np.ndarray]:
    reader = _reader(sitk, "MetaImageIO" if path.suffix.lower() in (".mha", ".mhd") else "NrrdImageIO", path)
    try:
        reader.ReadImageInformation()
        size, components = reader.GetSize(), reader.GetNumberOfComponents()
        kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())
        if len(size) != 3:
            raise UserError(
                f"{path} has shape {size}; it must be a 3D volume. "
                + ("Split the series into one file each." if len(size) > 3 else "Remove it or export it again.")
            )
        if components != 1:
            raise UserError(
                f"{path} holds {components} components ({kind}), not one value a voxel. Export it as a grey image, or "
                "as a label map without overlapping segments."
            )
        array: np.ndarray = np.broadcast_to(np.float32(0), size)
        if voxels:
            bits = re.search(r"(\d+)-bit", kind)
            _check_memory(size[0] * size[1] * size[2] * (8 + int(bits[1] if bits else 64) // 8))
            _check_sums(path)
            array = sitk.GetArrayFromImage(reader.Execute()).transpose(2, 1, 0)
    except RuntimeError as error:
        raise ValueError(_reason(error)) from error
    affine = np.eye(4)
    affine[:3, :3] = np.array(reader.GetDirection()).reshape(3, 3) * reader.GetSpacing()
    affine[:3, 3] = reader.GetOrigin()
    return array, TO_RAS @ affine


def _check_sums(path: Path) -> None:
    """Compares the checksums of compressed voxels. SimpleITK does not, and returns whatever comes out.

    Raises:
        ValueError: the voxels are damaged or cut short.
    """
    with open(path, "rb") as file:
        header = file.read(LONGEST)
        if not COMPRESSED.search(header) or SKIPS.search(header):
            return
        begin = VOXELS.search(header)
        if begin and not path.name.lower().endswith(DETACHED):
            file.seek(begin.end())
            return _check_sum(file)
    for part in parts_of(path)[1:]:
        with open(part, "rb") as file:
            _check_sum(file)


def _check_sum(file: BinaryIO) -> None:
    content = zlib.decompressobj(zlib.MAX_WBITS | 32)  # zlib's or gzip's
    try:
        while not content.eof and (block := file.read(1 << 20)):
            while block and not content.eof:
                content.decompress(block, 1 << 22)
                block = content.unconsumed_tail
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if not content.eof:
        raise ValueError("its voxels are cut short")


def _read_series(sitk: Any, folder: Path, voxels: bool) -> tuple[np.ndarray, np.ndarray]:
    series = _find_series(sitk, folder)
    if not voxels:
        return np.broadcast_to(np.float32(0), series.shape), series.affine
    columns, rows, count = series.shape
    _check_memory(4 * columns * rows * (count + 4))
    array = np.empty((count, rows, columns), np.float32)
    for plane, file in zip(array, series.files, strict=True):
        with _naming(file):
            image = _reader(sitk, "GDCMImageIO", file).Execute()
            plane[:] = sitk.GetArrayViewFromImage(image)[0]
    return array.transpose(2, 1, 0), series.affine


def _find_series(sitk: Any, folder: Path) -> Series:
    slices = [_slice(sitk, file) for file in series_files(folder)]
    several = {one.series: one for one in slices}
    if len(several) > 1:
        counts = [sum(one.series == uid for one in slices) for uid in several]
        listed = ", ".join(
            f"{one.description or 'without description'!r} with {count} slices, the first of them {one.file.name}"
            for one, count in zip(several.values(), counts, strict=True)
        )
        raise UserError(f"{folder} holds {len(several)} DICOM series: {listed}. Keep one in a folder.")
    if len(slices) < 2:
        raise UserError(
            f"{folder} holds a DICOM series of one slice, which is no 3D volume. Remove it or add the rest."
        )
    size, spacing, direction = slices[0].grid
    for one in slices[1:]:
        if not all(np.allclose(a, b, atol=1e-3) for a, b in zip(one.grid, slices[0].grid, strict=True)):
            raise UserError(
                f"{one.file} has another size, pixel spacing or orientation than {slices[0].file.name}: they make no "
                "volume. Move scouts and other images out of the folder."
            )
    slices.sort(key=lambda one: float(one.position @ direction[:, 2]))
    offsets = np.array([one.position - slices[0].position for one in slices]) @ direction  # along x, y and the normal
    _check_steps(slices, np.diff(offsets[:, 2]))
    step = (slices[-1].position - slices[0].position) / (len(slices) - 1)
    if (np.abs(offsets[:, :2]) > SHIFTED * spacing).any():
        raise UserError(
            f"{folder}: the slices are shifted against each other, as with a tilted gantry. Resample the series to a "
            "straight volume, for example with dcm2niix."
        )
    affine = np.eye(4)
    affine[:3, :2], affine[:3, 2], affine[:3, 3] = direction[:, :2] * spacing, step, slices[0].position
    shape = int(size[0]), int(size[1]), len(slices)
    return Series(tuple(one.file for one in slices), shape, TO_RAS @ affine)


def _check_steps(slices: list[_Slice], steps: np.ndarray) -> None:
    """Raises UserError if slices are doubled or missing; `steps` is the distance from each to the next, mm."""
    usual = float(np.median(steps))
    closest, odd = int(steps.argmin()), int(np.abs(steps - usual).argmax())
    if steps[closest] < 1e-3:
        raise UserError(
            f"{slices[closest].file} and {slices[closest + 1].file.name} lie at the same position, as in a series over "
            "time or with several echoes. Keep one image of each slice in the folder."
        )
    if abs(steps[odd] - usual) > UNEVEN * usual:
        raise UserError(
            f"{slices[odd].file} and {slices[odd + 1].file.name} are {steps[odd]:.4g} mm apart, most others "
            f"{usual:.4g} mm: slices are missing, or unevenly spaced. Export the whole series again, or resample it."
        )


def _slice(sitk: Any, file: Path) -> _Slice:
    reader = _reader(sitk, "GDCMImageIO", file)
    with _naming(file):
        reader.ReadImageInformation()
    size, components = np.array(reader.GetSize()), reader.GetNumberOfComponents()
    if components != 1:
        raise UserError(f"{file} holds {components} components, not one value a pixel. Export it as a grey image.")
    if len(size) != 3 or size[2] != 1:
        raise UserError(
            f"{file} holds several frames; of a DICOM series, each slice must be a file. Convert it to NIfTI, for "
            "example with dcm2niix."
        )
    if not reader.HasMetaDataKey("0020|0032") or not reader.HasMetaDataKey("0020|0037"):
        raise UserError(f"{file} does not say where its slice lies. Move it out of the folder, or export it again.")
    series, description = (
        reader.GetMetaData(tag).strip(" \0") if reader.HasMetaDataKey(tag) else "" for tag in ("0020|000e", "0008|103e")
    )
    readable = description.encode(errors="surrogateescape").decode(errors="replace")
    grid = size[:2], np.array(reader.GetSpacing()[:2]), np.array(reader.GetDirection()).reshape(3, 3)
    return _Slice(file, series, readable, grid, np.array(reader.GetOrigin()))


def _reader(sitk: Any, kind: str, file: Path) -> Any:
    reader = sitk.ImageFileReader()
    reader.SetImageIO(kind)
    reader.SetFileName(str(file))
    reader.SetOutputPixelType(sitk.sitkFloat32)  # of all slices, each of which may have a scale of its own
    return reader


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise UserError(
            f"{file} is damaged, or no DICOM image ({_reason(error)}). Copy it again, or move it out of the folder."
        ) from error


def _check_memory(taken: int) -> None:
    if taken > (free := free_memory()):
        raise MemoryError(f"it takes {taken / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")


def _reason(error: RuntimeError) -> str:
    """The last line of an exception of SimpleITK, without addresses in memory and guesses of the system."""
    line = re.sub(r"^.*ERROR: |\w+\(0x\w+\): ", "", str(error).splitlines()[-1].strip())
    return "its header or voxels are missing or cut short" if line.startswith("Reason:") else line
