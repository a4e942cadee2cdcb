"""The folder of a run: who may use it, and what must not have changed when it is resumed."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

from sslfast.atomic_io import cache_folder, make_folder, remove_parts, whole_file
from sslfast.calibration import FILE
from sslfast.cli import flatten, read_config, write_config
from sslfast.data.demo.cohorts import data_folder
from sslfast.data.files import parts_of
from sslfast.data.folder import Dataset, TrainingSplit, open_dataset, split_training
from sslfast.data.nifti import OWN, description_of
from sslfast.errors import UserError
from sslfast.report_page import PAGE, check_own
from sslfast.training.config import CONFIG, TrainConfig

BLOCK = 2**16  # bytes
CASES = "cases.json"  # which volumes the run is trained on
PARTS = ("labelled", "unlabelled", "validation")
MAY_CHANGE = {"data", "output", "device", "workers", "save_every", "save_minutes", "baseline", "plan", "hours"}


def open_folder(config: TrainConfig, split: TrainingSplit, may_start: bool) -> None:
    """Creates the folder of a new run, or checks that the run in it goes on as it began.

    Args:
        split: the volumes to train on.
        may_start: False if there must be a run to resume.

    Raises:
        UserError: the folder holds another run, or none to resume; other settings or volumes; it cannot be written.
    """
    written = config.output / CONFIG
    if written.exists():
        if not config.resume:
            raise UserError(
                f"{config.output} already holds a run; add --resume to continue it, or choose another --output"
            )
        _check_settings(config)
        _check_cases(config, split)
    elif not may_start:
        raise UserError(
            f"--resume: {config.output} holds no run, for it has no {CONFIG}. Correct --output, or leave out --resume "
            "to start a run."
        )
    tests = [config.output / name for name in ("test", "test_best", "validation")]
    foreign: list[Path] = []
    if not written.exists():
        foreign = [path for folder in tests for path in folder.glob("*.nii*")]
    elif not (config.output / FILE).exists():  # runs of earlier versions made no validation/
        foreign = [path for path in tests[-1].glob("*.nii*") if description_of(path) != OWN]
    if foreign:
        raise UserError(f"{foreign[0]} is not of a run, and would be replaced; choose another --output")
    check_own(config.output / PAGE)
    make_folder(config.output)
    for folder in (config.output, *tests):
        remove_parts(folder)
    remove_parts(cache_folder(), nested=True, shared=True)


def record(config: TrainConfig, split: TrainingSplit) -> None:
    """Writes what `open_folder` compares: the settings, and which volumes the run is trained on."""
    write_config(config, config.output / CONFIG)
    with whole_file(config.output / CASES) as part:
        part.write_text(json.dumps(_fingerprints(split), indent=1))


def cases_of_run(folder: Path) -> tuple[Dataset, TrainingSplit]:
    """The dataset of a run, as its folder is now, and the split that the run's settings make of it.

    Raises:
        UserError: there is no run, or no dataset where it was.
    """
    if not (folder / CONFIG).exists():
        raise UserError(f"{folder} holds no run, for it has no {CONFIG}")
    values = read_config(folder / CONFIG)
    try:
        data = data_folder(values["data"])
    except UserError as error:
        raise UserError(f"{folder / CONFIG}: {error}. Correct it there if the volumes have moved.") from error
    dataset = open_dataset(data)
    return dataset, split_training(dataset, values.get("labeled"), values.get("validation", 0))


def cases_at_start(folder: Path) -> dict[str, dict[str, Any]] | None:
    """The cases with which a run was started, labelled, unlabelled and for validation; None if nothing recorded them.

    Raises:
        UserError: the file cannot be read.
    """
    path = folder / CASES
    if not path.exists():
        return None
    try:
        before = json.loads(path.read_text())
        return {part: dict(before[part]) for part in PARTS}
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read: {error}. Remove it if the dataset holds the volumes that the run was started with."
        ) from error


def _check_settings(config: TrainConfig) -> None:
    before, now = read_config(config.output / CONFIG), flatten(config)
    for name, value in before.items():  # an earlier version had one number or word for some
        if isinstance(now.get(name), list) and not isinstance(value, list) and value is not None:
            before[name] = len(now[name]) * [value]
    changed = [name for name in now if name not in MAY_CHANGE and before.get(name, now[name]) != now[name]]
    moved = Path(str(before.get("data", config.data))).resolve() != Path(config.data).resolve()
    if moved and not (config.output / CASES).exists():  # a run of an earlier version: only the path can be compared
        changed.append("data")
    if changed:
        flags = ", ".join(f"--{n.replace('_', '-')} (was {before[n]}, is {now[n]})" for n in changed)
        why = " The learning rate and the weights of the losses depend on --steps." if "steps" in changed else ""
        raise UserError(
            f"{config.output} was started with other settings: {flags}.{why} Resume with the same, or start a new run."
        )


def _check_cases(config: TrainConfig, split: TrainingSplit) -> None:
    """Compares the volumes with those of the first start, wherever their folder is now."""
    now, before = _fingerprints(split), cases_at_start(config.output)
    if before is None:
        return
    for part, cases in now.items():
        names = [name for name in {**before[part], **cases} if before[part].get(name) != cases.get(name)]
        if names or [*before[part]] != [*cases]:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise UserError(
                f"{config.output} was started with other {part} volumes than {config.data} holds now: "
                f"{shown or 'their order'} differ. Resume with the same, or start a new run."
            )


def _fingerprints(split: TrainingSplit) -> dict[str, dict[str, list[Any]]]:
    """For each part and case: `_fingerprint` of its image and label."""
    return {
        part: {
            case.name: [" ".join(map(_fingerprint, case.images)), case.label and _fingerprint(case.label)]
            for case in getattr(split, part)
        }
        for part in PARTS
    }


def _fingerprint(path: Path) -> str:
    """The size of a volume's file, and its checksum. Of several files: the number, and a checksum of these."""
    parts = [_fingerprint_of_file(part) for part in parts_of(path)]
    return parts[0] if len(parts) == 1 else f"{len(parts)} files {zlib.crc32(' '.join(parts).encode()):08x}"


def _fingerprint_of_file(path: Path) -> str:
    """A file's size, and its checksum: a .nii.gz ends with it. Of others, that of up to 64 evenly spread blocks."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            if path.name.lower().endswith(".gz"):
                file.seek(max(size - 8, 0))
                return f"{size} {file.read().hex()}"
            checksum = 0
            for start in range(0, size, max(BLOCK, size // 64)):
                file.seek(start)
                checksum = zlib.crc32(file.read(BLOCK), checksum)
            return f"{size} {checksum:08x}"
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Correct or remove it.") from error
