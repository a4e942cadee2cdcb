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
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sslfast.atomic_io import whole_file
from sslfast.errors import UserError

TABLE = "rank.csv"
COLUMNS = ("rank", "case", "class", "agreement", "image")
LEAST = 1e-3  # of 1 - agreement, where both networks are the same


class Ranked(NamedTuple):
    """A scan, and the class that took it."""

    case: str
    class_name: str
    agreement: float  # on this class; nan where neither network finds it


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
        expected: classes that every scan has. A scan on which neither network finds such a class has an agreement of 0,
            and one on which they do not find another class, the highest that there is.
    """
    if not rows:
        return []
    cases, noise = sorted(rows), np.random.default_rng(seed).gumbel(size=(len(classes), len(rows)))
    agreements: dict[str, np.ndarray] = {}
    queues: dict[str, Iterator[str]] = {}
    for name, gumbel in zip(sorted(classes), noise, strict=True):
        found = np.array([float(rows[case][f"agreement {name}"]) for case in cases])
        highest = 1.0 if np.isnan(found).all() else np.nanmax(found)
        agreements[name] = np.where(np.isnan(found), 0.0 if name in expected else highest, found)
        log_u = np.log(np.maximum(1 - agreements[name], LEAST))
        z = (log_u - log_u.mean()) / (log_u.std() or 1.0)
        keys = zip((z if math.isinf(beta) else beta * z + gumbel).tolist(), gumbel.tolist(), cases, strict=True)
        queues[name] = iter([case for *_, case in sorted(keys, reverse=True)])
    turns = itertools.cycle(sorted(classes, key=lambda name: (agreements[name].mean(), name)))
    ranked: dict[str, Ranked] = {}
    while len(ranked) < len(rows):
        name = next(turns)
        case = next(case for case in queues[name] if case not in ranked)
        ranked[case] = Ranked(case, name, float(rows[case][f"agreement {name}"]))
    return [*ranked.values()]


def check_table(folder: Path) -> None:
    """Raises UserError if a folder has a rank.csv that is not of this command."""
    path = folder / TABLE
    if path.exists() and not path.read_text(errors="replace").startswith(",".join(COLUMNS)):
        raise UserError(f"{path} is not of this command, and would be replaced; choose another folder")


def write_ranking(ranked: Sequence[Ranked], images: Mapping[str, Sequence[Path]], folder: Path) -> Path:
    """Writes rank.csv, a row a scan; returns its path."""
    path = folder / TABLE
    with whole_file(path) as part, open(part, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for number, (case, name, agreement) in enumerate(ranked, 1):
            known = "" if math.isnan(agreement) else f"{agreement:.4f}"
            writer.writerow([number, case, name, known, images[case][0]])
    return path
