"""The segmentations in a folder: which of them are there already, and which are somebody else's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from sslfast.data.dicom_seg import description_of_seg
from sslfast.data.nifti import OWN, description_of, digest_of
from sslfast.errors import UserError


def describe(images: Mapping[str, Sequence[Path]], checkpoint: Path, settings: str) -> dict[str, str]:
    """The description of each case's segmentation; it changes with the checkpoint, the settings and the volume."""
    model = digest_of(checkpoint, settings)
    descriptions = {}
    for name, paths in images.items():
        with suppress(OSError):  # what cannot be read has none, and is listed when it should be segmented
            digest = model
            for path in paths:
                digest = digest_of(path, digest)
            descriptions[name] = f"{OWN} {digest}"
    return descriptions


def find_missing(
    images: Mapping[str, Sequence[Path]],
    output: Path,
    descriptions: Mapping[str, str],
    overwrite: bool,
    dicom_seg: bool = False,
) -> dict[str, Sequence[Path]]:
    """The volumes whose segmentation is not in `output` yet; with `dicom_seg`, <case>.dcm belongs to it.

    Raises:
        UserError: a file there is another segmentation, or not of this command, and `overwrite` is False.
    """
    readers = {".nii.gz": description_of} | ({".dcm": description_of_seg} if dicom_seg else {})
    files = {output / f"{name}{suffix}": (name, read) for name in images for suffix, read in readers.items()}
    own = {file: read(file) == descriptions.get(name) for file, (name, read) in files.items() if file.exists()}
    others = [file for file, is_own in own.items() if not is_own]
    if others and not overwrite:
        count = "1 file" if len(others) == 1 else f"{len(others)} files"
        raise UserError(
            f"--output {output} holds {count} that this prediction would replace, the first {others[0]}: other "
            "label maps, or of another checkpoint or other settings. Choose another folder, or add --overwrite."
        )
    missing = {name for file, (name, _) in files.items() if not own.get(file)}
    return {name: paths for name, paths in images.items() if name in missing}
