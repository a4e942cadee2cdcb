"""Overlap and surface distances between a prediction and a reference, each by a named definition.

A surface is the mask's voxels that have a face neighbour outside it; the edge of the volume counts as outside (medpy and
MONAI agree on that). d(P, R) are the distances from every surface voxel of the prediction to the nearest of the reference.

    hd95_pooled   95th percentile of d(P, R) and d(R, P) together (medpy's hd95)
    hd95_max      the larger of the two directed 95th percentiles (MONAI's)
    asd_pred2gt   mean of d(P, R), one direction only (medpy's asd)
    assd          mean of d(P, R) and d(R, P) together (medpy's assd, MONAI's symmetric distance)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

DISTANCES = ("hd95_pooled", "hd95_max", "asd_pred2gt", "assd")
UNITS = ("vox", "mm")


def dice(prediction: np.ndarray, reference: np.ndarray) -> float:
    """2 |P and R| / (|P| + |R|) of two masks [X, Y, Z]; nan if both are empty."""
    total = int(prediction.sum()) + int(reference.sum())
    return 2 * int((prediction & reference).sum()) / total if total else float("nan")


def jaccard(prediction: np.ndarray, reference: np.ndarray) -> float:
    """|P and R| / |P or R| of two masks [X, Y, Z]; nan if both are empty."""
    union = int((prediction | reference).sum())
    return int((prediction & reference).sum()) / union if union else float("nan")


def surface_distances(
    prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float] = (1.0, 1.0, 1.0)
) -> dict[str, float]:
    """Every distance of `DISTANCES` between two masks [X, Y, Z] that are not empty.

    Args:
        spacing: of the axes; mm gives mm, 1 gives voxels.

    Raises:
        ValueError: a mask is empty; there is no distance to nothing.
    """
    if not prediction.any() or not reference.any():
        raise ValueError("both masks must hold a voxel; there is no distance to an empty one")
    from scipy.spatial import cKDTree

    points = [_surface(mask, spacing) for mask in _crop(prediction, reference)]
    there = np.asarray(cKDTree(points[1]).query(points[0])[0])
    back = np.asarray(cKDTree(points[0]).query(points[1])[0])
    return {
        "hd95_pooled": float(np.percentile(np.concatenate((there, back)), 95)),
        "hd95_max": float(max(np.percentile(there, 95), np.percentile(back, 95))),
        "asd_pred2gt": float(there.mean()),
        "assd": float(np.concatenate((there, back)).mean()),
    }


def case_metrics(
    prediction: np.ndarray, reference: np.ndarray, num_classes: int, spacing: Sequence[float], ignore: int = -1
) -> list[dict[str, Any]]:
    """One row for each foreground class of two label maps [X, Y, Z].

    A row's `outcome` is "found"; "missed" (in the reference, not predicted) or "spurious" (the reverse): Dice and Jaccard
    0, distances inf; or "absent" (in neither): nothing to score, nan. Voxels whose reference is `ignore` count nowhere.

    Args:
        spacing: mm.
    """
    counted = reference != ignore
    diagonal = {
        "vox": float(np.linalg.norm(reference.shape)),
        "mm": float(np.linalg.norm(np.multiply(reference.shape, spacing))),
    }
    rows = []
    for c in range(1, num_classes):
        p, r = (prediction == c) & counted, reference == c
        outcome = {(True, True): "found", (False, True): "missed", (True, False): "spurious", (False, False): "absent"}[
            bool(p.any()), bool(r.any())
        ]
        row: dict[str, Any] = {"class": c, "outcome": outcome, "dice": dice(p, r), "jaccard": jaccard(p, r)}
        for unit, size in (("vox", (1.0, 1.0, 1.0)), ("mm", spacing)):
            if outcome == "found":
                distances = surface_distances(p, r, size)
            else:
                distances = dict.fromkeys(DISTANCES, float("nan" if outcome == "absent" else "inf"))
            row.update({f"{name}_{unit}": value for name, value in distances.items()})
        rows.append({**row, **{f"diagonal_{unit}": length for unit, length in diagonal.items()}})
    return rows


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the cases of one class.

    Dice and Jaccard: over all cases but the absent. Distances: `<name>_found` over the found cases, `<name>_penalised`
    over all scored ones, where a missed or spurious case has the diagonal of its volume. nan where there is no case.
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
    for unit in UNITS:
        for name in (f"{distance}_{unit}" for distance in DISTANCES):
            summary[f"{name}_found"] = _mean([row[name] for row in found])
            summary[f"{name}_penalised"] = _mean(
                [row[name] if row["outcome"] == "found" else row[f"diagonal_{unit}"] for row in scored]
            )
    return summary


def _crop(prediction: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both masks within the box around their union."""
    union = prediction | reference
    box = []
    for axis in range(union.ndim):
        places = np.flatnonzero(union.any(tuple(i for i in range(union.ndim) if i != axis)))
        box.append(slice(int(places[0]), int(places[-1]) + 1))
    return prediction[tuple(box)], reference[tuple(box)]


def _surface(mask: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Positions [M, 3] of the surface voxels."""
    from scipy.ndimage import binary_erosion

    return np.argwhere(mask & ~binary_erosion(mask)) * np.asarray(spacing)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
