"""Checks a dataset file by file; lists its contents and every fault."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
from nibabel.orientations import aff2axcodes
from tqdm import tqdm

from sslfast.data.channels import named_channels
from sslfast.data.classes import Classes, check_ignored, choose_classes
from sslfast.data.folder import Case, Dataset
from sslfast.data.nifti import IGNORE, read_channels, read_label
from sslfast.data.volumes import decode
from sslfast.errors import MAX_CLASSES, UserError, too_many_classes
from sslfast.options import LabelOptions, Preprocessing


@dataclass
class Inspection:
    """The result of a check. `lines` is a table with one line per case; `faults` has one sentence per fault."""

    lines: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    axes: Counter[str] = field(default_factory=Counter)
    """Number of volumes with each orientation, such as RAS."""
    classes: Classes | None = None
    """None if the label maps give none."""
    channels: tuple[str, ...] = ()


def inspect(dataset: Dataset, preprocessing: Preprocessing, labels: LabelOptions) -> Inspection:
    """Opens every case and decodes it into the cache. A fault in one case does not stop the others."""
    report = Inspection([f"{'case':<24} {'part':<11} {'shape':<17} {'axes':<4} {'spacing, mm':<17} labels"])
    ignore_label = dataset.ignores(labels.ignore_label)
    values = _values(dataset, ignore_label, report)
    unread = bool(report.faults) and not values
    try:
        if labels.classes or dataset.classes or not unread:
            report.classes = choose_classes(
                labels.classes, dataset.classes, lambda: {0}.union(*values.values()), ignore_label
            )
            check_ignored(report.classes, ignore_label)
            if len(report.classes.names) > MAX_CLASSES:
                report.faults.append(too_many_classes(len(report.classes.names)))
    except UserError as error:
        report.faults.append(str(error))
    known = report.classes or Classes({0: "background", 1: "class 1"})
    report.channels = dataset.channels
    names: dict[int, str] = {}  # case name by hash of the image
    for part in ("training", "validation", "test"):
        cases: tuple[Case, ...] = getattr(dataset, part)
        for case in tqdm(cases, desc=f"check {part}", unit="case", leave=False, disable=not cases):
            shown = "unlabelled" if case.label is None else " ".join(map(str, sorted(values.get(case.name, ()))))
            if case.label and (case.name not in values or not report.classes):
                case = case.unlabelled  # the fault of its label is listed already
            try:
                report.channels = report.channels or named_channels((), case.images)
                decode(
                    case,
                    preprocessing,
                    classes=[*known.names],
                    merged=known.merged,
                    ignore_label=ignore_label,
                    channels=len(report.channels),
                )
                image = read_channels(case.images)
            except UserError as error:
                report.faults.append(str(error))
                continue
            twin = names.setdefault(hash(image.array.tobytes()), case.name)
            if twin != case.name:
                report.faults.append(f"{case.image} is the same volume as case {twin!r}. Remove one of them.")
            shape = "×".join(map(str, image.shape))
            orientation = "".join(aff2axcodes(image.affine))
            report.axes[orientation] += 1
            spacing = " ".join(f"{s:.3g}" for s in image.spacing)
            report.lines.append(f"{case.name:<24} {part:<11} {shape:<17} {orientation:<4} {spacing:<17} {shown}")
    of_training = {case.name: values[case.name] for case in dataset.training if case.name in values}
    if report.classes:
        report.warnings += absent_classes(of_training, report.classes)
    return report


def absent_classes(values: Mapping[str, Collection[int]], classes: Classes) -> list[str]:
    """Warnings of classes that no label map has, and of label maps without foreground.

    Args:
        values: the values of each labelled training case, by its name.
        classes: the classes, and which values count as them.
    """
    warnings = []
    seen = {case: {classes.merged.get(value, value) for value in has} for case, has in values.items()}
    found = {0}.union(*seen.values())
    absent = [name for value, name in classes.names.items() if value not in found]
    if absent and values:
        they = "it" if len(absent) == 1 else "them"
        warnings.append(f"no labelled training case has {', '.join(absent)}; the networks cannot learn {they}")
    empty = [case for case, has in seen.items() if not any(value > 0 for value in has)]
    if empty:
        shown = ", ".join(empty[:5]) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
        warnings.append(f"no voxel of the foreground is labelled in {shown}; is the label map finished?")
    return warnings


def _values(dataset: Dataset, ignore_label: int, report: Inspection) -> dict[str, set[int]]:
    """The values in each label map by case name; those that cannot be read become faults."""
    values = {}
    for case in tqdm((*dataset.training, *dataset.validation, *dataset.test), desc="read labels", leave=False):
        if case.label is None:
            continue
        try:
            values[case.name] = {*np.unique(read_label(case.label, ignore_label=ignore_label).array).tolist()} - {
                IGNORE
            }
        except UserError as error:
            report.faults.append(str(error))
    return values
