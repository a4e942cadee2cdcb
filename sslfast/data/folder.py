"""A dataset folder: its cases, their labels, and the split into training, validation and test cases."""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sslfast.data.channels import CHANNEL, channel_folders, channel_names, images_in
from sslfast.data.classes import Classes, described_classes
from sslfast.data.files import MAPS, NO_VOLUME, SUFFIXES, case_name, is_series, parts_of, volume_files
from sslfast.data.nifti import IGNORE, read_label
from sslfast.errors import UserError, shortened

LAYOUTS = """A dataset folder has one of these layouts:
  DIR/images/*.nii.gz and DIR/labels/*.nii.gz, with the same file names; an image without a label is unlabelled.
      Instead of *.nii.gz: *.nii, *.nrrd, *.nhdr, *.mha, *.mhd, and folders DIR/images/<case>/ with a DICOM series.
      DIR/dataset.json is optional:
      {"labels": {"0": "background", "1": "heart"}, "validation": [names], "test": [names]}
  A Medical Segmentation Decathlon task or MONAI datalist: DIR/dataset.json with
      "training": [{"image": ..., "label": ...}]; "validation" and "test" likewise
  A raw dataset of nnU-Net: DIR/imagesTr/case_0000.nii.gz, DIR/labelsTr/case.nii.gz, DIR/dataset.json
Several channels of an image are files case_0000, case_0001, …, or folders such as DIR/images/T1, or one 4D file."""
PARTS = ("training", "validation", "test")
LABEL_ENDING = re.compile(r"(?i)(.+?)[-_.](?:seg|segmentation|label|labels|mask|gt|manual|0000)")


@dataclass(frozen=True)
class Case:
    """One subject: an image and, if there is one, its label map."""

    name: str
    images: tuple[Path, ...]
    """Files of the channels, in their order; one file may hold all."""
    label: Path | None = None

    @property
    def image(self) -> Path:
        """The first file."""
        return self.images[0]

    @property
    def unlabelled(self) -> Case:
        """The same case without the path to its label."""
        return replace(self, label=None)


@dataclass(frozen=True)
class Dataset:
    """The cases of a folder."""

    root: Path
    training: tuple[Case, ...]
    validation: tuple[Case, ...] = ()
    test: tuple[Case, ...] = ()
    classes: Classes | None = None
    """None if no dataset.json names them."""
    ignore_label: int = IGNORE
    """Value of voxels that are not annotated, by dataset.json; -1 if it names none."""
    channels: tuple[str, ...] = ()
    """Names of the channels; empty if nothing names them."""

    def ignores(self, ignore_label: int) -> int:
        """The value of voxels that are not annotated, where `--ignore-label` is this."""
        return self.ignore_label if ignore_label == IGNORE else ignore_label


@dataclass(frozen=True)
class TrainingSplit:
    """Cases for training and for validation. The unlabelled cases carry no path to a label."""

    labelled: tuple[Case, ...]
    unlabelled: tuple[Case, ...]
    validation: tuple[Case, ...]
    set_aside: int = 0
    """Unlabelled cases that have a label map, which is not used."""

    def __str__(self) -> str:
        without = len(self.unlabelled) - self.set_aside
        reasons = [f"{without} without a label map"] if without else []
        reasons += [f"{self.set_aside} by --labeled {len(self.labelled)}"] if self.set_aside else []
        why = f" ({', '.join(reasons)})" if reasons else ""
        counts = [f"{len(self.labelled)} labelled cases", f"{len(self.unlabelled)} unlabelled{why}"]
        return ", ".join(counts + ([f"{len(self.validation)} for validation"] if self.validation else []))


def open_dataset(root: Path) -> Dataset:
    """Lists a dataset folder. No image or label is opened.

    Raises:
        UserError: the folder is missing, its layout is not one of LAYOUTS, it holds no training case, a listed file is
            missing, a case is listed twice, or a file belongs to no case.
    """
    if not root.is_dir():
        raise UserError(f"--data {root} is not a folder. {LAYOUTS}")
    description = read_description(root / "dataset.json")
    for name, value in description.items():
        if name not in PARTS and re.match("(?i)train|val|test", name) and isinstance(value, list):
            raise UserError(f"{root / 'dataset.json'}: the list {name!r} is not read; name it {' or '.join(PARTS)}")
    channels = channel_names(root / "dataset.json", description)
    if (root / "images").is_dir():
        dataset = _plain_folders(root, description, channels)
    elif isinstance(description.get("training"), list):
        dataset = _decathlon(root, description, channels)
    elif (root / "imagesTr").is_dir():
        dataset = _nnunet(root, channels, described_classes(root / "dataset.json", description)[1])
    else:
        raise UserError(f"{root} has no folder images/ and no dataset.json with a training list. {LAYOUTS}")
    if not dataset.training:
        raise UserError(f"{root} holds no training case: the list is empty. {LAYOUTS}")
    classes, ignore_label = described_classes(root / "dataset.json", description)
    return replace(dataset, classes=classes, ignore_label=ignore_label)


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
    rest = [case for case in training if case.name not in apart]
    unlabelled = tuple(case.unlabelled for case in rest)
    return TrainingSplit(chosen, unlabelled, kept, sum(case.label is not None for case in rest))


