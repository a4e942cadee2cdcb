"""The report pages of runs and of folders of segmentations."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sslfast.cli import read_config
from sslfast.data.demo.cohorts import data_folder
from sslfast.data.folder import open_dataset, split_training, volumes_in
from sslfast.data.inputs import find_images
from sslfast.data.nifti import read_label
from sslfast.errors import UserError
from sslfast.metrics import dice
from sslfast.quality import mean_of, read_rows
from sslfast.report_page import ReportCase, write_report
from sslfast.training.checkpoint import load_model
from sslfast.training.config import CONFIG


def report_of_run(folder: Path, output: Path, limit: int) -> Path:
    """Writes the page of a finished run, about its test cases, or else its validation cases; returns its path.

    Raises:
        UserError: a file of the run is missing or cannot be read, or `output` is another file.
    """
    values = read_config(folder / CONFIG)
    dataset = open_dataset(data_folder(values["data"]))
    split = split_training(dataset, values.get("labeled"), values.get("validation", 0))
    of_part = {"test": dataset.test, "validation": split.validation}
    part = next((part for part in of_part if (folder / part / "metrics.json").exists()), None)
    cases, classes = [], {}
    if part:
        metrics = _read_json(folder / part / "metrics.json")
        classes = {int(value): str(name) for value, name in metrics["classes"].items()}
        true: dict[str, list[float]] = {}
        for row in metrics["rows"]:
            true.setdefault(row["case"], []).append(math.nan if row["dice"] is None else float(row["dice"]))
        rows = read_rows(folder / part)
        cases = [
            ReportCase(
                case.name,
                case.images,
                folder / part / f"{case.name}.nii.gz",
                case.label,
                _if_there(folder / part / "disagreement" / f"{case.name}.nii.gz"),
                rows.get(case.name, {}),
                mean_of(true.get(case.name, [])),
            )
            for case in of_part[part]
            if (folder / part / f"{case.name}.nii.gz").exists() and case.name not in metrics["failed"]
        ]
    texts = {name: file.read_text() for name in (CONFIG, "plan.yaml") if (file := folder / name).exists()}
    title = f"{folder.resolve().name}: {values.get('method', 'a run')}, {part or 'no'} cases"
    return write_report(
        output, title, cases, classes, limit=limit, texts=texts, curves=_if_there(folder / "curves.png")
    )


def report_of_segmentations(
    folder: Path,
    images: Sequence[Path],
    output: Path,
    limit: int,
    *,
    labels: Path | None = None,
    checkpoint: Path | None = None,
    classes: Mapping[int, str] | None = None,
    channels: Sequence[str] = ("image",),
) -> Path:
    """Writes the page of a folder of segmentations; returns its path.

    Args:
        images: folders and files that were segmented.
        labels: folder of reference label maps.
        checkpoint: a run or checkpoint, for the names of classes and channels, in place of the following.
        classes: class names by value; None: the values in the segmentations.
        channels: names of the channels.

    Raises:
        UserError: no volume has a segmentation, a file cannot be read, or `output` is another file.
    """
    if checkpoint is not None:
        model = load_model(checkpoint)
        classes, channels = model.classes, model.channels
    found = {
        name: paths for name, paths in find_images(images, channels).items() if (folder / f"{name}.nii.gz").exists()
    }
    if not found:
        raise UserError(f"{folder} has no segmentation <case>.nii.gz of these volumes; are these the right folders?")
    references, rows = volumes_in(labels) if labels else {}, read_rows(folder)
    if classes is None:
        values = {int(v) for name in found for v in np.unique(read_label(folder / f"{name}.nii.gz").array)}
        classes = {value: f"class {value}" if value else "background" for value in sorted(values | {0})}
    cases = [
        ReportCase(
            name,
            paths,
            segmentation := folder / f"{name}.nii.gz",
            references.get(name),
            _if_there(folder / "disagreement" / f"{name}.nii.gz"),
            rows.get(name, {}),
            _dice(segmentation, references[name], classes) if name in references else math.nan,
        )
        for name, paths in found.items()
    ]
    return write_report(output, f"{folder.resolve().name}: segmentations", cases, classes, limit=limit)


def _dice(segmentation: Path, reference: Path, classes: Mapping[int, str]) -> float:
    """Mean Dice over the foreground classes."""
    predicted, known = (read_label(path).array for path in (segmentation, reference))
    if predicted.shape != known.shape:
        raise UserError(f"{segmentation} has shape {predicted.shape}, its reference {reference} {known.shape}")
    return mean_of([dice((predicted == value) & (known >= 0), known == value) for value in classes if value > 0])


def _if_there(path: Path) -> Path | None:
    return path if path.exists() else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        return {name: content[name] for name in ("classes", "rows", "failed")}
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}. Evaluate the segmentations anew.") from error
