"""Which classes there are, and what the values in label maps stand for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sslfast.data.nifti import IGNORE, read_label, suggest_classes
from sslfast.errors import MAX_CLASSES, UserError, shortened, too_many_classes

HIGHEST = 32767  # value of a label map


@dataclass(frozen=True)
class Classes:
    """The classes of a run, and the values of its label maps."""

    names: dict[int, str]
    """Class names by their values, rising, the background as 0; a network's class is the position in this order."""
    merged: dict[int, int] = field(default_factory=dict)
    """Further values, and the value of the class as which they count; 0 leaves them out."""
    listed: dict[str, list[int]] = field(default_factory=dict, compare=False)
    """The values under each name in dataset.json, where regions share some."""

    def describe(self) -> str:
        """The classes and their values in words."""
        shown = []
        for value, name in self.names.items():
            others = sorted(other for other, of in self.merged.items() if of == value)
            words = "+".join(map(str, [value, *others])) if value or len(others) < 5 else "0 and all others"
            shown.append(name if name == f"class {words}" else f"{name} {words}")
        return ", ".join(shown)


def described_classes(path: Path, description: Mapping[str, Any]) -> tuple[Classes | None, int]:
    """The classes of a dataset.json, None without "labels", and the value of voxels that are not annotated, or -1.

    "labels" is {"1": "heart"} (Decathlon) or {"heart": 1} (nnU-Net). Regions of nnU-Net, {"tumour": [1, 2]}, become
    classes: a voxel is of the last one that holds its value. Their values are those of "regions_class_order", or the
    first that no later region holds.

    Raises:
        UserError: the background is not 0, a class is listed twice, or there is none.
    """
    labels = description.get("labels")
    if labels is None:
        return None, IGNORE
    where = f'{path}: "labels"'
    entries: list[tuple[str, list[int]]] = []
    try:
        for key, value in dict(labels).items():
            if str(key).lstrip("-").isdecimal() and not isinstance(value, list):
                key, value = value, key
            values = value if isinstance(value, list) else [value]
            if not all(isinstance(v, (str, int)) and not isinstance(v, bool) for v in (key, *values)):
                raise TypeError
            entries.append((str(key), [int(v) for v in values]))
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{where} must map numbers to names, got {shortened(labels)}") from error
    ignored = [values[0] for name, values in entries if name.lower() == "ignore"]
    entries = [(name, values) for name, values in entries if name.lower() != "ignore" and max(values, default=-1) >= 0]
    order = description.get("regions_class_order")
    outputs = order if isinstance(order, list) and any(len(values) > 1 for _, values in entries) else []
    return _table(entries, where, outputs), ignored[0] if ignored else IGNORE


def choose_classes(
    entries: Sequence[str], described: Classes | None, found: Callable[[], set[int]], ignore_label: int = IGNORE
) -> Classes:
    """The classes of a run: those that `--classes` chooses, else the described ones, else those in the label maps.

    Args:
        entries: words of `--classes`: names of described classes, name=value, name=value+value, or "all" alone.
        described: the classes of dataset.json.
        found: gives the values in the label maps, which are read only if they are needed: without `described`, or
            where `entries` choose.
        ignore_label: the value of voxels that are not annotated.

    Raises:
        UserError: an entry has another form, or a value or name occurs twice; or see `name_classes`.
    """
    if not entries:
        return described or Classes(name_classes(found(), ignore_label))
    if [*entries] == ["all"]:
        names = described.names if described else {}
        merged = described.merged if described else {}
        every = name_classes({*names, *found()} - {*merged}, ignore_label, gaps=True)
        return Classes({**every, **names}, merged)
    known = described.listed or {name: [value] for value, name in described.names.items()} if described else {}
    chosen: list[tuple[str, list[int]]] = [(name, values) for name, values in known.items() if name in entries]
    for entry in entries:
        name, _, values = entry.rpartition("=")
        if entry in known:
            continue
        if name and all(part.isdecimal() for part in values.split("+")):
            chosen.append((name, [int(part) for part in values.split("+")]))
        else:
            known_names = f", or a name of dataset.json: {_listed(known)}" if known else ""
            raise UserError(
                f"--classes {entry}: each class must be name=value, such as --classes liver=5 tumour=6+7{known_names}"
            )
    if not any(name == "background" or 0 in values for name, values in chosen):
        chosen.insert(0, ("background", [0]))
    table = _table(chosen, "--classes")
    rest = found() | ({*described.names, *described.merged} if described else set())
    left_out = {value: 0 for value in sorted(rest) if value not in {*table.names, *table.merged, IGNORE}}
    return Classes(table.names, table.merged | left_out)


