"""What a user's folder holds: which cases there are, which have labels, and how they are split."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sslfast.data.nifti import case_name, nifti_files
from sslfast.errors import UserError

LAYOUTS = """A dataset is one of
  DIR/images/*.nii.gz and DIR/labels/*.nii.gz, a label named as its image; an image without a label is unlabelled.
      DIR/dataset.json is optional: {"labels": {"0": "background", "1": "heart"}, "validation": [names], "test": [names]}
  a Medical Segmentation Decathlon task: DIR/dataset.json with "training": [{"image": ..., "label": ...}]"""


@dataclass(frozen=True)
class Case:
    """One subject: a scan and, if somebody drew it, its label map."""

    name: str
    image: Path
    label: Path | None = None

    @property
    def unlabelled(self) -> Case:
        """The same case with no way to its label."""
        return replace(self, label=None)


@dataclass(frozen=True)
class Dataset:
    """The cases of a folder. `classes` is None where no dataset.json names them."""

    root: Path
    classes: dict[int, str] | None
    training: tuple[Case, ...]
    validation: tuple[Case, ...] = ()
    test: tuple[Case, ...] = ()


@dataclass(frozen=True)
class TrainingSplit:
    """Who teaches and who checks. The unlabelled cases carry no path to a label."""

    labelled: tuple[Case, ...]
    unlabelled: tuple[Case, ...]
    validation: tuple[Case, ...]


def open_dataset(root: Path) -> Dataset:
    """Lists a dataset folder; no image or label is opened.

    Raises:
        UserError: no such folder, a layout that is none of LAYOUTS, an empty list, a missing file, a name twice.
    """
    if not root.is_dir():
        raise UserError(f"--data {root} is not a folder. {LAYOUTS}")
    description = _read_description(root / "dataset.json")
    if (root / "images").is_dir():
        dataset = _plain_folders(root, description)
    elif isinstance(description.get("training"), list):
        dataset = _decathlon(root, description)
    else:
        raise UserError(f"{root} has no folder images/ and no dataset.json with a training list. {LAYOUTS}")
    if not dataset.training:
        raise UserError(f"{root} holds no training case: the list is empty. {LAYOUTS}")
    return dataset


def split_training(dataset: Dataset, labelled: int | None, validation: int = 0) -> TrainingSplit:
    """Takes the first `labelled` labelled cases (default: all) as labelled, every other training case as unlabelled.

    Where the dataset names no validation cases, the last `validation` labelled cases are kept apart for it.

    Raises:
        UserError: no labelled case, or fewer than asked for.
    """
    training = dataset.training
    with_label = [case for case in training if case.label]
    if not with_label:
        raise UserError(f"{dataset.root}: no training case has a label; at least one is needed. {LAYOUTS}")
    kept = dataset.validation
    if not kept and validation:
        kept = tuple(with_label[-validation:]) if len(with_label) > validation else ()
        if not kept:
            raise UserError(
                f"--validation {validation} leaves none of the {len(with_label)} labelled cases for training"
            )
        with_label = with_label[:-validation]
    count = len(with_label) if labelled is None else labelled
    if not 1 <= count <= len(with_label):
        raise UserError(
            f"--labeled {count}: {dataset.root} has {len(with_label)} labelled cases for training; choose 1 to {len(with_label)}"
        )
    chosen = tuple(with_label[:count])
    apart = {case.name for case in (*chosen, *kept)}
    return TrainingSplit(chosen, tuple(case.unlabelled for case in training if case.name not in apart), kept)


def _plain_folders(root: Path, description: Mapping[str, Any]) -> Dataset:
    images = nifti_files(root / "images")
    labels = nifti_files(root / "labels") if (root / "labels").is_dir() else {}
    strangers = sorted(labels.keys() - images.keys())
    if strangers:
        raise UserError(
            f"{labels[strangers[0]]} has no image of that name in {root / 'images'} ({len(strangers)} such labels)"
        )
    cases = {name: Case(name, path, labels.get(name)) for name, path in images.items()}
    parts: dict[str, tuple[Case, ...]] = {}
    taken: dict[str, str] = {}
    for part in ("validation", "test", "training"):
        names = description.get(part, [n for n in cases if n not in taken] if part == "training" else [])
        for name in _names(root, part, names):
            if name not in cases:
                raise UserError(f"{root / 'dataset.json'}: the {part} case {name!r} has no image in {root / 'images'}")
            if name in taken:
                raise UserError(f"{root / 'dataset.json'}: case {name!r} is listed under {taken[name]} and {part}")
            taken[name] = part
        parts[part] = tuple(cases[name] for name in names)
    for part in ("validation", "test"):
        for case in parts[part]:
            if case.label is None:
                raise UserError(
                    f"{root / 'dataset.json'}: the {part} case {case.name!r} has no label in {root / 'labels'}"
                )
    return Dataset(root, _classes(root, description), parts["training"], parts["validation"], parts["test"])


def _decathlon(root: Path, description: Mapping[str, Any]) -> Dataset:
    cases: dict[str, Case] = {}
    entries = [(e, "training") for e in description["training"]] + [(e, "test") for e in description.get("test", [])]
    for entry, part in entries:
        if isinstance(entry, str):
            entry = {"image": entry}
        if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
            raise UserError(
                f'{root / "dataset.json"}: a {part} entry must be {{"image": path, "label": path}}, this one is {entry!r}'
            )
        image = _inside(root, entry["image"])
        label = _inside(root, entry["label"]) if part == "training" and entry.get("label") else None
        name = case_name(image)
        if name in cases:
            raise UserError(f"{root / 'dataset.json'}: case {name!r} is listed twice")
        cases[name] = Case(name, image, label)
    return Dataset(root, _classes(root, description), tuple(cases.values()))


def _read_description(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        description = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(description, dict):
        raise UserError(f"{path} must hold a JSON object, it holds a {type(description).__name__}")
    return description


def _names(root: Path, part: str, names: Any) -> Sequence[str]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{root / 'dataset.json'}: {part!r} must be a list of case names")
    return names


def _inside(root: Path, name: str) -> Path:
    path = root / name
    if not path.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{root / 'dataset.json'}: {name!r} lies outside the dataset's folder; copy the file into it")
    if not path.is_file():
        raise UserError(f"{root / 'dataset.json'} lists {name!r}, which does not exist")
    return path


def _classes(root: Path, description: Mapping[str, Any]) -> dict[int, str] | None:
    """Class names by number, from {"1": "heart"} (Decathlon) or {"heart": 1} (nnU-Net)."""
    labels = description.get("labels")
    if labels is None:
        return None
    try:
        pairs = [
            (int(k), str(v)) if str(k).lstrip("-").isdigit() else (int(v), str(k)) for k, v in dict(labels).items()
        ]
    except (TypeError, ValueError) as error:
        raise UserError(f'{root / "dataset.json"}: "labels" must map numbers to names, it is {labels!r}') from error
    classes = {number: name for number, name in sorted(pairs) if number >= 0}
    if sorted(classes) != list(range(len(classes))) or len(classes) < 2:
        raise UserError(
            f'{root / "dataset.json"}: "labels" must number the classes 0, 1, … without a gap, it is {labels!r}'
        )
    return classes
