"""One self-contained HTML page about a set of segmentations: a table of the cases, and three planes of each."""

from __future__ import annotations

import base64
import colorsys
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.resources import files
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from PIL import Image
from tqdm import tqdm

from sslfast.atomic_io import whole_file
from sslfast.data.nifti import IGNORE, on_grid_of, read_channels, read_image, read_label
from sslfast.errors import UserError

PAGE = "report.html"
MARK = '<meta name="generator" content="sslfast report">'  # by which a page is known as ours
PLACE = "__DATA__"  # in the template
PICTURED = 24  # cases with pictures, unless another number is asked for
SLICES = 24  # of a plane at most
SIDE = 176  # pixels of a slice at most
QUALITY = 80  # of the JPEG pictures
SAMPLED = 10**6  # voxels from which the window of grey values is taken
MARGIN = 0.1  # of the structure's extent, shown on either side
PLANES = (  # name, axis of R A S, axes to the right and down, letters left, right, top, bottom
    ("axial", 2, (0, 1), "RLAP"),
    ("coronal", 1, (0, 2), "RLSI"),
    ("sagittal", 0, (1, 2), "APSI"),
)
PALETTE = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#d55e00", "#cc79a7", "#0072b2")  # Okabe and Ito
SHOWN = ("dice", "estimated_dice", "dice_low", "dice_high", "agreement", "flag")  # columns, where they hold anything


@dataclass(frozen=True)
class ReportCase:
    """A segmentation and what belongs to it."""

    name: str
    images: Sequence[Path]
    segmentation: Path
    reference: Path | None = None
    disagreement: Path | None = None
    row: Mapping[str, Any] = field(default_factory=dict)
    """Its row of quality.csv."""
    dice: float = math.nan

    @property
    def trust(self) -> tuple[bool, float]:
        """For the order of the cases: those that need a look come first."""
        scores = (self.dice, self.row.get("estimated_dice", math.nan), self.row.get("agreement", math.nan))
        return not self.row.get("flag"), next((score for score in scores if not math.isnan(score)), math.inf)


def write_report(
    path: Path,
    title: str,
    cases: Sequence[ReportCase],
    classes: Mapping[int, str],
    *,
    limit: int,
    merged: Mapping[int, int] | None = None,
    ignore_label: int = IGNORE,
    texts: Mapping[str, str] | None = None,
    curves: Path | None = None,
) -> Path:
    """Writes the page to `path` and returns `path`.

    Args:
        title: headline of the page.
        cases: those of the table; the ones that need a look most come first.
        classes: class names by value.
        limit: number of cases that have pictures.
        merged: further values in the references, and the value of the class as which they count.
        ignore_label: value in the references of voxels that are not annotated.
        texts: further texts by headline, such as settings.
        curves: a PNG of the training's curves.

    A case whose files cannot be read has the reason in place of its pictures.

    Raises:
        UserError: `path` cannot be written or is not a report.
    """
    check_own(path)
    ordered = sorted(cases, key=lambda case: case.trust)
    foreground = {value: name for value, name in classes.items() if value > 0}
    volumes = [f"volume_ml {name}" for name in foreground.values()]
    known = {one: any(_cell(_value(case, one)) not in (None, "") for case in ordered) for one in (*SHOWN, *volumes)}
    columns = [one for one in known if known[one]]
    pictured = tqdm(ordered[:limit], desc="report", unit="case", leave=False)
    planes: dict[str, list[dict[str, Any]]] = {}
    failed: dict[str, str] = {}
    for case in pictured:
        try:
            planes[case.name] = planes_of(case, [*foreground], merged, ignore_label)
        except UserError as error:
            failed[case.name] = str(error)
    content = {
        "title": title,
        "about": f"{len(cases)} cases, {date.today()}. This file holds pictures of scans: treat it as the scans.",
        "classes": [{"index": i, "name": name, "rgb": colour(i - 1)} for i, name in enumerate(foreground.values(), 1)],
        "columns": ["case", *(name.replace("_", " ").replace("volume ml", "mL") for name in columns)],
        "cases": [
            {
                "name": case.name,
                "facts": _facts(case),
                "failed": failed.get(case.name),
                "cells": [case.name, *(_cell(_value(case, name)) for name in columns)],
                "reference": case.reference is not None,
                "disagreement": case.disagreement is not None,
                "planes": planes.get(case.name),
            }
            for case in ordered
        ],
        "curves": _uri(curves.read_bytes(), "png") if curves else None,
        "texts": [*(texts or {}).items()],
    }
    text = json.dumps(content, allow_nan=False).replace("<", "\\u003c")
    template = files("sslfast").joinpath("report_page.html").read_text(encoding="utf-8")
    with whole_file(path) as part:
        part.write_text(template.replace(PLACE, text, 1), encoding="utf-8")
    return path


def check_own(path: Path) -> None:
    """Raises UserError if `path` is a file that is not a report."""
    if path.exists():
        with open(path, encoding="utf-8", errors="replace") as file:
            if MARK not in file.read(2000):
                raise UserError(f"{path} is not a report of sslfast, and would be replaced; move it away")


