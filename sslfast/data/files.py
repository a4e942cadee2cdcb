"""The files of volumes: how they are called, which ones lie in a folder, and which belong to one volume."""

from __future__ import annotations

import math
import re
import unicodedata
from pathlib import Path

from sslfast.errors import UserError

NIFTI = (".nii.gz", ".nii")
SUFFIXES = (*NIFTI, ".seg.nrrd", ".nrrd", ".nhdr", ".mha", ".mhd")
DETACHED = (".nhdr", ".mhd")  # headers whose voxels are in another file
NO_VOLUME = {
    ".bval",
    ".bvec",
    ".csv",
    ".db",
    ".html",
    ".ini",
    ".json",
    ".log",
    ".md",
    ".tsv",
    ".txt",
    ".xml",
    ".yaml",
    ".yml",
}
MAPS = {"probabilities", "uncertainty", "disagreement"}  # folders of what `predict` writes beside segmentations
LONGEST = 2**16  # bytes of a detached header


def case_name(path: Path) -> str:
    """The name of a file without its suffix, or of a folder with a DICOM series.

    In composed Unicode (NFC), whichever form the file system keeps.
    """
    for suffix in SUFFIXES:
        if path.name.lower().endswith(suffix):
            return unicodedata.normalize("NFC", path.name[: -len(suffix)])
    if path.is_dir():
        return unicodedata.normalize("NFC", path.absolute().name)
    raise UserError(
        f"{path} is no volume that can be read: its name must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, or "
        "it must be a folder with a DICOM series"
    )


def volume_files(folder: Path) -> dict[str, Path]:
    """The volumes of a folder by case name, sorted: files, and folders with a DICOM series. Hidden ones are skipped."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    volumes: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not (path.name.lower().endswith(SUFFIXES) or is_series(path)):
            continue
        name = case_name(path)
        if name in volumes:
            raise UserError(f"{volumes[name]} and {path} are the same case {name!r}: keep one of them")
        volumes[name] = path
    return volumes


def is_series(path: Path) -> bool:
    """True for a folder in which a DICOM file lies."""
    return path.is_dir() and any(map(_is_dicom, series_files(path)))


def series_files(folder: Path) -> list[Path]:
    """The files of a folder with a DICOM series, sorted; without texts, other volumes and the index of a CD."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and not path.name.lower().endswith(SUFFIXES)
        and path.suffix.lower() not in NO_VOLUME
        and path.name.upper() != "DICOMDIR"
    ]


def _is_dicom(path: Path) -> bool:
    if path.suffix.lower() == ".dcm":
        return True
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def parts_of(path: Path) -> list[Path]:
    """The files that hold a volume: those of a DICOM series, a header and the files that it names, or the file."""
    if path.is_dir():
        return series_files(path)
    if not path.name.lower().endswith(DETACHED):
        return [path]
    try:
        with open(path, "rb") as file:
            header = file.read(LONGEST).decode(errors="surrogateescape")
    except OSError:
        return [path]  # it is named when it is read
    named = [re.split("[:=]", line)[-1].strip() for line in header.replace("\0", "").splitlines()]
    return [path, *(path.parent / name for name in named if len(name) < 256 and (path.parent / name).is_file())]


def free_memory() -> float:
    """Bytes of memory that the system can give; infinity if it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
    except (OSError, StopIteration):
        return math.inf
