"""Makes the real cohorts of the study from public archives: python -m benchmarks.accuracy.real --help."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import nibabel as nib
import numpy as np
import tyro
from tqdm import tqdm

from sslfast.atomic_io import make_folder, whole_file
from sslfast.cli import run_command
from sslfast.data.public.conversion import left_atrium
from sslfast.data.public.splits import SPLITS
from sslfast.errors import UserError

HIPPOCAMPUS = {  # numbers of the Decathlon's cases, drawn once at random from its 260; the first are the labelled ones
    "training": """
        136 146 040 261 057 077 338 003 334 248 165 098 130 351 300 308 195 234 088 011 107 311 193 150 166 015 038 330
        074 386 353 172 274 319 052 102 303 039 097 075 215 045 203 321 231 056 328 257 188 144 368 276 141 142 326 068
        105 034 340 358 393 354 205 380 160 327 361 041 381 372 132 250 290 221 228 374 126 145 108 014 048 345 301 096
        260 020 235 243 288 178 337 174 169 352 333 181 232 099 064 316 280 212 171 294 264 094 125 025 124 360 007 394
        199 158 033 037 017 378 089 058""",
    "validation": "230 251 349 156 176 036 373 106 286 390 067 363 109 060 091 277 138 350 259 157",
    "test": """
        189 180 143 289 310 023 008 224 164 161 376 035 269 263 332 298 049 227 229 383 006 317 314 268 001 302 152 219
        087 114 177 385 222 051 217 322 220 367 101 004 026 042 053 185 253 044 238 309 065 318 046 265 204 296 127 093
        149 355 084 154""",
}
LEFT_ATRIUM = {"training": slice(0, 60), "validation": slice(60, 66), "test": slice(66, 80)}  # of the ua-mt training
SPACING = 1.25  # mm, twice the published


@dataclass(frozen=True)
class RealConfig:
    """Write the real cohorts of the accuracy study as plain folders, from the archives in which they are published.

        python -m benchmarks.accuracy.real --hippocampus Task04_Hippocampus --la LA2018 --output DIR
        python -m benchmarks --suite accuracy --real DIR

    Task04_Hippocampus is the folder in Task04_Hippocampus.tar of http://medicaldecathlon.com. LA2018 holds the
    <id>/mri_norm2.h5 files that go with UA-MT (https://github.com/yulequan/UA-MT); they need `pip install h5py`.
    """

    output: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder for hippocampus/ and la_1.25mm/."""
    hippocampus: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """The Decathlon's Task04_Hippocampus, with imagesTr/ and labelsTr/."""
    la: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder of the left atria's h5 files."""


def make_cohorts(config: RealConfig) -> None:
    """Writes the cohorts whose source is given.

    Raises:
        UserError: no source is given, or one lacks files.
    """
    if config.hippocampus is None and config.la is None:
        raise UserError("nothing to make; give --hippocampus DIR, --la DIR, or both (see --help)")
    if config.hippocampus is not None:
        write_hippocampus(config.hippocampus, config.output / "hippocampus")
    if config.la is not None:
        write_left_atrium(config.la, config.output / "la_1.25mm")


def write_hippocampus(source: Path, folder: Path) -> None:
    """Copies the cohort's 200 cases.

    Raises:
        UserError: a file is missing.
    """
    parts = {part: [f"hippocampus_{number}" for number in numbers.split()] for part, numbers in HIPPOCAMPUS.items()}
    names = [name for part in parts.values() for name in part]
    for to, of in (("images", "imagesTr"), ("labels", "labelsTr")):
        make_folder(folder / to)
        for name in tqdm(names, desc=f"hippocampus, {to}", unit="case", leave=False):
            file = source / of / f"{name}.nii.gz"
            if not file.exists():
                raise UserError(f"{file} is missing; --hippocampus is the folder in Task04_Hippocampus.tar")
            with whole_file(folder / to / file.name) as part:
                shutil.copyfile(file, part)
    _describe(folder, {"0": "background", "1": "anterior", "2": "posterior"}, parts)


def write_left_atrium(source: Path, folder: Path) -> None:
    """Means of 2×2×2 voxels of the 80 published training volumes, int16 in hundredths of a standard deviation.

    Raises:
        UserError: a case is missing.
    """
    names = SPLITS["la"]["ua-mt"].training
    cases = {case.name: case for case in left_atrium(source, None).cases}
    absent = [name for name in names if name not in cases]
    if absent:
        raise UserError(f"{source} lacks {len(absent)} of the {len(names)} cases, the first {absent[0]}/mri_norm2.h5")
    for kind in ("images", "labels"):
        make_folder(folder / kind)
    for name in tqdm(names, desc="left atria", unit="case", leave=False):
        image, label = cases[name].image, cases[name].label
        if isinstance(image, Path) or label is None or isinstance(label, Path):
            raise UserError(f"{source}: {name} is not a pair of volumes in mri_norm2.h5")
        _save(folder / "images" / f"{name}.nii.gz", np.round(100 * _halved(image().array)).astype(np.int16))
        _save(folder / "labels" / f"{name}.nii.gz", (_halved(label().array) >= 0.5).astype(np.uint8))
    _describe(folder, {"0": "background", "1": "left atrium"}, {part: names[of] for part, of in LEFT_ATRIUM.items()})


def _halved(array: np.ndarray) -> np.ndarray:
    """Means of 2×2×2 voxels; an odd last one is left out."""
    x, y, z = (size // 2 for size in array.shape)
    blocks = array[: 2 * x, : 2 * y, : 2 * z].astype(np.float64).reshape(x, 2, y, 2, z, 2)
    means: np.ndarray = blocks.mean((1, 3, 5))
    return means


def _save(path: Path, array: np.ndarray) -> None:
    file = nib.Nifti1Image(array, np.diag([SPACING, SPACING, SPACING, 1]))
    file.header.set_xyzt_units("mm")
    with whole_file(path) as part:
        nib.save(file, part)


def _describe(folder: Path, labels: dict[str, str], parts: dict[str, list[str]]) -> None:
    """Writes dataset.json, last: a folder that has it is complete."""
    with whole_file(folder / "dataset.json") as part:
        part.write_text(json.dumps({"labels": labels, **parts}, indent=1))
    print(f"{folder}: {', '.join(f'{len(names)} {part}' for part, names in parts.items())}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    return run_command(RealConfig, make_cohorts, argv)


if __name__ == "__main__":
    sys.exit(main())
