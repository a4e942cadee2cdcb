"""Overlap and surface distances between a prediction and a reference, each with its definition.

    dice          2 |P and R| / (|P| + |R|)
    jaccard       |P and R| / |P or R|
    precision     |P and R| / |P|
    recall        |P and R| / |R|
    volume_error  the volume of P less that of R, mL

The surface of a mask is the set of its voxels with a face neighbour outside of it. The edge of the volume counts as
outside, as in medpy and MONAI. d(P, R) are the distances from each surface voxel of the prediction to the nearest one
of the reference, between voxel centres. Percentiles are interpolated linearly.

    hd95_pooled   95th percentile of d(P, R) and d(R, P) together (medpy's hd95)
    hd95_max      the larger of the two directed 95th percentiles (MONAI's)
    asd_pred2gt   mean of d(P, R), one direction only (medpy's asd)
    assd          mean of d(P, R) and d(R, P) together (medpy's assd, MONAI's symmetric distance)
    nsd           share of d(P, R) and d(R, P) together that is within a tolerance in mm (surface Dice, MONAI's)

The outcome of a class in a case:

    found         in the reference and in the prediction
    missed        in the reference only: overlaps and nsd are 0, distances inf; precision is nan
    spurious      in the prediction only: the same values; recall is nan, not precision
    absent        in neither: all values are nan and left out of every mean
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.ndimage import binary_erosion
from scipy.spatial import cKDTree

DISTANCES = ("hd95_pooled", "hd95_max", "asd_pred2gt", "assd")
UNITS = ("vox", "mm")
OVERLAPS = ("dice", "jaccard", "precision", "recall")
TOLERANCE = 1.0  # of nsd, mm


def dice(prediction: np.ndarray, reference: np.ndarray) -> float:
    """2 |P and R| / (|P| + |R|) of two boolean masks [X, Y, Z]; nan if both are empty."""
    total = int(prediction.sum()) + int(reference.sum())
    return 2 * int((prediction & reference).sum()) / total if total else float("nan")


def jaccard(prediction: np.ndarray, reference: np.ndarray) -> float:
    """|P and R| / |P or R| of two boolean masks [X, Y, Z]; nan if both are empty."""
    union = int((prediction | reference).sum())
    return int((prediction & reference).sum()) / union if union else float("nan")


def surface_distances(
    prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float] = (1.0, 1.0, 1.0)
) -> dict[str, float]:
    """The distances named in `DISTANCES` between two boolean masks [X, Y, Z], neither of them empty.

    Args:
        spacing: voxel size along each axis; in mm it gives distances in mm, 1 gives voxels.

    Raises:
        ValueError: the shapes differ, or a mask is empty.
    """
    _check_shapes(prediction, reference)
    if not prediction.any() or not reference.any():
        raise ValueError("both masks must hold a voxel; there is no distance to an empty one")
    box = _box(prediction | reference)
    return _distances(*_both_ways(_surface(prediction[box]), _surface(reference[box]), spacing))


def case_metrics(
    prediction: np.ndarray,
    reference: np.ndarray,
    num_classes: int,
    spacing: Sequence[float],
    ignore: int = -1,
    tolerance: float = TOLERANCE,
) -> list[dict[str, Any]]:
    """One row for each foreground class 1..num_classes-1 of two integer label maps [X, Y, Z].

    A row holds `class`, `outcome` (see the module), `OVERLAPS`, `volume_error_ml`, `<distance>_<unit>`, `nsd`, and the
    diagonal of the volume as `diagonal_vox` and `diagonal_mm`. Voxels whose reference is `ignore` are left out of both
    maps.

    Args:
        spacing: voxel size along each axis, mm.
        tolerance: of `nsd`, mm.

    Raises:
        ValueError: the shapes differ.
    """
    _check_shapes(prediction, reference)
    diagonal = {
        "diagonal_vox": float(np.linalg.norm(reference.shape)),
        "diagonal_mm": float(np.linalg.norm(np.multiply(reference.shape, spacing))),
    }
    counted = reference != ignore
    box = _box(((prediction > 0) | (reference > 0)) & counted)
    prediction, reference, counted = prediction[box], reference[box], counted[box]
    rows = []
    for c in range(1, num_classes):
        p, r = (prediction == c) & counted, reference == c
        outcome = {(True, True): "found", (False, True): "missed", (True, False): "spurious", (False, False): "absent"}[
            bool(p.any()), bool(r.any())
        ]
        row: dict[str, Any] = {"class": c, "outcome": outcome, "dice": dice(p, r), "jaccard": jaccard(p, r)}
        both, of_p, of_r = (int(mask.sum()) for mask in (p & r, p, r))
        row |= {"precision": both / of_p if of_p else float("nan"), "recall": both / of_r if of_r else float("nan")}
        absent = outcome == "absent"
        row["volume_error_ml"] = float("nan") if absent else (of_p - of_r) * float(np.prod(spacing)) / 1000
        surfaces = (_surface(p), _surface(r)) if outcome == "found" else None
        nsd = float("nan") if absent else 0.0
        for unit, size in zip(UNITS, ((1.0, 1.0, 1.0), spacing), strict=True):
            if surfaces:
                there, back = _both_ways(*surfaces, size)
                distances = _distances(there, back)
                nsd = float((np.concatenate((there, back)) <= tolerance).mean())  # of the last unit, mm
            else:
                distances = dict.fromkeys(DISTANCES, float("nan" if absent else "inf"))
            row.update({f"{name}_{unit}": distance for name, distance in distances.items()})
        rows.append({**row, "nsd": nsd, **diagonal})
    return rows


def absent_row(row: dict[str, Any], c: int) -> dict[str, Any]:
    """The row of a class that is in neither map, from another row of the same case."""
    values = (*OVERLAPS, "volume_error_ml", "nsd", *(f"{name}_{unit}" for unit in UNITS for name in DISTANCES))
    return {**row, "class": c, "outcome": "absent", **dict.fromkeys(values, float("nan"))}


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over the cases of one class, and the number of cases with each outcome.

    Overlaps, volume error and nsd: over all cases that have a value; of Dice and Jaccard also the sample standard
    deviation (n - 1).
    Distances: `<name>_found` over the found cases; `<name>_penalised` over all cases but absent ones, with the diagonal
    of the volume for a missed or spurious case. nan if there is no case.
    """
    scored = [row for row in rows if row["outcome"] != "absent"]
    found = [row for row in rows if row["outcome"] == "found"]
    summary: dict[str, Any] = {"cases": len(rows)}
    for outcome in ("found", "missed", "spurious", "absent"):
        summary[f"n_{outcome}"] = sum(row["outcome"] == outcome for row in rows)
    for name in ("dice", "jaccard"):
        values = [row[name] for row in scored]
        summary[name] = _mean(values)
        summary[f"{name}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
    for name in ("precision", "recall", "volume_error_ml", "nsd"):
        summary[name] = _mean([value for row in scored if not math.isnan(value := row[name])])
    for unit in UNITS:
        for name in (f"{distance}_{unit}" for distance in DISTANCES):
            summary[f"{name}_found"] = _mean([row[name] for row in found])
            summary[f"{name}_penalised"] = _mean(
                [row[name] if row["outcome"] == "found" else row[f"diagonal_{unit}"] for row in scored]
            )
    return summary


def _check_shapes(prediction: np.ndarray, reference: np.ndarray) -> None:
    if prediction.shape != reference.shape:
        raise ValueError(f"prediction has shape {prediction.shape}, reference {reference.shape}; they must be the same")


def _box(mask: np.ndarray) -> tuple[slice, ...]:
    """The smallest box around the mask; empty if the mask is empty."""
    box = []
    for axis in range(mask.ndim):
        indices = np.flatnonzero(mask.any(tuple(i for i in range(mask.ndim) if i != axis)))
        box.append(slice(int(indices[0]), int(indices[-1]) + 1) if indices.size else slice(0))
    return tuple(box)


def _surface(mask: np.ndarray) -> np.ndarray:
    """Indices [M, 3] of the surface voxels; the array's edge counts as outside."""
    return np.argwhere(mask & ~binary_erosion(mask))


def _both_ways(
    prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """d(P, R) and d(R, P) of two surfaces, indices [M, 3] and [N, 3]."""
    p, r = prediction * np.asarray(spacing), reference * np.asarray(spacing)
    return np.asarray(cKDTree(r).query(p)[0]), np.asarray(cKDTree(p).query(r)[0])


def _distances(there: np.ndarray, back: np.ndarray) -> dict[str, float]:
    """The distances named in `DISTANCES`."""
    both = np.concatenate((there, back))
    return {
        "hd95_pooled": float(np.percentile(both, 95)),
        "hd95_max": float(max(np.percentile(there, 95), np.percentile(back, 95))),
        "asd_pred2gt": float(there.mean()),
        "assd": float(both.mean()),
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
