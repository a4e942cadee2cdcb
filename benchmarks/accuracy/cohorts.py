"""The cohorts of the study: where their volumes are, how networks are trained on them, and with how many labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from benchmarks.accuracy.stress import UNLABELLED, write_stress_set
from sslfast.atomic_io import cache_folder, make_folder, whole_file
from sslfast.errors import UserError

COMMON: dict[str, object] = {
    "steps": 1500,
    "width": 8,
    "depth": 4,
    "norm": "instance",
    "dropout": 0.1,
    "augment": "no-flip",
    "learning_rate": 0.003,
    "validate_every": 500,
    "save_every": 100,
}


class StudyCohort(NamedTuple):
    """One cohort of the study."""

    data: str  # a folder of --real, a demo cohort, or stress-KIND
    labeled: tuple[int, ...]
    training: int  # training cases; with all of their labels, `supervised` is the ceiling
    settings: dict[str, object]  # of `sslfast train`, besides COMMON


REAL = {
    "hippocampus": StudyCohort("hippocampus", (2, 8), 120, {"patch": [32, 40, 32]}),
    "la": StudyCohort("la_1.25mm", (2, 4, 8), 60, {"patch": [40, 40, 32], "spacing": 2}),
}
SYNTHETIC = {
    "demo-brain": StudyCohort("demo-brain", (4,), 40, {"patch": [24, 24, 24], "spacing": 4}),
    "demo": StudyCohort("demo", (4,), 40, {"patch": [24, 24, 24], "spacing": 6}),
}
_SMALL: dict[str, object] = {"patch": [24, 24, 24], "spacing": 4, "steps": 600}
STRESS = {
    **{f"stress-{kind}": StudyCohort(f"stress-{kind}", (4,), 24, _SMALL) for kind in UNLABELLED},
    "stress-one-label": StudyCohort("stress-alike", (1,), 24, _SMALL),
    "stress-few-steps": StudyCohort("stress-alike", (4,), 24, {**_SMALL, "steps": 300}),
    "stress-batch-norm": StudyCohort("stress-noise", (4,), 24, {**_SMALL, "norm": "batch"}),
}
COHORTS = {**REAL, **SYNTHETIC, **STRESS}
HELD_OUT = 14  # training cases that join the validation cases where settings are compared


def locate(data: str, real: Path | None) -> str:
    """The `--data` of a cohort, by its `StudyCohort.data`, with the suffix -tuning for that of an ablation.

    Raises:
        UserError: a real cohort, and there is no folder of it.
    """
    if data.startswith("stress-"):
        return str(write_stress_set(data.removeprefix("stress-"), cache_folder() / data))
    name = data.removesuffix("-tuning")
    if name not in {cohort.data for cohort in REAL.values()}:
        return data
    if real is None or not (real / name).is_dir():
        where = f"{real} has no folder {name}" if real else f"{name} is not made here"
        raise UserError(f"{where}; give --real DIR, the folder that holds it (docs/datasets.md), or other --cohorts")
    root = (real / name).resolve()
    return str(root if name == data else _tuning_folder(root, cache_folder() / data))


def _tuning_folder(root: Path, folder: Path) -> Path:
    """The cohort without its test cases, in their place most validation cases and the last training cases."""
    description = json.loads((root / "dataset.json").read_text())
    training, validation = description["training"], description["validation"]
    description |= {"training": training[:-HELD_OUT], "validation": validation[:2]}
    description |= {"test": [*validation[2:], *training[-HELD_OUT:]]}
    return linked_folder(root, folder, description)


def linked_folder(root: Path, folder: Path, description: dict[str, object]) -> Path:
    """The volumes of a cohort with another dataset.json, in `folder`."""
    make_folder(folder)
    for kind in ("images", "labels"):
        (folder / kind).unlink(missing_ok=True)
        (folder / kind).symlink_to(root / kind)
    with whole_file(folder / "dataset.json") as part:
        part.write_text(json.dumps(description))
    return folder
