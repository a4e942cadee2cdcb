"""The report pages of runs and of folders of segmentations."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sslfast.cli import read_config
from sslfast.data.classes import Classes
from sslfast.data.folder import volumes_in
from sslfast.data.inputs import find_images
from sslfast.data.nifti import IGNORE, read_label
from sslfast.errors import UserError
from sslfast.evaluation import evaluate_folder, named_classes
from sslfast.model import Model
from sslfast.quality import mean_of, read_rows
from sslfast.report_page import ReportCase, write_report
from sslfast.training.checkpoint import load_model
from sslfast.training.config import CONFIG
from sslfast.training.run_folder import cases_of_run


def report_of_run(folder: Path, output: Path, limit: int) -> Path:
    """Writes the page of a finished run, about its test cases, or else its validation cases; returns its path.

    Raises:
        UserError: a file of the run is missing or cannot be read, or `output` is another file.
    """
    values = read_config(folder / CONFIG)
    dataset, split = cases_of_run(folder)
    of_part = {"test": dataset.test, "validation": split.validation}
    part = next((part for part in of_part if (folder / part / "metrics.json").exists()), None)
    model = load_model(folder)
    cases = []
    if part:
        dice, failed = _read_metrics(folder / part / "metrics.json")
        rows = read_rows(folder / part)
        cases = [
            ReportCase(
                case.name,
                case.images,
                folder / part / f"{case.name}.nii.gz",
                case.label,
                _if_there(folder / part / "disagreement" / f"{case.name}.nii.gz"),
                rows.get(case.name, {}),
                dice.get(case.name, math.nan),
            )
            for case in of_part[part]
            if (folder / part / f"{case.name}.nii.gz").exists() and case.name not in failed
        ]
    texts = {name: file.read_text() for name in (CONFIG, "plan.yaml") if (file := folder / name).exists()}
    return write_report(
        output,
        f"{folder.resolve().name}: {values.get('method', 'a run')}, {part or 'no'} cases",
        cases,
        model.classes,
        limit=limit,
        merged=model.merged,
        ignore_label=dataset.ignores(values.get("ignore_label", IGNORE)),
        texts=texts,
        curves=_if_there(folder / "curves.png"),
    )


def report_of_segmentations(
    folder: Path,
    images: Sequence[Path],
    output: Path,
    limit: int,
    *,
    labels: Path | None = None,
    model: Model | None = None,
) -> Path:
    """Writes the page of a folder of segmentations; returns its path.

    Args:
        images: folders and files that were segmented.
        labels: folder of reference label maps.
        model: what segmented them; None: the classes are those of dataset.json with the references or beside them, or
            the values in the segmentations.

    Raises:
        UserError: no volume has a segmentation, no reference can be compared, or `output` is another file.
    """
    channels = model.channels if model else ("image",)
    found = {
        name: paths for name, paths in find_images(images, channels).items() if (folder / f"{name}.nii.gz").exists()
    }
    if not found:
        raise UserError(f"{folder} has no segmentation <case>.nii.gz of these volumes; are these the right folders?")
    references = {name: path for name, path in volumes_in(labels).items() if name in found} if labels else {}
    classes, ignore_label = named_classes(labels, references, (), IGNORE) if labels else (None, IGNORE)
    if model:
        classes = Classes(model.classes, model.merged)
    if classes is None:
        values = {int(v) for name in found for v in np.unique(read_label(folder / f"{name}.nii.gz").array)}
        classes = Classes({value: f"class {value}" if value else "background" for value in sorted(values | {0})})
    dice: dict[str, float] = {}
    if references:
        dice = evaluate_folder(folder, references, classes=classes, ignore_label=ignore_label, partial=True).case_dice()
    rows = read_rows(folder)
    cases = [
        ReportCase(
            name,
            paths,
            folder / f"{name}.nii.gz",
            references.get(name),
            _if_there(folder / "disagreement" / f"{name}.nii.gz"),
            rows.get(name, {}),
            dice.get(name, math.nan),
        )
        for name, paths in found.items()
    ]
    title = f"{folder.resolve().name}: segmentations"
    return write_report(
        output, title, cases, classes.names, limit=limit, merged=classes.merged, ignore_label=ignore_label
    )


def _if_there(path: Path) -> Path | None:
    return path if path.exists() else None


def _read_metrics(path: Path) -> tuple[dict[str, float], set[str]]:
    """Mean Dice of each case in a metrics.json, and the cases that failed.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        content = json.loads(path.read_text())
        by_case: dict[str, list[float]] = {}
        for row in content["rows"]:
            by_case.setdefault(row["case"], []).append(math.nan if row["dice"] is None else float(row["dice"]))
        return {case: mean_of(values) for case, values in by_case.items()}, {*content["failed"]}
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}. Evaluate the segmentations anew.") from error
