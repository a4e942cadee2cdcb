"""A dataset file by file: what it holds and everything that is wrong with it."""

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

MAX_CLASSES = 32  # where the dataset does not name its classes


@dataclass
class Inspection:
    """What was found. `lines` is a table, a case a line; `faults` has a sentence for each fault."""

    lines: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    axes: Counter[str] = field(default_factory=Counter)
    """How many scans have which orientation, such as RAS."""


def inspect(dataset: Dataset, preprocessing: Preprocessing, ignore_label: int) -> Inspection:
    """Opens and decodes every case, so that training finds it in the cache; a fault of one case does not stop the others."""
    found = Inspection([f"{'case':<24} {'part':<11} {'shape':<17} {'axes':<4} {'spacing, mm':<17} labels"])
    num_classes = len(dataset.classes) if dataset.classes else MAX_CLASSES
    names: dict[int, str] = {}  # by a scan's content
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
                found.faults.append(str(error))
                continue
            twin = names.setdefault(hash(image.array.tobytes()), case.name)
            if twin != case.name:
                found.faults.append(
                    f"{case.image} is the same scan as case {twin!r}. Remove one, or it is in two parts of the split."
                )
            shape = "×".join(map(str, image.array.shape))
            orientation = "".join(aff2axcodes(image.affine))
            found.axes[orientation] += 1
            spacing = " ".join(f"{s:.3g}" for s in image.spacing)
            found.lines.append(f"{case.name:<24} {part:<11} {shape:<17} {orientation:<4} {spacing:<17} {labels}")
    return found
