"""What is known of a segmentation without a reference: how far both networks agree, how sure they are, what they found.

Scores of a class but the background in a volume. A voxel counts as the windows are blended, p_a and p_b are the
networks' probabilities in a window, p their mean, H the entropy in nats:

    agreement            2 |A and B| / (|A| + |B|) of the voxels A and B in which each network predicts the class
    entropy              mean of H(p) over the voxels in which p predicts the class
    mutual_information   mean of H(p) - (H(p_a) + H(p_b)) / 2 over the same voxels

Agreement between the members of an ensemble is the best simple detector of failures over five 3D collections (Zenk et
al., MedIA 2025, arXiv 2406.03323).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from scipy.ndimage import find_objects
from scipy.ndimage import label as label_components
from torch import Tensor

from sslfast.atomic_io import whole_file

SCORES = ("agreement", "entropy", "mutual_information")
MEASURES = ("volume_ml", *SCORES, "components", "touches_border")  # of a class, in the order of the table
COLUMNS = ("case", "flag", "agreement", "estimated_dice", "dice_low", "dice_high", "made")  # of a scan
WORDS = {"case", "flag", "made"}  # those of them that are no numbers
TABLE = "quality.csv"  # in a folder of segmentations


class WindowScores:
    """Sums over the windows of a volume, from which the scores of its classes come."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.joint = torch.zeros(num_classes**2, dtype=torch.float64)  # weight by the classes of both networks
        self.sums = torch.zeros(3, num_classes, dtype=torch.float64)  # weight, entropy, information; by class

    def add(self, probabilities: Tensor, weight: Tensor) -> None:
        """Counts one window.

        Only voxels count to which a network gives a background of at most one half: all of the others are background,
        and their sums are of no use.

        Args:
            probabilities: [2, C, D, H, W] float32 of both networks.
            weight: [D, H, W] float32, that of its voxels.
        """
        counted = (probabilities[:, 0].amin(0) <= 0.5).flatten().nonzero().squeeze(1)
        p, w = probabilities.flatten(2)[:, :, counted], weight.flatten()[counted].double()
        mean = p.mean(0)
        a, b, best = (most_probable(of) for of in (*p, mean))
        self.joint += torch.bincount(a.long() * self.num_classes + b, w, self.num_classes**2).cpu()
        entropy = entropy_of(mean, 0)
        information = (entropy - entropy_of(p, 1).mean(0)).clamp_min(0)
        for sums, values in zip(self.sums, (w, w * entropy, w * information), strict=True):
            sums += torch.bincount(best, values, self.num_classes).cpu()

    def scores(self) -> dict[str, list[float]]:
        """Each of `SCORES` of the classes from 1 on; nan where no network predicts the class."""
        joint = self.joint.view(self.num_classes, -1)
        weight, entropy, information = self.sums
        values = 2 * joint.diag() / (joint.sum(0) + joint.sum(1)), entropy / weight, information / weight
        return {name: value.tolist()[1:] for name, value in zip(SCORES, values, strict=True)}


def mutual_information(probabilities: Tensor) -> Tensor:
    """That of both networks' [2, C, ...], in nats, by voxel."""
    return (entropy_of(probabilities.mean(0), 0) - entropy_of(probabilities, 1).mean(0)).clamp_min(0)


def disagreement(probabilities: Tensor) -> Tensor:
    """1 where the classes of both networks' probabilities [2, C, ...] differ, else 0."""
    a, b = (most_probable(of) for of in probabilities)
    return (a != b).float()


def most_probable(probabilities: Tensor) -> Tensor:
    """The class [...] uint8 of the highest probability [C, ...], the first if several have it.

    For these layouts, many times faster than `argmax` on a CPU.
    """
    highest, best = probabilities[0].clone(), torch.zeros_like(probabilities[0], dtype=torch.uint8)
    for c, of_class in enumerate(probabilities[1:], 1):
        best.masked_fill_(of_class > highest, c)
        torch.maximum(highest, of_class, out=highest)
    return best


def entropy_of(probabilities: Tensor, dim: int) -> Tensor:
    """Entropy in nats over the classes, which are along `dim`."""
    return torch.special.entr(probabilities).sum(dim)


def measure(labels: np.ndarray, values: Sequence[int], voxel_ml: float) -> list[dict[str, float]]:
    """Volume in mL, number of 26-connected components, and whether an edge of the volume is touched, by class.

    Args:
        labels: [X, Y, Z] with the classes' values.
        values: values of the classes of interest.
        voxel_ml: volume of a voxel.
    """
    boxes = find_objects(labels, max_label=max(values, default=0))
    found = []
    for value in values:
        box = boxes[value - 1]
        mask = labels[box] == value if box else np.zeros((0, 0, 0), bool)
        edges = [part.start == 0 or part.stop == size for part, size in zip(box or (), labels.shape, strict=False)]
        found.append(
            {
                "volume_ml": int(mask.sum()) * voxel_ml,
                "components": label_components(mask, np.ones((3, 3, 3)))[1] if box else 0,
                "touches_border": int(any(edges)),
            }
        )
    return found