def planes_of(
    case: ReportCase, values: Sequence[int], merged: Mapping[int, int] | None = None, ignore_label: int = IGNORE
) -> list[dict[str, Any]]:
    """The three planes of a case: slices of the image, and maps of classes and disagreement, below each other.

    Raises:
        UserError: a file cannot be read, or lies on another grid.
    """
    first = read_channels(case.images[:1]).channels[0]
    classes = (0, *values)

    def indices(path: Path, **settings: Any) -> np.ndarray:
        label = on_grid_of(first, read_label(path, classes=classes, **settings), case.images[0], path)
        return np.maximum(label.array, 0).astype(np.uint8)

    predicted = indices(case.segmentation)
    reference = np.zeros_like(predicted)
    if case.reference is not None:
        reference = indices(case.reference, merged=merged, ignore_label=ignore_label)
    differ = np.zeros_like(predicted)
    if case.disagreement is not None:
        share = on_grid_of(first, read_image(case.disagreement), case.images[0], case.disagreement).array
        differ = np.round(255 * np.clip(share, 0, 1)).astype(np.uint8)
    low, high = np.percentile(first.array.ravel()[:: max(1, first.array.size // SAMPLED)], (1, 99))
    grey = np.round(255 * np.clip((first.array - low) / max(high - low, 1e-6), 0, 1)).astype(np.uint8)
    orientation = nib.orientations.io_orientation(first.affine)
    arrays = [nib.orientations.apply_orientation(a, orientation) for a in (grey, predicted, reference, differ)]
    lengths = np.empty(3)
    lengths[orientation[:, 0].astype(int)] = first.spacing
    return [_plane(*plane, arrays, lengths) for plane in PLANES]


def _plane(
    name: str, axis: int, across: tuple[int, int], sides: str, arrays: Sequence[np.ndarray], lengths: np.ndarray
) -> dict[str, Any]:
    """One plane of volumes in R A S, drawn as radiologists do: the patient's right is on the left, the top is up."""
    turned = (np.transpose(array, (axis, across[1], across[0]))[:, ::-1, ::-1] for array in arrays)
    grey, predicted, reference, differ = turned
    count, height, width = grey.shape
    found = np.flatnonzero(((predicted > 0) | (reference > 0)).any((1, 2)))
    begin, end = (int(found[0]), int(found[-1])) if len(found) else (0, count - 1)
    more = round(MARGIN * (end - begin))
    begin, end = max(0, begin - more), min(count - 1, end + more)
    slices = np.unique(np.linspace(begin, end, min(SLICES, end - begin + 1)).round().astype(int))
    mm = (width * lengths[across[0]], height * lengths[across[1]])
    scale = min(1.0, SIDE / max(width, height))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    greys = [np.asarray(Image.fromarray(grey[i]).resize(size, Image.Resampling.BOX)) for i in slices]
    maps = np.stack([predicted[slices], reference[slices], differ[slices]], -1)
    small = [
        np.asarray(Image.fromarray(one).resize(size, Image.Resampling.NEAREST)) for one in np.ascontiguousarray(maps)
    ]
    area = (predicted[slices] > 0).sum((1, 2)) + (reference[slices] > 0).sum((1, 2))
    return {
        "name": name,
        "sides": sides,
        "slices": slices.tolist(),
        "of": count,
        "start": int(area.argmax()) if area.any() else len(slices) // 2,
        "width": size[0],
        "height": size[1],
        "aspect": round(float(mm[0] / mm[1]), 4),
        "image": _picture(np.concatenate(greys), "jpeg", quality=QUALITY),
        "maps": _picture(np.concatenate(small), "png", optimize=True),
    }


def colour(index: int) -> list[int]:
    """RGB of a class by its place among the foreground classes; far from those of its neighbours."""
    if index < len(PALETTE):
        return [int(PALETTE[index][i : i + 2], 16) for i in (1, 3, 5)]
    hue = (index * 0.61803398875) % 1
    return [round(255 * part) for part in colorsys.hls_to_rgb(hue, 0.6 if index % 2 else 0.45, 0.75)]


def _value(case: ReportCase, column: str) -> Any:
    return case.dice if column == "dice" else case.row.get(column, math.nan)


def _cell(value: Any) -> Any:
    """A value of the table, as JSON can hold it."""
    return (None if math.isnan(value) else round(value, 4)) if isinstance(value, float) else value


def _facts(case: ReportCase) -> str:
    """What the headline of a case says below its name."""
    said = []
    if not math.isnan(case.dice):
        said.append(f"Dice {case.dice:.3f}")
    if not math.isnan(case.row.get("estimated_dice", math.nan)):
        said.append("estimated {estimated_dice:.3f} ({dice_low:.3f} to {dice_high:.3f})".format(**case.row))
    if not math.isnan(case.row.get("agreement", math.nan)):
        said.append(f"agreement {case.row['agreement']:.3f}")
    return ", ".join(said) + (f". {case.row['flag']}" if case.row.get("flag") else "")


def _picture(array: np.ndarray, kind: str, **settings: Any) -> str:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(buffer, kind, **settings)
    return _uri(buffer.getvalue(), kind)


def _uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
