"""The stress set: cohorts whose unlabelled volumes cannot help, or can do harm.

Seven deep structures of six people, left and right told apart: 14 classes, some of a few voxels at 4 mm. Images are
synthesised, as in `demo-brain`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sslfast.atomic_io import make_folder, whole_file
from sslfast.data.demo.brain_atlas import TISSUES, WHITE_MATTER, BrainAtlas, Tissue
from sslfast.data.demo.cohorts import BRAIN, as_json, write_subject
from sslfast.data.demo.download import BRAIN_ATLASES, fetch
from sslfast.data.demo.subject import DemoParameters, make_subject
from sslfast.data.nifti import read_label

STRUCTURES = ("thalamus", "caudate", "putamen", "pallidum", "accumbens", "hippocampus", "amygdala")
LEFT, RIGHT = 35, 76  # the region of each side's thalamus; the others follow
CLASSES = ("background", *(f"{side} {name}" for side in ("left", "right") for name in STRUCTURES))
UNLABELLED = {
    "alike": "as the labelled ones",
    "absent": "without the structures, white matter in their place",
    "contrast": "of another contrast: dark is bright",
    "noise": "every other one is noise",
}
LABELLED, TRAINING, VALIDATION, TEST = 4, 24, 8, 24  # cases; the first LABELLED training cases are never changed


def bilateral(tissues: Sequence[Tissue]) -> tuple[Tissue, ...]:
    """The tissues with a class for each structure of each side."""
    kept = [tissue for tissue in tissues if not tissue.label]
    values = [(tissue.value, region) for tissue in tissues if tissue.label for region in tissue.regions]
    sides = ((LEFT, 1), (RIGHT, 1 + len(STRUCTURES)))
    return (*kept, *(Tissue(v, (r,), r - first + c) for v, r in values for first, c in sides if 0 <= r - first < 7))


def without_structures(tissues: Sequence[Tissue]) -> tuple[Tissue, ...]:
    """The tissues with white matter in place of the structures."""
    gone = [region for tissue in tissues if tissue.label for region in tissue.regions]
    kept = (tissue for tissue in tissues if not tissue.label)
    return tuple(t._replace(regions=(*t.regions, *gone)) if WHITE_MATTER in t.regions else t for t in kept)


def describe(kind: str, parameters: DemoParameters = BRAIN) -> dict[str, Any]:
    """The dataset.json of the stress set of a kind."""
    names = [f"stress_{i:03d}" for i in range(TRAINING + VALIDATION + TEST)]
    parts = {"training": TRAINING, "validation": VALIDATION, "test": TEST}
    ends = np.cumsum([*parts.values()])
    return {
        "labels": {str(c): name for c, name in enumerate(CLASSES)},
        **{part: names[end - size : end] for (part, size), end in zip(parts.items(), ends, strict=True)},
        "generator": {"unlabelled": UNLABELLED[kind], "labelled": LABELLED, **as_json(parameters)},
    }


def write_stress_set(kind: str, folder: Path, parameters: DemoParameters = BRAIN) -> Path:
    """Writes a cohort with unlabelled volumes of a kind of `UNLABELLED`, unless `folder` has it; returns `folder`."""
    description = describe(kind, parameters)
    written = make_folder(folder) / "dataset.json"
    if written.exists() and json.loads(written.read_text()) == description:
        return folder
    written.unlink(missing_ok=True)
    atlases = [read_label(path) for path in fetch(BRAIN_ATLASES)]
    people = [BrainAtlas(atlas, bilateral(TISSUES)) for atlas in atlases]
    names = [name for part in ("training", "validation", "test") for name in description[part]]
    for i, name in enumerate(tqdm(names, desc=f"write the stress set, {kind}", unit="subject", leave=False)):
        changed = kind if LABELLED <= i < TRAINING else ""
        p = replace(parameters, contrast=(-0.9, 0.3)) if changed == "contrast" else parameters
        person = copy(people[i % len(people)])
        if changed == "absent":
            person.tissues = without_structures(TISSUES)
        image, label, affine = make_subject(person, i, p)
        if changed == "absent":
            label[:] = 0
        if changed == "noise" and i % 2:
            image = np.random.default_rng(i).normal(500, 200, image.shape).astype(np.int16)
        write_subject(folder, name, image, label, affine)
    with whole_file(written) as part:
        part.write_text(json.dumps(description, indent=1))
    return folder
