"""Compares a folder of segmentations with reference label maps; the result is a table, CSV and JSON."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sslfast import metrics
from sslfast.atomic_io import make_folder, whole_file
from sslfast.data.nifti import nifti_files, on_grid_of, read_label
from sslfast.errors import UserError


@dataclass(frozen=True)
class Evaluation:
    """The metrics of a set of cases."""

    rows: list[dict[str, Any]]
    """One per case and class: case, spacing, and the row of `sslfast.metrics.case_metrics`."""
    classes: dict[int, str]

    @property
    def summary(self) -> dict[int, dict[str, Any]]:
        """`sslfast.metrics.summarise` of each foreground class."""
        return {c: metrics.summarise([row for row in self.rows if row["class"] == c]) for c in self.classes if c > 0}

    def case_dice(self) -> dict[str, float]:
        """Mean foreground Dice of each case with at least one class to score."""
        scores: dict[str, list[float]] = {}
        for row in self.rows:
            if not math.isnan(row["dice"]):
                scores.setdefault(row["case"], []).append(row["dice"])
        return {case: sum(values) / len(values) for case, values in scores.items()}

    @property
    def mean_dice(self) -> float:
        """Mean of `case_dice` over the cases; nan if there is nothing to score."""
        scores = self.case_dice()
        return sum(scores.values()) / len(scores) if scores else math.nan

    def to_table(self) -> str:
        """One line per class, then the Dice of each case."""
        head = (
            f"{'class':<16} {'cases':>5} {'missed':>6} {'Dice':>13} {'Jaccard':>13} "
            f"{'hd95 vox':>9} {'hd95 mm':>9} {'asd vox':>9} {'asd mm':>9}"
        )
        lines = [head]
        for c, s in self.summary.items():
            overlap = "".join(f" {_show(s[name]):>6}±{_show(s[f'{name}_std']):<6}" for name in ("dice", "jaccard"))
            names = ("hd95_pooled_vox", "hd95_pooled_mm", "asd_pred2gt_vox", "asd_pred2gt_mm")
            distances = "".join(f" {_show(s[f'{name}_found'], 2):>9}" for name in names)
            lines.append(f"{self.classes[c]:<16} {s['cases']:>5} {s['n_missed']:>6}{overlap}{distances}")
            if s["n_missed"] or s["n_spurious"]:
                penalised = "".join(f" {_show(s[f'{name}_penalised'], 2):>9}" for name in names)
                lines.append(f"{'  missed or spurious counted as the volume’s diagonal':<57}{penalised}")
        scores = sorted(self.case_dice().items(), key=lambda item: item[1])
        lines.append("Dice by case: " + ", ".join(f"{case} {value:.3f}" for case, value in scores))
        return "\n".join(lines)

    def write(self, folder: Path) -> None:
        """Writes metrics.csv (the rows) and metrics.json (definitions, summary, rows; inf as "inf", nan as null)."""
        make_folder(folder)
        with whole_file(folder / "metrics.csv") as part, open(part, "w", newline="") as file:
            writer = csv.DictWriter(file, list(self.rows[0]) if self.rows else [])
            writer.writeheader()
            writer.writerows(self.rows)
        content = {
            "definitions": (metrics.__doc__ or "").strip(),
            "classes": self.classes,
            "mean_dice": self.mean_dice,
            "summary": self.summary,
            "rows": self.rows,
        }
        with whole_file(folder / "metrics.json") as part:
            part.write_text(json.dumps(_json(content), indent=1, allow_nan=False))


def evaluate_folder(
    predictions: Path,
    labels: Mapping[str, Path],
    *,
    classes: dict[int, str] | None = None,
    ignore_label: int = -1,
) -> Evaluation:
    """Compares `predictions`/<case>.nii.gz with the reference of each case.

    Args:
        predictions: folder of label maps.
        labels: reference label map of each case.
        classes: class names by number; None: the numbers in the files.
        ignore_label: value in the references for voxels that are not annotated.

    Raises:
        UserError: there is no reference, a reference has no segmentation, a file cannot be read, or shapes, affines or
            labels do not match.
    """
    if not labels:
        raise UserError("there is no reference label map to compare with")
    files = nifti_files(predictions)
    missing = sorted(labels.keys() - files.keys())
    if missing:
        raise UserError(f"{predictions} has no segmentation of {', '.join(missing)}; every reference needs one")
    num_classes = len(classes) if classes else None
    pairs = {}
    for case in tqdm(labels, desc="read", unit="case", leave=False):
        reference = read_label(labels[case], num_classes=num_classes, ignore_label=ignore_label)
        prediction = read_label(files[case], num_classes=num_classes)
        pairs[case] = on_grid_of(reference, prediction, labels[case], files[case]), reference
    if classes is None:
        top = max(int(volume.array.max()) for pair in pairs.values() for volume in pair)
        classes = {c: "background" if c == 0 else f"class {c}" for c in range(max(top, 1) + 1)}
    rows: list[dict[str, Any]] = []
    for case, (prediction, reference) in tqdm(pairs.items(), desc="evaluate", unit="case", leave=False):
        spacing = reference.spacing
        for row in metrics.case_metrics(prediction.array, reference.array, len(classes), spacing):
            rows.append({"case": case, "spacing_mm": " ".join(f"{s:g}" for s in spacing), **row})
    return Evaluation(rows, classes)


def _show(value: float, digits: int = 3) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _json(value: Any) -> Any:
    """The same content with nan as None and infinities as strings, which JSON can hold."""
    if isinstance(value, dict):
        return {str(key): _json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value
