"""The demo cohorts: subjects made from real anatomy, for trying the whole program without data.

`demo`: 96 subjects from one heart CT. The texture is real, the variation is synthetic, and all anatomy is one person's.
The label is a model's output. A result shows that a method trains and what it gains over its baseline; it shows nothing
about patients.

`demo-brain`: 96 subjects from the deep grey nuclei of six people. All test cases are made from one of them, who is in
no other case. The anatomy and its variation between people are real; the images are synthesised from the labels. A
result ranks methods on an unseen person.

`demo-tuning`, `demo-brain-tuning`: the same training and validation subjects, and 48 other test cases, made from people
who are in the training set. Choose settings with these, so that the test cases of the cohorts above choose none.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from tqdm import tqdm

from sslfast.atomic_io import cache_folder, make_folder, whole_file
from sslfast.data.demo.brain_atlas import CLASSES, BrainAtlas
from sslfast.data.demo.download import BRAIN_ATLASES, HEART_CT, Package, fetch
from sslfast.data.demo.subject import DemoParameters, SourceAnatomy, make_subject
from sslfast.data.nifti import read_image, read_label
from sslfast.errors import UserError

BRAIN = DemoParameters(
    size=(76, 84, 68),
    rotation=8.0,
    log_scale=0.06,
    shear=0.04,
    shift=6.0,
    warp=((5, 5.0), (10, 2.0)),
    knots=(0.0, 200.0, 400.0, 500.0, 600.0, 700.0, 800.0, 1000.0),
    contrast=(0.9, 0.3),
    bias=0.2,
    noise=(15.0, 60.0),
    clipped=0.0,
)


@dataclass(frozen=True)
class Cohort:
    """How a demo cohort is made."""

    subject: str  # prefix of the case names
    description: str
    package: Package
    classes: tuple[str, ...]
    parameters: DemoParameters
    sources: Callable[[list[Path]], list[SourceAnatomy]]  # reads the anatomy from the files of the package
    unseen: int  # number of sources, the last ones, that are in no training case
    tests_unseen: bool  # True: the test cases are made from these


def heart(paths: list[Path]) -> list[SourceAnatomy]:
    """One source: a chest CT and its heart label."""
    scan, label = read_image(paths[0]), read_label(paths[1])
    return [SourceAnatomy(scan.array, (label.array > 0).astype(np.uint8), scan.affine)]


def brain_atlases(paths: list[Path]) -> list[SourceAnatomy]:
    """Six sources: the brain regions of one person each."""
    return [BrainAtlas(read_label(path)) for path in paths]


COHORTS = {
    "demo": Cohort(
        "heart",
        "Synthetic cohort made from one chest CT angiogram; labels are a model's output ('silver').",
        HEART_CT,
        ("background", "heart"),
        DemoParameters(),
        heart,
        unseen=0,
        tests_unseen=False,
    ),
    "demo-brain": Cohort(
        "brain",
        "Synthetic images of the anatomy of six people, one of whom is in no training case.",
        BRAIN_ATLASES,
        CLASSES,
        BRAIN,
        brain_atlases,
        unseen=1,
        tests_unseen=True,
    ),
}
COHORTS |= {
    f"{name}-tuning": replace(cohort, parameters=replace(cohort.parameters, first_test=96), tests_unseen=False)
    for name, cohort in COHORTS.items()
}


def data_folder(data: str) -> Path:
    """The folder named by `--data`, or that of a demo cohort, which is written into the cache at the first call.

    Raises:
        UserError: the folder does not exist, or as in `fetch`.
    """
    if data not in COHORTS:
        if not Path(data).is_dir():
            raise UserError(f"--data {data} is not a folder; give a dataset folder, or one of {', '.join(COHORTS)}")
        return Path(data)
    cohort, folder = COHORTS[data], cache_folder() / data
    if not _is_complete(folder, cohort.parameters):
        write_cohort(cohort, folder)
    return folder


def write_cohort(cohort: Cohort, folder: Path) -> None:
    """Writes images/ and labels/, then dataset.json: a folder that has this file is complete."""
    p = cohort.parameters
    make_folder(folder)
    (folder / "dataset.json").unlink(missing_ok=True)
    subjects = [*range(p.training + p.validation), *range(p.first_test, p.first_test + p.test)]
    names = [f"{cohort.subject}_{i:03d}" for i in subjects]
    sources = cohort.sources(fetch(cohort.package))
    known, unseen = sources[: len(sources) - cohort.unseen], sources[-cohort.unseen :]
    progress = tqdm(names, desc=f"write the {cohort.subject} cohort", unit="subject", leave=False)
    for i, name in zip(subjects, progress, strict=True):
        people = unseen if cohort.tests_unseen and i >= p.first_test else known
        write_subject(folder, name, *make_subject(people[i % len(people)], i, p))
    description = {
        "name": f"{cohort.subject} demo",
        "description": cohort.description,
        "labels": {str(i): name for i, name in enumerate(cohort.classes)},
        "training": names[: p.training],
        "validation": names[p.training : p.training + p.validation],
        "test": names[p.training + p.validation :],
        "source": {"package": cohort.package.name, "sha256": cohort.package.sha256, "licence": cohort.package.licence},
        "generator": as_json(p),
    }
    with whole_file(folder / "dataset.json") as part:
        part.write_text(json.dumps(description, indent=1))


def write_subject(folder: Path, name: str, image: np.ndarray, label: np.ndarray, affine: np.ndarray) -> None:
    """Writes images/`name`.nii.gz and labels/`name`.nii.gz."""
    for kind, array in (("images", image), ("labels", label)):
        with whole_file(folder / kind / f"{name}.nii.gz") as part:
            file = nib.Nifti1Image(array, affine)
            file.header.set_xyzt_units("mm")
            nib.save(file, part)


def as_json(parameters: DemoParameters) -> dict[str, Any]:
    """The parameters as JSON stores them."""
    return json.loads(json.dumps(asdict(parameters)))


def _is_complete(folder: Path, parameters: DemoParameters) -> bool:
    try:
        return json.loads((folder / "dataset.json").read_text())["generator"] == as_json(parameters)
    except (OSError, ValueError, KeyError):
        return False
