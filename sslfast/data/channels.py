"""Images of several channels: a file each, as in nnU-Net; a folder each; or one 4D file, as in the Decathlon."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from sslfast.data.files import is_series, volume_files
from sslfast.data.nifti import read_header
from sslfast.errors import UserError

CHANNEL = re.compile(r"(.+)_(\d{4})")  # nnU-Net's name of an image: case and channel


def images_in(
    folder: Path, files: Mapping[str, Path], names: Sequence[str], labels: Collection[str], *, numbered: bool = False
) -> tuple[dict[str, tuple[Path, ...]], tuple[str, ...]]:
    """The files of each case's channels, by case, and the names of the channels; empty if nothing names them.

    Args:
        folder: holds case.nii.gz, or case_0000.nii.gz, case_0001.nii.gz, or a folder of volumes for each channel.
        files: the volumes in it by file name without suffix.
        names: names of the channels, as far as they are known.
        labels: names of the label maps, without suffix. They show whether a name ends with a channel.
        numbered: file names end with a channel.

    Raises:
        UserError: a case lacks a channel, or the folders are not the known channels.
    """
    folders = channel_folders(folder) if not files else {}
    if of_cases := {*folders} & {*labels}:
        raise UserError(
            f"{folder / min(of_cases)} has the name of a label map; a folder in {folder} holds one channel of all "
            f"cases, such as {folder / 'T1' / min(of_cases)}.nii.gz"
        )
    if folders:
        if len(names) > 1 and {*names} != {*folders}:
            raise UserError(
                f"{folder} has the folders {', '.join(folders)}; the channels are {', '.join(names)}. Rename them."
            )
        order = tuple(names) if len(names) > 1 else tuple(folders)
        cases: dict[str, dict[int, Path]] = {}
        for number, name in enumerate(order):
            for case, path in volume_files(folders[name]).items():
                cases.setdefault(case, {})[number] = path
        return _complete(dict(sorted(cases.items())), order, folder), order
    if not files:
        return {}, tuple(names)
    matches = {name: CHANNEL.fullmatch(name) for name in files}
    shown = any(match and match[1] in labels and name not in labels for name, match in matches.items())
    first = next(iter(files.values()))
    if not (numbered or shown) or (len(names) > 1 and not shown and count_channels([first]) == len(names)):
        return {name: (path,) for name, path in files.items()}, tuple(names)
    cases = {}
    for name, match in matches.items():
        cases.setdefault(match[1] if match else name, {})[int(match[2]) if match else 0] = files[name]
    count = max(len(names), 1 + max(number for found in cases.values() for number in found))
    order = tuple(names) if len(names) == count else tuple(f"channel {number}" for number in range(count))
    alone = {case for case, found in cases.items() if [*found] == [0]}  # each may hold all channels
    if alone == {*cases}:
        return {case: (found[0],) for case, found in cases.items()}, tuple(names)
    return _complete(cases, order, folder), order


def channel_folders(folder: Path) -> dict[str, Path]:
    """The subfolders of volumes, by name."""
    found = (path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith("."))
    return {path.name: path for path in found if not is_series(path) and volume_files(path)}


def channel_names(path: Path, description: Mapping[str, Any]) -> tuple[str, ...]:
    """The names in "channel_names" (nnU-Net 2) or "modality" (Decathlon, nnU-Net 1) of a dataset.json.

    Raises:
        UserError: they are not {"0": name, "1": name, …} or a list of names.
    """
    key = "channel_names" if "channel_names" in description else "modality"
    content = description.get(key, [])
    if isinstance(content, str):  # as other tools write for one
        return (content,)
    if isinstance(content, dict) and {*content} == {*map(str, range(len(content)))}:
        content = [content[str(number)] for number in range(len(content))]
    if not isinstance(content, list) or not all(isinstance(name, str) for name in content):
        raise UserError(f'{path}: {key!r} must be {{"0": name, "1": name, …}}, got {content}')
    if len({*content}) < len(content):
        raise UserError(f"{path}: {key!r} has a name twice; each channel needs its own")
    return tuple(content)


def count_channels(images: Sequence[Path]) -> int:
    """Channels of an image, by its files or the header of the one."""
    return len(images) if len(images) > 1 else len(read_header(images).array)


def named_channels(names: Sequence[str], images: Sequence[Path]) -> tuple[str, ...]:
    """The names, or if there are none, those of the channels of an image by their numbers."""
    if names:
        return tuple(names)
    count = count_channels(images)
    return tuple(f"channel {number}" for number in range(count)) if count > 1 else ("image",)


def _complete(
    cases: Mapping[str, Mapping[int, Path]], names: Sequence[str], folder: Path
) -> dict[str, tuple[Path, ...]]:
    """The files of each case in the order of the channels; raises UserError that names all cases that lack one."""
    faults = []
    for case, found in cases.items():
        missing = [f"{number} ({name})" for number, name in enumerate(names) if number not in found]
        if missing:
            faults.append(f"the case {case!r} lacks channel {' and '.join(missing)}")
    if faults:
        where = "--images" if folder == Path() else folder
        raise UserError(f"{where}: {', '.join(faults)}; add what lacks, or remove the case")
    return {case: tuple(found[number] for number in range(len(names))) for case, found in cases.items()}
