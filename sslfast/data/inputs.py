"""The volumes that are given to `predict`."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from sslfast.data.channels import images_in
from sslfast.data.files import case_name, is_series, volume_files
from sslfast.data.folder import file_names, strangers
from sslfast.errors import UserError


def find_images(paths: Sequence[Path], channels: Sequence[str] = ("image",)) -> dict[str, tuple[Path, ...]]:
    """The volumes of `--images` by case name, each with the files of its channels.

    Args:
        paths: folders and files.
        channels: names of the channels that the networks take.

    Raises:
        UserError: a folder holds no volume, a file is none, two volumes have the same name, or one lacks a channel.
    """
    images: dict[str, tuple[Path, ...]] = {}
    files: dict[str, tuple[Path, ...]] = {}  # those given one by one
    for path in paths:
        if not path.is_dir() or (is_series(path) and not volume_files(path)):
            _add(files, {case_name(path): (path,)})
            continue
        there = volume_files(path)
        found = images_in(path, there, channels, (), numbered=_numbered(there, channels))[0]
        if not found:
            raise UserError(f"--images {path} holds no volume, such as *.nii.gz, *.nrrd, *.mha or a DICOM series")
        if others := strangers(path, there.values()) if there else []:
            print(f"warning: {file_names(others)} in {path}: no volumes, and not segmented", file=sys.stderr)
        _add(images, found)
    if files:
        one_each = {name: path for name, (path,) in files.items()}
        _add(images, images_in(Path(), one_each, channels, (), numbered=_numbered(one_each, channels))[0])
    return images


def _numbered(names: Collection[str], channels: Sequence[str]) -> bool:
    """True if file names end with a channel; those of one channel may too, as in nnU-Net: then all end with _0000."""
    return len(channels) > 1 or all(name.endswith("_0000") for name in names)


def _add(images: dict[str, tuple[Path, ...]], found: dict[str, tuple[Path, ...]]) -> None:
    for name, paths in found.items():
        if name in images:
            raise UserError(f"--images: {images[name][0]} and {paths[0]} have the same name; segment them one by one")
        images[name] = paths
