"""The plots of a run: its curves, and segmentations drawn over the volumes."""

from __future__ import annotations

import csv
import fnmatch
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from sslfast.atomic_io import whole_file
from sslfast.data.folder import Case
from sslfast.data.nifti import on_grid_of, read_channels, read_label
from sslfast.evaluation import Evaluation

PANELS = (
    ("loss", ("loss_a", "loss_b")),
    ("Dice loss on labelled patches", ("dice_a", "dice_b")),
    ("Dice of each class on labelled patches", ("class_dice_*",)),
    ("foreground of the unlabelled patches (fraction)", ("foreground",)),
    ("pseudo-label and contrastive loss", ("pseudo_a", "pseudo_b", "contrast")),
    ("reliable voxels (fraction), discrepancy loss", ("kept_fraction", "discrepancy_a", "discrepancy_b")),
    ("validation Dice", ("validation_dice",)),
)


def draw_curves(log: Path, path: Path, title: str) -> Path:
    """Plots the columns of a run's log.csv against the step. Writes a PNG to `path` and returns `path`."""
    with open(log, newline="") as file:
        rows = list(csv.DictReader(file))
    logged = [column for column in (rows[0] if rows else ()) if any(row[column] for row in rows)]
    panels = [(name, [c for p in patterns for c in fnmatch.filter(logged, p)]) for name, patterns in PANELS]
    panels = [(name, columns) for name, columns in panels if columns]
    figure = _figure(4 * max(len(panels), 1), 3.2)
    for i, (name, columns) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), i + 1)
        for column in columns:
            points = [(int(row["step"]), float(row[column])) for row in rows if row.get(column)]
            axes.plot(*zip(*points, strict=True), label=column, linewidth=1, marker="o" if len(points) < 10 else None)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, ncols=1 + len(columns) // 8)
    figure.suptitle(title, fontsize=10)
    return _save(figure, path)


def draw_overlays(cases: Sequence[Case], predictions: Path, path: Path, evaluation: Evaluation) -> Path:
    """Draws the worst, the best and two other cases: three slices each, with contours of reference and prediction.

    Args:
        cases: labelled cases.
        predictions: folder of their segmentations, <name>.nii.gz.
        path: where the PNG is written; returned.
        evaluation: metrics of these cases, for the order and the Dice in the margin.
    """
    scores = evaluation.case_dice()
    ordered = sorted(cases, key=lambda case: scores.get(case.name, 0.0))
    chosen = [ordered[round(i)] for i in np.linspace(0, len(ordered) - 1, min(4, len(ordered)))]
    figure = _figure(9, 3 * len(chosen))
    for row, case in enumerate(chosen):
        assert case.label is not None
        image, file = read_channels(case.images).channels[0], predictions / f"{case.name}.nii.gz"
        reference = on_grid_of(image, read_label(case.label), case.image, case.label).array
        predicted = on_grid_of(image, read_label(file), case.image, file).array
        inside = np.argwhere(reference > 0)
        centre = inside.mean(0).round().astype(int) if len(inside) else np.array(reference.shape) // 2
        low, high = np.percentile(image.array, (1, 99))
        for axis in range(3):
            axes = figure.add_subplot(len(chosen), 3, 3 * row + axis + 1)
            a, r, p = (np.take(v, centre[axis], axis).T for v in (image.array, reference, predicted))
            spacing = [s for i, s in enumerate(image.spacing) if i != axis]
            axes.imshow(a, cmap="gray", vmin=low, vmax=high, origin="lower", aspect=spacing[1] / spacing[0])
            for mask, colour in ((r, "#30d060"), (p, "#ff4060")):
                for c in np.unique(mask[mask > 0]):
                    axes.contour(mask == c, [0.5], colors=colour, linewidths=1)
            axes.set_xticks([])
            axes.set_yticks([])
            if axis == 0:
                axes.set_ylabel(f"{case.name}\nDice {scores.get(case.name, float('nan')):.3f}", fontsize=9)
    figure.suptitle("green: reference, red: prediction", fontsize=10)
    return _save(figure, path)


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: Path) -> Path:
    with whole_file(path) as part:
        figure.savefig(part, dpi=110, format="png")
    return path
