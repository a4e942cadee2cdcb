"""Writes segmentations as DICOM-SEG through highdicom, which is the extra `dicom-seg`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

import sslfast
from sslfast.atomic_io import whole_file
from sslfast.data.itk import find_series
from sslfast.errors import UserError

REQUIRED = (  # attributes that a segmentation takes from its source, and that may be empty
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("AccessionNumber", "StudyID", "StudyDate", "StudyTime"),
)


def check_series(images: Mapping[str, Sequence[Path]]) -> None:
    """Raises UserError if highdicom is not installed, or a volume is no DICOM series."""
    _highdicom()
    if others := [paths[0] for paths in images.values() if not paths[0].is_dir()]:
        raise UserError(
            f"--dicom-seg: {others[0]} is no DICOM series, which a DICOM segmentation refers to. Leave out "
            "--dicom-seg, or segment such volumes apart."
        )


def make_dicom_seg(labels: np.ndarray, classes: Mapping[int, str], folder: Path, description: str) -> Any:
    """A DICOM segmentation with a segment for each class of the foreground, numbered 1, 2 and so on.

    Args:
        labels: label map [X, Y, Z] on the grid of the series, with the classes' values.
        classes: class names by value.
        folder: the series.
        description: for the attribute ContentDescription.

    Raises:
        UserError: the series lacks what a segmentation must refer to.
    """
    hd = _highdicom()
    import pydicom

    algorithm = hd.AlgorithmIdentificationSequence(
        "sslfast", hd.sr.CodedConcept("123109", "DCM", "Artificial Intelligence"), sslfast.__version__
    )
    foreground = {value: name[:64] for value, name in classes.items() if value > 0}
    segments = [
        hd.seg.SegmentDescription(
            number,
            name,
            hd.sr.CodedConcept("123037004", "SCT", "Anatomical Structure"),
            hd.sr.CodedConcept(str(value), "99SSLFAST", name),  # a code of our own: the names are the user's
            "AUTOMATIC",
            algorithm,
        )
        for number, (value, name) in enumerate(foreground.items(), start=1)
    ]
    masks = np.stack([labels.transpose(2, 1, 0) == value for value in foreground], axis=-1).astype(np.uint8)
    try:
        slices = [pydicom.dcmread(file, stop_before_pixels=True) for file in find_series(folder).files]
        for slice_ in slices:
            for keyword in REQUIRED:
                slice_.setdefault(keyword, None)
        return hd.seg.Segmentation(
            slices,
            masks,
            "BINARY",
            segments,
            series_instance_uid=hd.UID(),
            series_number=int(slices[0].get("SeriesNumber") or 0) * 100 + 1,
            sop_instance_uid=hd.UID(),
            instance_number=1,
            manufacturer="sslfast",
            manufacturer_model_name="sslfast",
            software_versions=sslfast.__version__,
            device_serial_number="none",
            content_description=description,
            series_description="sslfast",
        )
    except UserError:
        raise
    except Exception as error:  # of an odd series highdicom raises whatever it stumbles over
        raise UserError(
            f"{folder}: no DICOM segmentation can refer to this series ({type(error).__name__}: {error}). Leave out "
            "--dicom-seg, or complete its attributes."
        ) from error


def write_dicom_seg(path: Path, segmentation: Any) -> None:
    """Writes the file, whole or not at all."""
    with whole_file(path) as part:
        segmentation.save_as(part)


def description_of_seg(path: Path) -> str:
    """The attribute ContentDescription of a DICOM file; empty if it cannot be read."""
    import pydicom

    try:
        return str(pydicom.dcmread(path, stop_before_pixels=True).get("ContentDescription", ""))
    except Exception:  # of a foreign file pydicom raises whatever it stumbles over
        return ""


def _highdicom() -> ModuleType:
    try:
        import highdicom
    except ImportError as error:
        raise UserError("--dicom-seg needs highdicom: pip install 'sslfast[dicom-seg]'") from error
    return highdicom
