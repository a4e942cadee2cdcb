"""Checks a dataset file by file; lists its contents and every fault."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from nibabel.orientations import aff2axcodes
from tqdm import tqdm

from sslfast.data.folder import Case, Dataset
from sslfast.data.nifti import read_image, read_label
from sslfast.data.volumes import decode
from sslfast.errors import UserError
from sslfast.options import Preprocessing

MAX_CLASSES = 32  # if the dataset does not name its classes


@dataclass
class Inspection:
    """The result of a check. `lines` is a table with one line per case; `faults` has one sentence per fault."""

    lines: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    axes: Counter[str] = field(default_factory=Counter)
    """Number of volumes with each orientation, such as RAS."""


def inspect(dataset: Dataset, preprocessing: Preprocessing, ignore_label: int) -> Inspection:
    """Opens every case and decodes it into the cache. A fault in one case does not stop the others."""
    report = Inspection([f"{'case':<24} {'part':<11} {'shape':<17} {'axes':<4} {'spacing, mm':<17} labels"])
    num_classes = len(dataset.classes) if dataset.classes else MAX_CLASSES
    names: dict[int, str] = {}  # case name by hash of the image
    for part in ("training", "validation", "test"):
        cases: tuple[Case, ...] = getattr(dataset, part)
        for case in tqdm(cases, desc=f"check {part}", unit="case", leave=False, disable=not cases):
            try:
                decode(case, preprocessing, num_classes=num_classes, ignore_label=ignore_label)
                image = read_image(case.image)
                labels = "unlabelled"
                if case.label:
                    label = read_label(case.label, num_classes=num_classes, ignore_label=ignore_label)
                    labels = " ".join(map(str, np.unique(label.array)))
            except UserError as error:
                report.faults.append(str(error))
                continue
            twin = names.setdefault(hash(image.array.tobytes()), case.name)
            if twin != case.name:
                report.faults.append(f"{case.image} is the same volume as case {twin!r}. Remove one of them.")
            shape = "×".join(map(str, image.array.shape))
            orientation = "".join(aff2axcodes(image.affine))
            report.axes[orientation] += 1
            spacing = " ".join(f"{s:.3g}" for s in image.spacing)
            report.lines.append(f"{case.name:<24} {part:<11} {shape:<17} {orientation:<4} {spacing:<17} {labels}")
    return report
