"""A dataset folder: its cases, their labels, and the split into training, validation and test cases."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sslfast.data.nifti import case_name, nifti_files
from sslfast.errors import UserError

LAYOUTS = """A dataset folder has one of these layouts:
  DIR/images/*.nii.gz and DIR/labels/*.nii.gz, with the same file names; an image without a label is unlabelled.
      DIR/dataset.json is optional:
      {"labels": {"0": "background", "1": "heart"}, "validation": [names], "test": [names]}
  A Medical Segmentation Decathlon task: DIR/dataset.json with "training": [{"image": ..., "label": ...}]"""


@dataclass(frozen=True)
class Case:
    """One subject: an image and, if there is one, its label map."""

    name: str
    image: Path
    label: Path | None = None

    @property
    def unlabelled(self) -> Case:
        """The same case without the path to its label."""
        return replace(self, label=None)


@dataclass(frozen=True)
class Dataset:
    """The cases of a folder. `classes` is None if no dataset.json names them."""

    root: Path
    classes: dict[int, str] | None
    training: tuple[Case, ...]
    validation: tuple[Case, ...] = ()
    test: tuple[Case, ...] = ()


@dataclass(frozen=True)
class TrainingSplit:
    """Cases for training and for validation. The unlabelled cases carry no path to a label."""

    labelled: tuple[Case, ...]
    unlabelled: tuple[Case, ...]
    validation: tuple[Case, ...]


def open_dataset(root: Path) -> Dataset:
    """Lists a dataset folder. No image or label is opened.

    Raises:
        UserError: the folder is missing, its layout is not one of LAYOUTS, it holds no training case, a listed file is
            missing, or a case is listed twice.
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
    """Uses the labels of the first `labelled` labelled cases (default: all); all other training cases are unlabelled.

    If the dataset names no validation cases, the last `validation` labelled cases are held out.

    Raises:
        UserError: there are no labelled cases, or fewer than requested.
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
                f"--validation {validation} leaves none of the {len(with_label)} labelled cases for training; "
                f"choose 0 to {len(with_label) - 1}"
            )
        with_label = with_label[:-validation]
    count = len(with_label) if labelled is None else labelled
    if not 1 <= count <= len(with_label):
        raise UserError(
            f"--labeled {count}: {dataset.root} has {len(with_label)} labelled cases for training; "
            f"choose 1 to {len(with_label)}"
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
            f"{labels[strangers[0]]} has no image of that name in {root / 'images'} ({len(strangers)} such labels). "
            "Rename or remove it."
        )
    cases = {name: Case(name, path, labels.get(name)) for name, path in images.items()}
    parts: dict[str, tuple[Case, ...]] = {}
    taken: dict[str, str] = {}
    for part in ("validation", "test", "training"):
        names = description.get(part, [n for n in cases if n not in taken] if part == "training" else [])
        for name in _names(root, part, names):
            if name not in cases:
                raise UserError(
                    f"{root / 'dataset.json'}: the {part} case {name!r} has no image in {root / 'images'}. "
                    "Correct the name, or add the image."
                )
            if name in taken:
                raise UserError(
                    f"{root / 'dataset.json'}: case {name!r} is listed under {taken[name]} and {part}. Keep one."
                )
            taken[name] = part
        parts[part] = tuple(cases[name] for name in names)
    for part in ("validation", "test"):
        for case in parts[part]:
            if case.label is None:
                raise UserError(
                    f"{root / 'dataset.json'}: the {part} case {case.name!r} has no label in {root / 'labels'}. "
                    "Add the label, or remove the case from the list."
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
                f'{root / "dataset.json"}: a {part} entry must be {{"image": path, "label": path}}, got {entry!r}'
            )
        image = _inside(root, entry["image"])
        label = _inside(root, entry["label"]) if part == "training" and entry.get("label") else None
        name = case_name(image)
        if name in cases:
            raise UserError(f"{root / 'dataset.json'}: case {name!r} is listed twice. Remove one entry.")
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
        raise UserError(f"{path} must hold a JSON object, got a {type(description).__name__}")
    return description


def _names(root: Path, part: str, names: Any) -> Sequence[str]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{root / 'dataset.json'}: {part!r} must be a list of case names, got {names!r}")
    return names


def _inside(root: Path, name: str) -> Path:
    path = root / name
    if not path.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{root / 'dataset.json'}: {name!r} is outside the dataset's folder; copy the file into it")
    if not path.is_file():
        raise UserError(f"{root / 'dataset.json'} lists {name!r}, which does not exist; correct the path or add it")
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
        raise UserError(f'{root / "dataset.json"}: "labels" must map numbers to names, got {labels!r}') from error
    classes = {number: name for number, name in sorted(pairs) if number >= 0}
    if sorted(classes) != list(range(len(classes))) or len(classes) < 2:
        raise UserError(
            f'{root / "dataset.json"}: "labels" must number the classes 0, 1, … without a gap, got {labels!r}'
        )
    return classes
