"""The segmentations in a folder: made, described, and found again."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sslfast.atomic_io import make_folder, remove_parts
from sslfast.calibration import FILE, Calibration
from sslfast.data.dicom_seg import description_of_seg, make_dicom_seg, write_dicom_seg
from sslfast.data.nifti import OWN, description_of, digest_of, write_label, write_map
from sslfast.data.volumes import from_grid
from sslfast.errors import UserError
from sslfast.model import Model
from sslfast.ops.buffers import keep_freed_memory
from sslfast.options import Precision, Windows
from sslfast.precision import autocast_dtype
from sslfast.quality import TABLE, QualityTable, read_rows
from sslfast.segmenter import Extras, as_volume, other_spacing, segment


def segment_missing(
    model: Model,
    checkpoint: Path,
    images: Mapping[str, Sequence[Path]],
    output: Path,
    precision: Precision = "auto",
    windows: Windows | None = None,
    *,
    extras: Extras | None = None,
    calibration: Calibration | None = None,
    dicom_seg: bool = False,
    overwrite: bool = False,
) -> tuple[dict[str, dict[str, Any]], bool, UserError | None]:
    """Segments the volumes that have no segmentation of this model and these settings in `output` yet.

    Args:
        model: the networks of `checkpoint`, on their device.
        overwrite: replace other files.

    Returns:
        The rows of quality.csv by case, whether something was segmented, and the error that names what could not be.

    Raises:
        UserError: a file would be replaced; nothing is written.
    """
    windows, extras = windows or Windows(), extras or Extras()
    device = next(model.network_a.parameters()).device
    if device.type == "cpu":
        keep_freed_memory()
    seen = "" if calibration is None else digest_of(checkpoint.parent / FILE, "")
    settings = f"{autocast_dtype(precision, device)} {windows} {extras.largest} {seen}"
    descriptions = describe(images, checkpoint, settings)
    remove_parts(output, shared=True, nested=True)
    left = find_missing(images, output, descriptions, overwrite, dicom_seg, extras.names(model.classes))
    if len(left) < len(images):
        print(f"{len(images) - len(left)} of {len(images)} segmentations are in {output} already")
    failed: UserError | None = None
    try:
        predict_cases(
            model,
            left,
            output,
            precision,
            windows,
            extras=extras,
            calibration=calibration,
            descriptions=descriptions,
            dicom_seg=dicom_seg,
        )
        print(f"{len(images)} segmentations in {output}")
    except UserError as error:
        failed = error
    rows = {name: row for name, row in read_rows(output).items() if row["made"] == descriptions.get(name)}
    return rows, bool(left), failed


def check_output(output: Path, images: Mapping[str, Sequence[Path]], given: Sequence[Path] = ()) -> None:
    """Raises UserError if `output` is a folder of the volumes, or one of the folders `given`."""
    files = [file for paths in images.values() for file in paths]
    places = {place for file in files for place in (file.parent.resolve(), file.resolve().parent, file.resolve())}
    if output.resolve() in places | {path.resolve() for path in given}:
        raise UserError(f"--output {output} is a folder of the dataset; the segmentations would lie among its files")


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
    maps: Sequence[str] = (),
) -> dict[str, Sequence[Path]]:
    """The volumes whose segmentation is not in `output` yet, or its row in quality.csv.

    Args:
        dicom_seg: <case>.dcm belongs to it.
        maps: so do these files, {} in whose names is the case.

    Raises:
        UserError: a file there is another segmentation, or not of this command, and `overwrite` is False.
    """
    readers = dict.fromkeys(("{}.nii.gz", *maps), description_of)
    readers |= {"{}.dcm": description_of_seg} if dicom_seg else {}
    files = {output / path.format(name): (name, read) for name in images for path, read in readers.items()}
    own = {file: read(file) == descriptions.get(name) for file, (name, read) in files.items() if file.exists()}
    others = [file for file, is_own in own.items() if not is_own]
    rows = read_rows(output)
    if (output / TABLE).exists() and not rows:
        others.append(output / TABLE)
    if others and not overwrite:
        count = "1 file" if len(others) == 1 else f"{len(others)} files"
        raise UserError(
            f"--output {output} holds {count} that this prediction would replace, the first {others[0]}: other "
            "label maps, or of another checkpoint or other settings. Choose another folder, or add --overwrite."
        )
    missing = {name for file, (name, _) in files.items() if not own.get(file)}
    missing |= {name for name in images if rows.get(name, {}).get("made") != descriptions.get(name)}
    return {name: paths for name, paths in images.items() if name in missing}


def predict_cases(
    model: Model,
    images: Mapping[str, Sequence[Path]],
    output: Path,
    precision: Precision = "auto",
    windows: Windows | None = None,
    *,
    extras: Extras | None = None,
    calibration: Calibration | None = None,
    descriptions: Mapping[str, str] | None = None,
    dicom_seg: bool = False,
) -> None:
    """Segments every volume; writes `output`/<case>.nii.gz, its maps, and its row in `output`/quality.csv.

    Args:
        images: the files of each case's channels.
        extras: the maps, and other changes.
        calibration: of the run, for an estimate of Dice and for flags.
        descriptions: the description in the header of each case's segmentation.
        dicom_seg: the volumes are DICOM series, and `output`/<case>.dcm is written as well.

    Raises:
        UserError: some volumes could not be segmented; raised after all the others are. Or the folder cannot be
            written.
    """
    make_folder(output)
    extras = extras or Extras()
    paths_of_maps = extras.names(model.classes)
    table = QualityTable(model.classes)
    done: dict[str, dict[str, Any]] = {}
    failed = []
    for name, paths in tqdm(images.items(), desc="segment", unit="volume", leave=False):
        try:
            volume = as_volume(paths, model)
            if warning := other_spacing(model, volume):
                tqdm.write(f"warning: {paths[0]}: {warning}", file=sys.stderr)
            result = segment(model, volume, precision=precision, windows=windows, extras=extras, scratch=output)
            description = (descriptions or {}).get(name, OWN)
            seg = make_dicom_seg(result.labels, model.classes, paths[0], description) if dicom_seg else None
        except Exception as error:  # whatever it is, the other volumes do not depend on it
            cause = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            failed.append(f"- {'' if str(paths[0]) in str(error) else f'{paths[0]}: '}{cause}{error}")
            continue
        for path, values in zip(paths_of_maps, () if result.maps is None else result.maps, strict=True):
            of_scan = from_grid(torch.from_numpy(values)[None], volume, model.preprocessing)[0].numpy()
            write_map(output / path.format(name), of_scan, volume, description)
        if seg is not None:
            write_dicom_seg(output / f"{name}.dcm", seg)
        write_label(output / f"{name}.nii.gz", result.labels, volume, description)
        table.add(name, description, result.quality, calibration.judge(volume, result.quality) if calibration else {})
        done[name] = table.rows[name]
        table.rows = {**read_rows(output), **done}  # another process may segment other volumes into the same folder
        table.write(output)
    if failed:
        raise UserError(f"{len(failed)} of {len(images)} volumes could not be segmented:\n" + "\n".join(failed))
