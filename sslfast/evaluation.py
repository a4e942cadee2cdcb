"""Compares a folder of segmentations with reference label maps; the result is a table, CSV and JSON."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from sslfast import metrics
from sslfast.atomic_io import make_folder, remove_parts, whole_file
from sslfast.data.classes import Classes, choose_classes, described_classes, find_values
from sslfast.data.files import volume_files
from sslfast.data.folder import read_description
from sslfast.data.nifti import IGNORE, on_grid_of, read_label
from sslfast.errors import UserError


@dataclass(frozen=True)
class Evaluation:
    """The metrics of a set of cases."""

    rows: list[dict[str, Any]]
    """One per case and class: case, spacing, and the row of `sslfast.metrics.case_metrics`."""
    classes: dict[int, str]
    failed: dict[str, str] = field(default_factory=dict)
    """Why a case could not be evaluated, by case."""
    missing: tuple[str, ...] = ()
    """Cases that were left out, for they have no segmentation."""

    def raise_failed(self) -> None:
        """Raises a UserError that lists the failed cases, if there are any."""
        if self.failed:
            count = len(self.failed) + len({row["case"] for row in self.rows})
            raise UserError(_list_of(self.failed, count))

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
            f"{'class':<16} {'cases':>5} {'missed':>6} {'Dice':>13} {'Jaccard':>13} {'NSD':>6} "
            f"{'hd95 vox':>9} {'hd95 mm':>9} {'asd vox':>9} {'asd mm':>9}"
        )
        lines = [head]
        for c, s in self.summary.items():
            overlap = "".join(f" {_show(s[name]):>6}±{_show(s[f'{name}_std']):<6}" for name in ("dice", "jaccard"))
            names = ("hd95_pooled_vox", "hd95_pooled_mm", "asd_pred2gt_vox", "asd_pred2gt_mm")
            distances = "".join(f" {_show(s[f'{name}_found'], 2):>9}" for name in names)
            nsd = f" {_show(s['nsd']):>6}"
            lines.append(f"{self.classes[c]:<16} {s['cases']:>5} {s['n_missed']:>6}{overlap}{nsd}{distances}")
            if s["n_missed"] or s["n_spurious"]:
                penalised = "".join(f" {_show(s[f'{name}_penalised'], 2):>9}" for name in names)
                lines.append(f"{'  missed or spurious counted as the volume’s diagonal':<64}{penalised}")
        scores = sorted(self.case_dice().items(), key=lambda item: item[1])
        lines.append("Dice by case: " + ", ".join(f"{case} {value:.3f}" for case, value in scores))
        return "\n".join(lines)

    def write(self, folder: Path) -> None:
        """Writes metrics.csv (the rows) and metrics.json (definitions, summary, rows; inf as "inf", nan as null; cases
        that failed or are missing)."""
        make_folder(folder)
        remove_parts(folder, shared=True)
        with (
            whole_file(folder / "metrics.csv") as part,
            open(part, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
        ):
            writer = csv.DictWriter(file, list(self.rows[0]) if self.rows else [])
            writer.writeheader()
            writer.writerows(self.rows)
        content = {
            "definitions": (metrics.__doc__ or "").strip(),
            "classes": self.classes,
            "mean_dice": self.mean_dice,
            "summary": self.summary,
            "rows": self.rows,
            "failed": self.failed,
            "missing": list(self.missing),
        }
        with whole_file(folder / "metrics.json") as part:
            part.write_text(json.dumps(_json(content), indent=1, allow_nan=False))


class Pair(NamedTuple):
    """A case to evaluate."""

    case: str
    prediction: Path
    reference: Path
    classes: Classes | None  # None: the values in the two files
    ignore_label: int
    merge_both: bool
    tolerance: float


def evaluate_folder(
    predictions: Path,
    labels: Mapping[str, Path],
    *,
    classes: Classes | dict[int, str] | None = None,
    ignore_label: int = -1,
    merge_both: bool = False,
    partial: bool = False,
    jobs: int = 1,
    tolerance: float = metrics.TOLERANCE,
) -> Evaluation:
    """Compares `predictions`/<case>.nii.gz with the reference of each case. A process holds one case at a time.

    Args:
        predictions: folder of label maps.
        labels: reference label map of each case.
        classes: class names by value, maybe with further values in the references; None: the values in the files.
        ignore_label: value in the references for voxels that are not annotated.
        merge_both: these further values may be in the predictions too.
        partial: leave out references without a segmentation.
        jobs: cases evaluated at the same time, each in a process of its own; 1: in this process.
        tolerance: of the surface Dice (`nsd`), mm.

    Returns:
        The metrics. Cases whose files cannot be read or do not match are in `failed`; the others are still evaluated.

    Raises:
        UserError: there is no reference, a reference has no segmentation, or no case could be evaluated.
    """
    if not labels:
        raise UserError("there is no reference label map to compare with")
    files = volume_files(predictions)
    missing = tuple(sorted(labels.keys() - files.keys()))
    if len(missing) == len(labels) or (missing and not partial):
        remedy = "Add --partial to leave them out" if len(missing) < len(labels) else "Are these the right folders?"
        names = ", ".join(missing)
        raise UserError(f"{predictions} has no segmentation of {names}; every reference needs one. {remedy}")
    known = Classes(classes) if isinstance(classes, dict) else classes
    pairs = [
        Pair(case, files[case], path, known, ignore_label, merge_both, tolerance)
        for case, path in labels.items()
        if case in files
    ]
    done = map(_evaluate, pairs) if jobs == 1 else _in_processes(pairs, jobs)
    results = dict(tqdm(done, desc="evaluate", unit="case", total=len(pairs), leave=False))
    failed = {case: result for case in labels if isinstance(result := results.get(case), str)}
    by_case = [result for case in labels if isinstance(result := results.get(case), list)]
    if not by_case:
        raise UserError(_list_of(failed, len(pairs)))
    if known is None:
        found = sorted({row["class"] for rows in by_case for row in rows})
        known = Classes({0: "background", **{c: f"class {c}" for c in found}})
    rows = []
    for of_case in by_case:
        by_class = {row["class"]: row for row in of_case}
        rows += [by_class.get(c) or metrics.absent_row(of_case[0], c) for c in [*known.names][1:]]
    return Evaluation(rows, known.names, failed, missing)


def named_classes(
    folder: Path, labels: Mapping[str, Path], entries: Sequence[str], ignore_label: int
) -> tuple[Classes | None, int]:
    """The classes by `--classes` and the dataset.json in the folder of the label maps or beside it, None if neither
    names any; and the value of voxels that are not annotated, or -1.

    Args:
        folder: that of the reference label maps.
        labels: the reference label map of each case.
        entries: words of `--classes`.
        ignore_label: -1 leaves it to dataset.json.

    Raises:
        UserError: see `choose_classes` and `described_classes`.
    """
    described = None
    for beside in (folder, folder.absolute().parent):
        described, ignored = described_classes(beside / "dataset.json", read_description(beside / "dataset.json"))
        if described:
            ignore_label = ignored if ignore_label == IGNORE else ignore_label
            break

    def found() -> set[int]:
        values = {0}
        for path in labels.values():
            with suppress(UserError):  # which its case will say
                values |= find_values([path], ignore_label)
        return values

    return choose_classes(entries, described, found, ignore_label) if entries else described, ignore_label


def _evaluate(pair: Pair) -> tuple[str, list[dict[str, Any]] | str]:
    """The case and its rows, or why there are none."""
    try:
        return pair.case, _rows(pair)
    except Exception as error:  # whatever it is, the other cases do not depend on it
        kind = "" if isinstance(error, UserError) else f"{pair.prediction}, {pair.reference}: {type(error).__name__}: "
        return pair.case, f"{kind}{error}"


def _rows(pair: Pair) -> list[dict[str, Any]]:
    classes = tuple(pair.classes.names) if pair.classes else None
    merged = pair.classes.merged if pair.classes else None
    reference = read_label(pair.reference, classes=classes, merged=merged, ignore_label=pair.ignore_label)
    prediction = read_label(pair.prediction, classes=classes, merged=merged if pair.merge_both else None)
    try:
        prediction = on_grid_of(reference, prediction, pair.reference, pair.prediction)
    except UserError as error:
        raise UserError(
            f"the segmentation {pair.prediction} is not on the grid of its reference {pair.reference}: {error}"
        ) from error
    predicted, known = prediction.array, reference.array
    if classes is None:
        classes = tuple(sorted({0, 1, *np.unique(predicted).tolist(), *np.unique(known).tolist()} - {IGNORE}))
        predicted, known = (
            np.where(array == IGNORE, IGNORE, np.searchsorted(classes, array)) for array in (predicted, known)
        )
    spacing = reference.spacing
    first = {"case": pair.case, "spacing_mm": " ".join(f"{s:g}" for s in spacing)}
    rows = metrics.case_metrics(predicted, known, len(classes), spacing, tolerance=pair.tolerance)
    return [{**first, **row, "class": classes[row["class"]]} for row in rows]


def _in_processes(pairs: list[Pair], jobs: int) -> Iterator[tuple[str, list[dict[str, Any]] | str]]:
    """`_evaluate` of each pair, as they are done. If a process dies, those that it stopped are tried one by one."""
    pool = ProcessPoolExecutor(min(jobs, len(pairs)), get_context("spawn"), _leave_the_end_to_the_parent)
    left = {pair.case: pair for pair in pairs}
    try:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # also for workers that begin
        try:
            futures = [pool.submit(_evaluate, pair) for pair in pairs]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for future in as_completed(futures):
            case, result = future.result()
            del left[case]
            yield case, result
    except BrokenProcessPool:
        pass
    finally:
        pool.shutdown(cancel_futures=True)
    for pair in left.values():
        if len(pairs) > 1:
            yield from _in_processes([pair], 1)
        else:
            reason = "the process that evaluated it died, often for want of memory; try fewer --jobs"
            yield pair.case, f"{pair.reference}: {reason}"


def _leave_the_end_to_the_parent() -> None:
    """In a worker: Ctrl-C does nothing, and the end of the parent, however it came, ends the worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow() -> None:
        if parent := parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _list_of(failed: Mapping[str, str], count: int) -> str:
    reasons = "\n".join(f"- {reason}" for reason in failed.values())
    return f"{len(failed)} of {count} cases could not be evaluated:\n{reasons}"


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