def as_trained(dataset: Dataset, labelled: int, validation: int = 0) -> Dataset:
    """The dataset without the label maps of the training cases whose labels a run of `split_training` does not use."""
    unused = {case.name for case in split_training(dataset, labelled, validation).unlabelled}
    training = (case.unlabelled if case.name in unused else case for case in dataset.training)
    return replace(dataset, training=tuple(training))


def _plain_folders(root: Path, description: Mapping[str, Any], channels: Sequence[str]) -> Dataset:
    labels = volumes_in(root / "labels") if (root / "labels").is_dir() else {}
    others = [path for path in root.iterdir() if path.is_dir() and re.match("(?i)label|mask|seg|gt|annot", path.name)]
    if not (root / "labels").is_dir() and others:
        raise UserError(f"{others[0]}: label maps are read from {root / 'labels'}; rename the folder")
    cases, names = _cases_in(root / "images", channels, labels)
    for name, match in [(name, LABEL_ENDING.fullmatch(name)) for name in labels]:
        case = cases.get(match[1]) if match else None
        if case is None:
            continue
        if case.label:
            raise UserError(f"{case.label} and {labels[name]} both belong to {case.image}. Keep one of them.")
        cases[case.name] = replace(case, label=labels.pop(name))
    _stop_at_spare(labels, root / "labels", root / "images")
    parts: dict[str, tuple[Case, ...]] = {}
    taken: dict[str, str] = {}
    for part in ("validation", "test", "training"):
        rest = [n for n in cases if n not in taken] if part == "training" else []
        listed = _names(root, part, description.get(part, rest))
        for name in listed:
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
        parts[part] = tuple(cases[name] for name in listed)
    for part in ("validation", "test"):
        for case in parts[part]:
            if case.label is None:
                raise UserError(
                    f"{root / 'dataset.json'}: the {part} case {case.name!r} has no label in {root / 'labels'}. "
                    "Add the label, or remove the case from the list."
                )
    return Dataset(root, parts["training"], parts["validation"], parts["test"], channels=names)


def _nnunet(root: Path, channels: Sequence[str], ignore_label: int) -> Dataset:
    """Cases of imagesTs with a label map in labelsTs are test cases. Cases without a label map, or with one in which
    nothing is annotated, are unlabelled."""
    parts: dict[str, list[Case]] = {"training": [], "test": []}
    names: tuple[str, ...] = ()
    for suffix in ("Tr", "Ts"):
        images, drawn = root / f"images{suffix}", root / f"labels{suffix}"
        labels = volumes_in(drawn) if drawn.is_dir() else {}
        cases, names = _cases_in(images, names or channels, labels, numbered=True) if images.is_dir() else ({}, names)
        _stop_at_spare(labels, drawn, images)
        for case in cases.values():
            if case.label and ignore_label != IGNORE and (read_label(case.label).array == ignore_label).all():
                case = case.unlabelled
            parts["test" if suffix == "Ts" and case.label else "training"].append(case)
    return Dataset(root, tuple(parts["training"]), test=tuple(parts["test"]), channels=names)


def _cases_in(
    folder: Path, channels: Sequence[str], labels: dict[str, Path], numbered: bool = False
) -> tuple[dict[str, Case], tuple[str, ...]]:
    """The cases of a folder of images by name, and the names of the channels. Takes their labels out of `labels`."""
    files, folders = volume_files(folder), channel_folders(folder)
    if files or not folders:
        files = volumes_in(folder)
    else:
        _stop_at_strangers(folder, folders.values())
        for subfolder in folders.values():
            volumes_in(subfolder)
    endings = [LABEL_ENDING.fullmatch(name) for name in labels if not CHANNEL.fullmatch(name)]
    drawn = {*labels} | {match[1] for match in endings if match}
    images, names = images_in(folder, files, channels, drawn, numbered=numbered or len(channels) > 1)
    return {name: Case(name, paths, labels.pop(name, None)) for name, paths in images.items()}, names


def _stop_at_spare(labels: Mapping[str, Path], folder: Path, images: Path) -> None:
    if labels:
        raise UserError(
            f"{file_names(labels.values())} in {folder}: no image in {images} has this name. "
            "Rename or remove the label maps."
        )


def volumes_in(folder: Path) -> dict[str, Path]:
    """The volumes of a folder by case name; others would count as absent, so they are refused."""
    volumes = volume_files(folder)
    _stop_at_strangers(folder, volumes.values())
    return volumes


