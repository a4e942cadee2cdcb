"""What a run has seen: an estimate of Dice from the validation cases, and the ranges outside of which a scan is odd."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from sslfast.atomic_io import whole_file
from sslfast.data.nifti import Volume, digest_of
from sslfast.data.volumes import spacing_of, upright_shape
from sslfast.errors import UserError, plural
from sslfast.quality import mean_of

FILE = "calibration.json"  # in the folder of a run
SCORE = "agreement"  # from which Dice is estimated
LEVEL = 0.8  # of the interval of an estimate
FEWEST = 4  # validation cases for an estimate
GEOMETRY = {"spacing": 1.2, "extent": 1.5}  # factors by which a scan may leave the range of those in training
VOLUME = 2.0  # factor by which a structure's volume may leave the range of the labels


class Estimate(NamedTuple):
    """An estimate of Dice, and the interval in which it lies with a probability of 80 %."""

    dice: float
    low: float
    high: float


@dataclass(frozen=True)
class Calibration:
    """What the scans of a run were like, and how good its segmentations of the validation cases are."""

    cases: list[dict[str, Any]] = field(default_factory=list)
    """One per validation case and class: case, class, dice, and `MEASURES` of the last checkpoint's segmentation."""
    labels: list[dict[str, Any]] = field(default_factory=list)
    """One per label map and class: case, class, volume_ml, components, touches_border."""
    scans: list[dict[str, Any]] = field(default_factory=list)
    """One per training and validation scan: case, spacing and extent along R, A and S, mm."""
    checkpoints: list[str] = field(default_factory=list)
    """`digest_of` the checkpoints that it holds for; empty: for whichever lies beside it."""

    def write(self, folder: Path) -> None:
        """Writes calibration.json."""
        with whole_file(folder / FILE) as part:
            part.write_text(json.dumps(_without_nan(asdict(self)), indent=1))

    @staticmethod
    def read(checkpoint: Path) -> Calibration | None:
        """That of the run of a checkpoint; None if there is none beside it, or another's, of which a warning says so.

        Raises:
            UserError: the file cannot be read.
        """
        path = checkpoint.parent / FILE
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text(), parse_constant=float)
            rows = {name: [*map(dict, content[name])] for name in ("cases", "labels", "scans")}
            calibration = Calibration(**rows, checkpoints=[*map(str, content.get("checkpoints", []))])
            calibration.estimator()
            nothing = {"volume_ml": 1.0, "touches_border": 1, SCORE: 0.0}
            calibration.odd(dict.fromkeys(GEOMETRY, [1.0] * 3), {row["class"]: nothing for row in calibration.labels})
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise UserError(f"{path} cannot be read: {error}. Remove it, or copy it again from the run.") from error
        if calibration.checkpoints and checkpoint.exists() and digest_of(checkpoint, "") not in calibration.checkpoints:
            print(f"warning: {path} is not of {checkpoint.name}; there are no estimates and no flags", file=sys.stderr)
            return None
        return calibration

    def estimator(self) -> Estimator | None:
        """The line through the validation cases; None if they are too few."""
        by_case: dict[str, list[dict[str, Any]]] = {}
        for row in self.cases:
            by_case.setdefault(row["case"], []).append(row)
        points = [
            [mean_of([_float(row[name]) for row in rows]) for name in (SCORE, "dice")] for rows in by_case.values()
        ]
        known = np.array([point for point in points if not np.isnan(point).any()]).reshape(-1, 2)
        return Estimator.fit(*known.T) if len(known) >= FEWEST else None

    def without_estimates(self) -> str:
        """Why there are no estimates of Dice; empty if there are."""
        count = len({row["case"] for row in self.cases})
        few = f"no estimates of Dice, which take {plural(FEWEST, 'validation case')}; the run had {count}"
        return "" if self.estimator() else few

    def judge(self, volume: Volume, quality: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
        """The columns of quality.csv that need a calibration: an estimate of Dice, and what is odd.

        Args:
            quality: `MEASURES` of each class, by name.
        """
        estimator = self.estimator()
        score = mean_of([values[SCORE] for values in quality.values()])
        names = ("estimated_dice", "dice_low", "dice_high")
        estimate = dict(zip(names, estimator(score), strict=True)) if estimator else {}
        return {"flag": "; ".join(self.odd(geometry(volume), quality)), **estimate}

    def always_there(self) -> set[str]:
        """Names of the classes that every label map has."""
        absent = {row["class"] for row in self.labels if _float(row["volume_ml"]) == 0}
        return {row["class"] for row in self.labels} - absent

    def odd(self, scan: Mapping[str, Sequence[float]], quality: Mapping[str, Mapping[str, float]]) -> list[str]:
        """Why a scan and its segmentation are unlike those of the run.

        Args:
            scan: spacing and extent, mm.
            quality: `MEASURES` of each class, by name.
        """
        reasons = []
        for name, factor in GEOMETRY.items():
            seen = np.array([one[name] for one in self.scans]).reshape(-1, 3)
            if len(seen) and not all(
                low / factor <= value <= high * factor
                for value, low, high in zip(scan[name], seen.min(0), seen.max(0), strict=True)
            ):
                limits = zip(seen.min(0), seen.max(0), strict=True)
                ranges = " × ".join(_range(low, high, "") for low, high in limits)
                said = " × ".join(f"{value:.3g}" for value in scan[name])
                reasons.append(f"{name} {said} mm, in training {ranges}")
        for of, measured in quality.items():
            reasons += self._odd_class(of, measured)
        return reasons

    def _odd_class(self, of: str, measured: Mapping[str, float]) -> list[str]:
        labels = [row for row in self.labels if row["class"] == of]
        cases = [row for row in self.cases if row["class"] == of]
        reasons = []
        if labels:
            volumes = [_float(row["volume_ml"]) for row in labels]
            low, high, volume = min(volumes), max(volumes), measured["volume_ml"]
            if volume == 0 < low:
                reasons.append(f"{of} not found")
            elif not low / VOLUME <= volume <= high * VOLUME:
                reasons.append(f"{of} {volume:.3g} mL, in labels {_range(low, high, ' mL')}")
            if (
                len(labels) >= FEWEST
                and measured["touches_border"]
                and not any(row["touches_border"] for row in labels)
            ):
                reasons.append(f"{of} cut off by the edge of the scan")
        if len(cases) >= FEWEST:
            seen = [value for row in cases if not math.isnan(value := _float(row[SCORE]))]
            if seen and measured[SCORE] < min(seen) - (max(seen) - min(seen)) / 2:
                reasons.append(
                    f"{SCORE} on {of} {measured[SCORE]:.2f}, on validation {_range(min(seen), max(seen), '')}"
                )
        return reasons


def geometry(volume: Volume) -> dict[str, list[float]]:
    """Spacing and extent of a volume along R, A and S, mm."""
    spacing, shape = spacing_of(volume), upright_shape(volume)
    return {"spacing": [*spacing], "extent": [n * length for n, length in zip(shape, spacing, strict=True)]}


@dataclass(frozen=True)
class Estimator:
    """Dice as a line over a score, which rises with it, by least squares."""

    slope: float
    intercept: float
    mean: float  # of the scores
    spread: float  # sum of the squared deviations of the scores from their mean
    deviation: float  # standard deviation of the residuals
    count: int

    @staticmethod
    def fit(scores: np.ndarray, dice: np.ndarray) -> Estimator:
        """The line through `dice` over `scores`, at least two of each; flat where it would fall."""
        spread = float(((scores - scores.mean()) ** 2).sum())
        rise = float(((scores - scores.mean()) * (dice - dice.mean())).sum())
        slope = max(rise / spread, 0.0) if spread > 0 else 0.0
        intercept = float(dice.mean() - slope * scores.mean())
        residuals = dice - (slope * scores + intercept)
        deviation = float(np.sqrt((residuals**2).sum() / max(len(dice) - 2, 1)))
        return Estimator(slope, intercept, float(scores.mean()), spread, deviation, len(dice))

    def __call__(self, score: float) -> Estimate:
        """The estimate for a new case; nan if its score is."""
        dice = self.slope * score + self.intercept
        distance = (score - self.mean) ** 2 / self.spread if self.spread > 0 else 0.0
        width = stats.t.ppf((1 + LEVEL) / 2, max(self.count - 2, 1)) * self.deviation
        width *= math.sqrt(1 + 1 / self.count + distance)
        return Estimate(*(float(np.clip(value, 0, 1)) for value in (dice, dice - width, dice + width)))


def _range(low: float, high: float, unit: str) -> str:
    return f"{low:.3g} to {high:.3g}{unit}" if f"{low:.3g}" != f"{high:.3g}" else f"{low:.3g}{unit}"


def _float(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _without_nan(value: Any) -> Any:
    """The same content with None for nan, which JSON has not."""
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