def _table(entries: Sequence[tuple[str, Sequence[int]]], where: str, outputs: Sequence[Any] = ()) -> Classes:
    """The classes of these names and values. A value of several counts for the last, as nnU-Net's regions do.

    Args:
        outputs: the value of each class but the background in segmentations; empty: the first that is its own.
    """
    content = shortened(" ".join(f"{name}={'+'.join(map(str, values))}" for name, values in entries))
    every = [value for _, values in entries for value in values]
    overlapping = any(len(values) > 1 for _, values in entries)
    names = [name for name, _ in entries]
    if len({*names}) < len(names) or (not overlapping and len({*every}) < len(every)):
        raise UserError(f"{where} has a class or a value twice: {content}")
    owner = {value: position for position, (_, values) in enumerate(entries) for value in values}
    own = [[value for value in values if owner[value] == position] for position, (_, values) in enumerate(entries)]
    if gone := [name for (name, _), values in zip(entries, own, strict=True) if not values]:
        raise UserError(f"{where}: every value of {gone[0]!r} is also of a later class; list it after them: {content}")
    foreground = [position for position, values in enumerate(own) if 0 not in values]
    if len(foreground) != len(entries) - 1 or not foreground or min(every) < 0 or max(every) > HIGHEST:
        raise UserError(
            f"{where} must have the background as 0, and at least one class from 1 to {HIGHEST}, got {content}"
        )
    value_of = {position: 0 if 0 in values else values[0] for position, values in enumerate(own)}
    for position, value in zip(foreground, outputs, strict=False):
        if value in own[position]:
            value_of[position] = value
    table = {value_of[position]: name for position, name in enumerate(names)}
    merged = {value: value_of[position] for value, position in sorted(owner.items()) if value not in table}
    return Classes(dict(sorted(table.items())), merged, {name: [*values] for name, values in entries})


def check_ignored(classes: Classes, ignore_label: int) -> None:
    """Raises UserError if the value of a class is also that of voxels that are not annotated."""
    value = classes.merged.get(ignore_label, ignore_label)
    if ignore_label > 0 and value in classes.names and value:
        raise UserError(
            f"{ignore_label} is both the class {classes.names[value]!r} and the ignore label; correct --classes or "
            "dataset.json, or leave out --ignore-label"
        )


def find_values(labels: Iterable[Path], ignore_label: int) -> set[int]:
    """The values in these label maps, 0 included."""
    values = {0}
    for path in labels:
        values |= set(np.unique(read_label(path, ignore_label=ignore_label).array).tolist())
    return values - {IGNORE}


def name_classes(values: Collection[int], ignore_label: int, *, gaps: bool = False) -> dict[int, str]:
    """Names for the values in label maps, if these are 0, 1, 2 and so on. -1 does not count.

    Args:
        gaps: the values may be any.

    Raises:
        UserError: there is no foreground, a gap in the values, or too many of them; the message gives the remedy.
    """
    found = sorted({*values} - {IGNORE})
    foreground = [value for value in found if value > 0]
    if not foreground:
        why = "" if ignore_label == IGNORE else f", as {ignore_label} is the ignore label"
        raise UserError(
            f"no label map has a foreground voxel{why}. If a value is a structure, name it, such as --classes "
            f"{suggest_classes([max(ignore_label, 1)])}."
        )
    if len(found) > MAX_CLASSES:
        raise UserError(f"the label maps hold {len(found)} values: {too_many_classes(len(found))}. Is one an image?")
    if found != [*range(len(found))] and not gaps:
        shown = ", ".join(map(str, found[:12])) + (", …" if len(found) > 12 else "")
        raise UserError(
            f"the label maps hold the values {shown}, not 0, 1, 2 and so on. If each is a class, give --classes all; "
            f"else name the classes in dataset.json or by --classes, such as --classes {suggest_classes(foreground)}."
        )
    return {value: f"class {value}" if value else "background" for value in found}


def _listed(names: Iterable[str]) -> str:
    every = [*names]
    return ", ".join(every[:12]) + (", …" if len(every) > 12 else "")