def strangers(folder: Path, known: Iterable[Path]) -> list[Path]:
    """What lies in a folder of volumes besides the known ones and texts."""
    hidden = {part for path in known for part in (path, *parts_of(path))}
    return [
        path
        for path in sorted(folder.iterdir())
        if not path.name.startswith(".")
        and path not in hidden
        and path.suffix.lower() not in NO_VOLUME
        and path.name not in MAPS
    ]


def _stop_at_strangers(folder: Path, known: Iterable[Path]) -> None:
    """Raises UserError if a folder of volumes holds others than the known ones; they would count as absent."""
    if others := strangers(folder, known):
        raise UserError(
            f"{file_names(others)} in {folder}: only {', '.join(f'*{suffix}' for suffix in SUFFIXES)} and subfolders "
            "with one DICOM series each are read. Convert or move them, so that no volume is left out unnoticed."
        )


def file_names(paths: Iterable[Path]) -> str:
    """Up to five file names, and how many more there are."""
    names = [path.name for path in paths]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _decathlon(root: Path, description: Mapping[str, Any], channels: tuple[str, ...]) -> Dataset:
    """A test entry without a label is unlabelled and used for training: the Decathlon's test cases are."""
    parts: dict[str, list[Case]] = {"training": [], "validation": [], "test": []}
    taken: set[str] = set()
    for part in parts:
        entries = description.get(part, [])
        if not isinstance(entries, list):
            raise UserError(f"{root / 'dataset.json'}: {part!r} must be a list, got {shortened(entries)}")
        for entry in entries:
            case = _decathlon_case(root, part, entry)
            if case.name in taken:
                raise UserError(f"{root / 'dataset.json'}: case {case.name!r} is listed twice. Remove one entry.")
            taken.add(case.name)
            if part == "validation" and case.label is None:
                raise UserError(f"{root / 'dataset.json'}: the validation case {case.name!r} has no label. Add it.")
            parts["training" if case.label is None else part].append(case)
    training, validation, test = map(tuple, parts.values())
    return Dataset(root, training, validation, test, channels=channels)


def _decathlon_case(root: Path, part: str, entry: Any) -> Case:
    if isinstance(entry, str):
        entry = {"image": entry}
    paths = [entry.get("image"), entry.get("label") or None] if isinstance(entry, dict) else [None]
    if not isinstance(paths[0], str) or not isinstance(paths[-1], str | None):
        raise UserError(
            f'{root / "dataset.json"}: a {part} entry must be {{"image": path, "label": path}}, got {shortened(entry)}'
        )
    for name, value in entry.items():
        if name not in ("image", "label") and str(value).lower().endswith(SUFFIXES):
            raise UserError(
                f'{root / "dataset.json"}: of a {part} entry only "image" and "label" are read, not {name!r}: '
                f"{shortened(value)}. Rename or remove it."
            )
    images = _inside(root, paths[0])
    return Case(case_name(root / paths[0]), images, _inside(root, paths[1])[0] if paths[1] else None)


def read_description(path: Path) -> dict[str, Any]:
    """The content of dataset.json; empty if there is none.

    Raises:
        UserError: it is no JSON object, or holds NaN or infinity.
    """
    if not os.path.lexists(path):
        return {}
    try:
        text = path.read_text(encoding="utf-8-sig")
        description = json.loads(text, parse_constant=_refuse, object_pairs_hook=_without_repetition)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(description, dict):
        raise UserError(f"{path} must hold a JSON object, got a {type(description).__name__}")
    return description


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return content


def _names(root: Path, part: str, names: Any) -> Sequence[str]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{root / 'dataset.json'}: {part!r} must be a list of case names, got {shortened(names)}")
    return [unicodedata.normalize("NFC", name) for name in names]  # as `case_name`


def _inside(root: Path, name: str) -> tuple[Path, ...]:
    """The path of a listed file, or, as nnU-Net 1 lists a case without its channels, those of its channels.

    It must not lead out of the folder by itself; a symbolic link there may.
    """
    path = root / name
    if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == ".." or "\0" in name:
        raise UserError(f"{root / 'dataset.json'}: {name!r} is outside the dataset's folder; copy the file into it")
    if path.is_file() or is_series(path):
        return (path,)
    case = case_name(path) if path.name.lower().endswith(SUFFIXES) else path.name
    possible = ((n, path.with_name(f"{case}_{n:04d}{suffix}")) for n in range(100) for suffix in SUFFIXES)
    channels = {n: channel for n, channel in possible if channel.is_file()}
    if not channels:
        raise UserError(f"{root / 'dataset.json'} lists {name!r}, which does not exist; correct the path or add it")
    if [*channels] != [*range(len(channels))]:
        raise UserError(f"{path.parent}: the case {case!r} has the channels {[*channels]}; add those that lack")
    return tuple(channels.values())
