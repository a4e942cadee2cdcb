"""Converts public datasets from their published formats to plain folders: images/, labels/, dataset.json."""

from __future__ import annotations

import filecmp
import json
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import nibabel as nib
from tqdm import tqdm

from sslfast.atomic_io import make_folder, whole_file
from sslfast.data.files import SUFFIXES, case_name
from sslfast.data.folder import file_names, read_description
from sslfast.data.nifti import Volume, on_grid_of, read_image, read_label
from sslfast.data.public.readers import foreground, h5_readers
from sslfast.data.public.splits import SPLITS
from sslfast.errors import UserError

Part = Literal["training", "validation", "test"]
LISTS: dict[str, Part] = {"train": "training", "val": "validation", "test": "test"}  # by file name without suffix


@dataclass(frozen=True)
class RawCase:
    """One case of a source: files, or functions that read its volumes."""

    name: str
    part: Part
    image: Path | Callable[[], Volume]
    label: Path | Callable[[], Volume] | None = None


@dataclass(frozen=True)
class Source:
    """A public dataset before its conversion."""

    cases: Sequence[RawCase]
    classes: dict[int, str]
    split: str  # its name and origin
    flags: str = ""  # recommended flags of the trainer
    notes: dict[str, Any] = field(default_factory=dict)  # further entries of dataset.json


def convert(name: str, source: Path, output: Path, split: str | None = None) -> Source:
    """Converts the dataset `name` in `source` to plain folders in `output`.

    dataset.json is written last, so a folder that has this file is complete. The split is the published one called
    `split`; else that of the lists beside the data; else the first published one whose cases are all there; else every
    case is for training.

    Raises:
        UserError: the folder or its files are missing, the grids of an image and its label differ, or a package is not
            installed. Each message gives the remedy.
    """
    if output.resolve() == source.resolve():
        raise UserError(f"--output {output} is also the source; choose another folder")
    dataset = READERS[name](source, split)
    _stop_at_repeated(source, [case.name for case in dataset.cases])
    if (output / "dataset.json").exists() and read_description(output / "dataset.json").get("name") != name:
        raise UserError(f"--output {output} holds another dataset; choose another folder")
    make_folder(output)
    (output / "dataset.json").unlink(missing_ok=True)
    faults = []
    for case in tqdm(dataset.cases, desc=f"write {name}", unit="case", leave=False):
        try:
            _write_case(output, case)
        except UserError as error:
            faults.append(f"- {error}")
    if faults:
        raise UserError(
            f"{len(faults)} of {len(dataset.cases)} cases of {source} cannot be converted, so {output} has no "
            "dataset.json:\n" + "\n".join(faults)
        )
    parts: dict[str, list[str]] = {part: [] for part in get_args(Part)}
    for case in dataset.cases:
        parts[case.part].append(case.name)
    manifest = {
        "name": name,
        "labels": {str(number): class_name for number, class_name in dataset.classes.items()},
        **parts,
        "split": dataset.split,
        "normalisation": "none applied here; flags for the trainer: " + (dataset.flags or "--intensity zscore"),
        **dataset.notes,
    }
    with whole_file(output / "dataset.json") as part:
        part.write_text(json.dumps(manifest, indent=1))
    return dataset


def _write_case(output: Path, case: RawCase) -> None:
    """Writes the image and the label, which must lie on one grid."""
    image_path, label_path = (output / kind / f"{case.name}.nii.gz" for kind in ("images", "labels"))
    image = _write(image_path, case.image)
    if case.label is not None:
        label = _write(label_path, case.label)
        files = (case.image, image_path), (case.label, label_path)
        image_file, label_file = (read if isinstance(read, Path) else written for read, written in files)  # to name
        on_grid_of(image or read_image(image_file), label or read_label(label_file), image_file, label_file)


def _write(path: Path, what: Path | Callable[[], Volume]) -> Volume | None:
    """Copies a .nii.gz file and returns None, or writes a volume and returns it.

    Raises:
        UserError: another file is there already, perhaps somebody's work.
    """
    volume = None
    with whole_file(path) as part:
        if isinstance(what, Path) and what.name.endswith(".nii.gz"):
            shutil.copyfile(what, part)
        else:
            volume = read_image(what) if isinstance(what, Path) else what()
            file = nib.Nifti1Image(volume.array, volume.affine)
            file.header.set_xyzt_units("mm")
            nib.save(file, part)
        if path.exists() and not filecmp.cmp(path, part, shallow=False):
            raise UserError(f"{path} is not what this conversion writes; choose another --output, or remove it")
    return volume


