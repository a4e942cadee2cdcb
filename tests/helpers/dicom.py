"""Small DICOM series and SimpleITK images on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

OBLIQUE = np.array([[0.96, -0.28, 0.0], [0.2688, 0.9216, -0.28], [0.0784, 0.2688, 0.96]])  # a rotation
SPACING = (0.8, 0.7, 2.5)
ORIGIN = (5.0, -7.0, 11.0)


def oblique_image(array: np.ndarray) -> sitk.Image:
    """An image of an array [X, Y, Z] in an oblique position."""
    image = sitk.GetImageFromArray(array.transpose(2, 1, 0))
    image.SetSpacing(SPACING)
    image.SetOrigin(ORIGIN)
    image.SetDirection(OBLIQUE.ravel())
    return image


def write_image(path: Path, image: sitk.Image) -> Path:
    """Writes the image in the format of the suffix, compressed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path), useCompression=True)
    return path


def write_series(
    folder: Path,
    image: sitk.Image,
    *,
    change: Callable[[Dataset, int], None] = lambda slice_, number: None,
    name: Callable[[int], str] = lambda number: f"{97 * (number + 1) % 101:03d}.dcm",  # not in the order of the slices
    **attributes: Any,
) -> Path:
    """Writes an int16 image as a CT series, a file a slice.

    Args:
        change: called with each slice and its number before it is written.
        name: file name of a slice.
        attributes: further attributes of all slices.
    """
    folder.mkdir(parents=True, exist_ok=True)
    axes = np.array(image.GetDirection()).reshape(3, 3)
    series, study, frame = generate_uid(), generate_uid(), generate_uid()
    for number, pixels in enumerate(sitk.GetArrayFromImage(image).astype(np.int16)):
        one = Dataset()
        one.file_meta = FileMetaDataset()
        one.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        one.file_meta.MediaStorageSOPClassUID = one.SOPClassUID = CTImageStorage
        one.file_meta.MediaStorageSOPInstanceUID = one.SOPInstanceUID = generate_uid()
        one.SpecificCharacterSet = "ISO_IR 100"
        one.Modality, one.SeriesDescription, one.SeriesNumber = "CT", "Schädel", 3
        one.SeriesInstanceUID, one.StudyInstanceUID, one.FrameOfReferenceUID = series, study, frame
        one.PatientName, one.PatientID, one.PatientBirthDate, one.PatientSex = "Doe^Jane", "7", "19700101", "F"
        one.StudyDate, one.StudyTime, one.StudyID, one.AccessionNumber = "20200102", "101112", "9", "8"
        one.InstanceNumber, one.SliceThickness = number + 1, image.GetSpacing()[2]
        one.ImagePositionPatient = [f"{x:.10g}" for x in image.TransformIndexToPhysicalPoint((0, 0, number))]
        one.ImageOrientationPatient = [f"{x:.10g}" for x in (*axes[:, 0], *axes[:, 1])]
        one.PixelSpacing = [image.GetSpacing()[1], image.GetSpacing()[0]]
        one.Rows, one.Columns = pixels.shape
        one.SamplesPerPixel, one.PhotometricInterpretation, one.PixelRepresentation = 1, "MONOCHROME2", 1
        one.BitsAllocated, one.BitsStored, one.HighBit = 16, 16, 15
        one.RescaleSlope, one.RescaleIntercept = 1, 0
        one.PixelData = pixels.tobytes()
        for keyword, value in attributes.items():
            setattr(one, keyword, value)
        change(one, number)
        one.save_as(folder / name(number), enforce_file_format=True)
    return folder