def largest_components(labels: np.ndarray, values: Sequence[int]) -> None:
    """Sets all but the largest 26-connected component of each of these classes to background, in place."""
    boxes = find_objects(labels, max_label=max(values, default=0))
    for value in values:
        box = boxes[value - 1]
        if box is None:
            continue
        inside = labels[box]
        parts, count = label_components(inside == value, np.ones((3, 3, 3)))
        if count > 1:
            largest = 1 + int(np.argmax(np.bincount(parts.ravel())[1:]))
            inside[(parts > 0) & (parts != largest)] = 0


def read_rows(folder: Path) -> dict[str, dict[str, Any]]:
    """The rows of a folder's quality.csv by case: numbers, nan where a cell is empty, but for `WORDS`.

    There are none without such a file, or if it is damaged or of another program.
    """
    try:
        with open(folder / TABLE, newline="", encoding="utf-8", errors="surrogateescape") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ())[: len(COLUMNS)] != COLUMNS:
                return {}
            return {
                row["case"]: {name: text if name in WORDS else float(text or "nan") for name, text in row.items()}
                for row in reader
            }
    except (OSError, ValueError, TypeError, LookupError, csv.Error):
        return {}


@dataclass
class QualityTable:
    """The rows of quality.csv: one a scan, with columns for each class."""

    classes: Mapping[int, str]
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def columns(self) -> list[str]:
        """Names of the columns, in order."""
        names = [name for value, name in self.classes.items() if value > 0]
        return [*COLUMNS, *(f"{measure} {name}" for name in names for measure in MEASURES)]

    def write(self, folder: Path) -> None:
        """Writes the file, whole or not at all; what is not known is an empty cell."""
        with (
            whole_file(folder / TABLE) as part,
            open(part, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
        ):
            writer = csv.DictWriter(file, self.columns, extrasaction="ignore")
            writer.writeheader()
            for _, row in sorted(self.rows.items()):
                writer.writerow({name: _text(value) for name, value in row.items()})

    def add(self, case: str, made: str, quality: Mapping[str, Mapping[str, float]], said: Mapping[str, Any]) -> None:
        """Adds a scan's row.

        Args:
            made: description of the segmentation.
            quality: `MEASURES` of each class, by its name.
            said: further columns among `COLUMNS`.
        """
        measured = {f"{name} {of}": value for of, values in quality.items() for name, value in values.items()}
        agreement = mean_of([values["agreement"] for values in quality.values()])
        self.rows[case] = {"case": case, "made": made, "agreement": agreement, **said, **measured}


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """What a user should look at first: the scans with a flag, or with the lowest agreement."""
    flagged = {row["case"]: row["flag"] for row in rows if row["flag"]}
    lines = [f"- {case}: {reason}" for case, reason in sorted(flagged.items())]
    if lines:
        return f"{TABLE} has a flag on {len(flagged)} of {len(rows)} scans:\n" + "\n".join(lines)
    known = sorted((row["agreement"], row["case"]) for row in rows if not math.isnan(row["agreement"]))
    lowest = f"; the networks agree least on {known[0][1]} ({known[0][0]:.2f})" if known else ""
    return f"{TABLE} has no flag{lowest}"


def against_truth(rows: Mapping[str, Mapping[str, Any]], dice: Mapping[str, float]) -> str:
    """What was known without references beside the true mean Dice of each case; empty if nothing was.

    Args:
        rows: those of quality.csv, by case.
        dice: mean foreground Dice by case.
    """
    known = {case: row for case, row in rows.items() if case in dice and not math.isnan(row["agreement"])}
    if not known:
        return ""
    lines = []
    if any(not math.isnan(row["estimated_dice"]) for row in known.values()):
        lines.append("estimated Dice (80 % interval), and true Dice")
        for case in sorted(known, key=lambda case: known[case]["estimated_dice"]):
            estimate, low, high = (known[case][name] for name in ("estimated_dice", "dice_low", "dice_high"))
            lines.append(f"  {case:<24} {estimate:.3f} ({low:.3f} to {high:.3f})  {dice[case]:.3f}")
    if len(known) > 2:
        order = stats.spearmanr([row["agreement"] for row in known.values()], [dice[case] for case in known]).statistic
        lines.append(f"rank correlation of the networks' agreement with Dice: {order:.2f}, {len(known)} cases")
    return "\n".join(lines)


def mean_of(values: Sequence[float]) -> float:
    """Mean of the values that are not nan; nan if there is none."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _text(value: Any) -> str:
    return ("" if math.isnan(value) else f"{value:.6g}") if isinstance(value, float) else str(value)