def left_atrium(source: Path, split: str | None) -> Source:
    """LA 2018: <case>/mri_norm2.h5 (z-scored, cropped around the atrium), or <case>/lgemri.nrrd with laendo.nrrd."""
    folders = sorted({path.parent for path in [*_files(source, "mri_norm2.h5"), *_files(source, "lgemri.nrrd")]})
    if not folders:
        raise UserError(f"{source} holds no <case>/mri_norm2.h5 and no <case>/lgemri.nrrd")
    _stop_at_repeated(source, [folder.name for folder in folders])
    cases: dict[str, tuple[Path | Callable[[], Volume], Callable[[], Volume] | None]] = {}
    for folder in folders:
        if (folder / "mri_norm2.h5").exists():
            cases[folder.name] = h5_readers(folder / "mri_norm2.h5", spacing=0.625)
        else:
            drawn = folder / "laendo.nrrd"
            label = foreground(partial(read_label, drawn)) if drawn.exists() else None
            cases[folder.name] = folder / "lgemri.nrrd", label
    cropped = any((folder / "mri_norm2.h5").exists() for folder in folders)
    chosen, order = _split("la", source, list(cases), split)
    notes = {"geometry": "isotropic 0.625 mm; the h5 files hold no affine"} if cropped else {}
    if cropped:
        notes["cropped"] = (
            "around the label, also in test cases, as published: comparable, but localisation is not tested"
        )
    flags = "--intensity none --patch 112 112 80" if cropped else "--patch 112 112 80"
    ordered = [RawCase(name, part, *cases[name]) for name, part in order]
    return Source(ordered, {0: "background", 1: "left atrium"}, chosen, flags, notes)


def pancreas(source: Path, split: str | None) -> Source:
    """NIH Pancreas-CT: h5 crops, or full scans with their labels.

    Crops are called image0001_norm.h5 or 0001.h5. Scans are the DICOM series or NIfTI files of PANCREAS_0001, with the
    label label0001.nii.gz.
    """
    crops = [p for p in sorted(_files(source, "*.h5")) if re.fullmatch(r"(image)?\d{4}(_norm)?\.h5", p.name)]
    h5 = _by_number(source, crops)
    cases: dict[str, tuple[Path | Callable[[], Volume], Path | Callable[[], Volume] | None]] = {}
    if h5:
        for number, path in h5.items():
            cases[f"pancreas_{number:04d}"] = h5_readers(path, spacing=1.0)
        flags, notes = (
            "--intensity none --patch 96 96 96",
            {"cropped": "around the pancreas, also in test cases, as published"},
        )
    else:
        files = [path for path in sorted(_files(source, "*")) if path.name.endswith(SUFFIXES)]
        labels = _by_number(source, [path for path in files if path.name.lower().startswith("label")])
        images = _by_number(source, [path for path in files if not path.name.lower().startswith("label")])
        for path in sorted(_files(source, "*.dcm")):
            series = next((p for p in path.parents if re.fullmatch(r"(?i)pancreas_?\d+", p.name)), None)
            if series is not None:
                images.setdefault(_number(series), path.parent)
        if not images:
            raise UserError(f"{source} holds no image0001_norm.h5, no PANCREAS_0001 series of *.dcm and no NIfTI scan")
        _stop_at_spare_labels(source, [path for number, path in labels.items() if number not in images])
        for number, path in sorted(images.items()):
            cases[f"pancreas_{number:04d}"] = (path, labels.get(number))
        flags, notes = "--spacing 1 --intensity ct --window -125 275 --patch 96 96 96", {}
    chosen, order = _split("pancreas", source, list(cases), split)
    notes["splits"] = "62/20 (mc-net) and 62/18 (bcp) are both in use; their results are not comparable"
    ordered = [RawCase(name, part, *cases[name]) for name, part in order]
    return Source(ordered, {0: "background", 1: "pancreas"}, chosen, flags, notes)


def brats(source: Path, split: str | None) -> Source:
    """BraTS 2019, whole tumour from FLAIR: <case>/<case>_flair.nii.gz with <case>_seg.nii.gz, or <case>.h5."""
    cases: dict[str, tuple[Path | Callable[[], Volume], Callable[[], Volume] | None]] = {}
    h5 = sorted(_files(source, "BraTS19_*.h5"))
    _stop_at_repeated(source, [path.stem for path in h5])
    for path in h5:
        image_of, label_of = h5_readers(path, spacing=1.0)
        cases[path.stem] = image_of, foreground(label_of)
    images = [] if h5 else sorted(_files(source, "*_flair.nii*"))
    _stop_at_repeated(source, [case_name(image).removesuffix("_flair") for image in images])
    spare = {path for path in _files(source, "*.nii*") if "seg" in path.name.lower()} if images else set()
    for image in images:
        name = case_name(image).removesuffix("_flair")
        segs = sorted(path for path in spare if path.parent == image.parent)
        named = [path for path in segs if path.name in {f"{name}_seg{suffix}" for suffix in SUFFIXES}]
        alone = [other for other in images if other.parent == image.parent] == [image]
        found = named or (segs if alone and len(segs) == 1 else [])  # as W39_1998.09.19_Segm.nii of BraTS 2020
        spare -= {*found[:1]}
        cases[name] = (image, foreground(partial(read_label, found[0])) if found else None)
    _stop_at_spare_labels(source, spare)
    if not cases:
        raise UserError(f"{source} holds no <case>/<case>_flair.nii.gz and no BraTS19_<case>.h5")
    chosen, order = _split("brats", source, list(cases), split)
    flags = ("--intensity none " if h5 else "") + "--patch 96 96 96"
    ordered = [RawCase(name, part, *cases[name]) for name, part in order]
    return Source(ordered, {0: "background", 1: "whole tumour"}, chosen, flags, {"modality": "FLAIR"})


