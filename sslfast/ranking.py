"""Which scans to label next: those on which the two networks agree least, each class in its turn.

    z_ic = log(1 - agreement of class c on scan i), less its mean over the scans, over its standard deviation

Class after class takes, of the scans that are left, the one with the highest beta z_ic + g, where g are draws from the
standard Gumbel distribution. That draws scans without replacement, with probabilities that grow as exp(beta z_ic)
(Kirsch et al., arXiv 2106.12059): of many scans that are hard for the same reason, not all come first. Classes that
take turns, and a chance that falls as there are more labels, are those of ClaSP PE (arXiv 2601.13677), which draws
patches by their entropy. The agreement is that of `sslfast.quality`.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sslfast.atomic_io import whole_file
from sslfast.quality import mean_of

TABLE = "rank.csv"
LEAST = 1e-3  # of 1 - agreement, where both networks are the same


class Ranked(NamedTuple):
    """A scan, and the class that took it."""

    case: str
    of: str
    agreement: float  # on this class


def rank_scans(
    rows: Mapping[str, Mapping[str, Any]],
    classes: Sequence[str],
    beta: float,
    seed: int = 0,
    expected: Collection[str] = (),
) -> list[Ranked]:
    """All scans, the one to label first at the beginning.

    Args:
        rows: those of quality.csv, by case.
        classes: names of the classes that take turns; the one with the lowest mean agreement begins.
        beta: 0: a random order; infinity: by agreement alone.
        seed: of the noise.
        expected: classes that every scan has. Where neither network finds such a class, the agreement on it is 0. Where
            they do not find another class, the scan is the last to be taken for it.
    """
    if not rows:
        return []
    cases, noise = sorted(rows), np.random.default_rng(seed).gumbel(size=(len(classes), len(rows)))
    agreement: dict[str, dict[str, float]] = {}
    order: dict[str, list[str]] = {}
    for of, gumbel in zip(sorted(classes), noise, strict=True):
        values = np.array([float(rows[case][f"agreement {of}"]) for case in cases])
        if of in expected:
            values = np.nan_to_num(values, nan=0.0)
        log_u = np.log(np.maximum(1 - values, LEAST))
        z = (log_u - np.nanmean(log_u)) / (np.nanstd(log_u) or 1.0) if not np.isnan(values).all() else log_u
        keys = np.nan_to_num(z if math.isinf(beta) else beta * z + gumbel, nan=-math.inf).tolist()
        agreement[of] = dict(zip(cases, values.tolist(), strict=True))
        order[of] = [case for _, case in sorted(zip(keys, cases, strict=True), reverse=True)]
    turns = itertools.cycle(
        sorted(classes, key=lambda of: (np.nan_to_num(mean_of([*agreement[of].values()]), nan=2), of))
    )
    ranked: dict[str, Ranked] = {}
    while len(ranked) < len(rows):
        of = next(turns)
        case = next(case for case in order[of] if case not in ranked)
        ranked[case] = Ranked(case, of, agreement[of][case])
    return [*ranked.values()]


def write_ranking(ranked: Sequence[Ranked], images: Mapping[str, Sequence[Path]], folder: Path) -> Path:
    """Writes rank.csv, a row a scan; returns its path."""
    path = folder / TABLE
    with whole_file(path) as part, open(part, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["rank", "case", "class", "agreement", "image"])
        for number, (case, of, agreement) in enumerate(ranked, 1):
            writer.writerow([number, case, of, "" if math.isnan(agreement) else f"{agreement:.4f}", images[case][0]])
    return path