def _stop_at_spare_labels(source: Path, labels: Iterable[Path]) -> None:
    """Raises UserError if there are label maps without a case; the case would be unlabelled without a word."""
    if spare := sorted(labels):
        raise UserError(
            f"{file_names(spare)} in {source}: no image belongs to it. Rename the label map after its image, or remove "
            "it, so that no case is taken for unlabelled."
        )


READERS: dict[str, Callable[[Path, str | None], Source]] = {
    "la": left_atrium,
    "pancreas": pancreas,
    "brats": brats,
}


def _split(dataset: str, source: Path, names: list[str], wanted: str | None) -> tuple[str, list[tuple[str, Part]]]:
    """The name of the split, and the part of each case, in the order of the split; see `convert`."""
    known = SPLITS.get(dataset, {})
    if wanted and wanted not in known:
        remedy = f"choose {' or '.join(known)}" if known else "leave --split out, as it has no published one"
        raise UserError(f"--split {wanted}: {dataset} has no split of that name; {remedy}")
    lists = {} if wanted else _lists_beside(source)
    if lists:
        files = " and ".join(path.name for path in lists.values())
        return f"{files} of the source", _listed(dataset, lists, source, names)
    for name, split in known.items():
        parts: dict[Part, list[str]] = {"training": split.training, "validation": split.validation, "test": split.test}
        order: list[tuple[str, Part]] = [(case, part) for part, cases in parts.items() for case in cases]
        absent = sorted({case for case, _ in order} - set(names))
        if name == wanted and absent:
            raise UserError(
                f"--split {name}: {source} lacks {len(absent)} of its {len(order)} cases, the first {absent[0]!r}. "
                "Add them, or leave --split out."
            )
        if name == (wanted or name) and not absent:
            return f"{name}: {split.published}" + (f"; {split.remark}" if split.remark else ""), order
    why = "no list beside the data" + (", and no published split has all its cases here" if known else "")
    return f"all for training: {why}", [(case, "training") for case in sorted(names)]


def _files(source: Path, pattern: str) -> list[Path]:
    """The files and folders of this pattern below `source`, without hidden ones, which other systems leave behind."""
    return [path for path in source.rglob(pattern) if not path.name.startswith(".")]


def _lists_beside(source: Path) -> dict[Part, Path]:
    """The first train, val and test list in the folders of `source`; none if there is no train list."""
    lists: dict[Part, Path] = {}
    for stem, part in LISTS.items():
        for path in sorted([*_files(source, f"{stem}.list"), *_files(source, f"{stem}.txt")])[:1]:
            lists[part] = path
    return lists if "training" in lists else {}


def _listed(dataset: str, lists: dict[Part, Path], source: Path, names: list[str]) -> list[tuple[str, Part]]:
    """The listed cases in their order; an entry is a case's name or its file, of the pancreas also its number."""
    order: list[tuple[str, Part]] = []
    for part, path in lists.items():
        for line in re.split(r"[,\n]", path.read_text()):
            if not (entry := line.strip()):
                continue
            file = Path(entry).name
            meant = [file, Path(file).stem, file.split(".")[0]]
            if dataset == "pancreas" and re.search(r"\d", file.split(".")[0]):
                meant.append(f"pancreas_{_number(Path(file)):04d}")
            name = next((name for name in meant if name in names), None)
            if name is None:
                raise UserError(f"{path} lists {entry!r}, but {source} has no such case; add it, or correct the list")
            order.append((name, part))
    return order


def _stop_at_repeated(source: Path, names: Sequence[str]) -> None:
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise UserError(f"{source}: the case {min(twice)!r} occurs more than once. Keep one.")


def _by_number(source: Path, paths: Sequence[Path]) -> dict[int, Path]:
    """The files by the number of their case, each of another one."""
    numbers = [_number(path) for path in paths]
    _stop_at_repeated(source, [f"pancreas_{number:04d}" for number in numbers])
    return dict(zip(numbers, paths, strict=True))


def _number(path: Path) -> int:
    """The last number in a file name."""
    numbers = re.findall(r"\d+", path.name.split(".")[0])
    if not numbers:
        raise UserError(f"{path}: the file name must contain the number of the case")
    return int(numbers[-1])
