"""What a run learns: JSON lines that outlive whatever interrupts it, and the Markdown page made of them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = "results.jsonl"
PAGE = "results.md"

Record = dict[str, Any]


def append(folder: Path, kind: str, **values: Any) -> None:
    """Adds a record to the folder's results; it is on the disk when this returns."""
    with (folder / RESULTS).open("ab+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        if file.read(1) not in (b"\n", b""):  # whoever wrote the last line was killed
            file.write(b"\n")
        file.write(json.dumps({"kind": kind, **values}).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path) -> list[Record]:
    """All records; a line that whoever wrote it did not finish is left out."""
    found = []
    path = folder / RESULTS
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def write_page(folder: Path) -> str:
    """Makes `results.md` of whatever records there are, and gives its text."""
    text = render(read(folder))
    (folder / PAGE).write_text(text)
    return text


def render(records: Sequence[Record]) -> str:
    """The page: the machine, the parts and how each ended, and what they measured."""
    of = {kind: [r for r in records if r["kind"] == kind] for kind in ("machine", "part", "check", "speed", "launch")}
    lines = []
    for machine in of["machine"][-1:]:
        lines += [f"{key}: {shown(value)}  " for key, value in machine.items() if key != "kind"] + [""]
    lines += table(("part", "ended", "s", "limit s", "said"), of["part"], ("name", "ended", "seconds", "limit", "said"))
    checks = ("backend", "case", "ok", "loss", "gradient", "said")
    lines += table(
        ("backend", "case", "equal to the reference", "loss off by", "gradient off by", "said"), of["check"], checks
    )
    heads = (
        "op",
        "input",
        "implementation",
        "wall ms",
        "device ms",
        "× the best of ours",
        "peak MB",
        "B/voxel at least",
    )
    speeds = ("op", "case", "implementation", "wall_ms", "device_ms", "times_slower", "peak_mb", "bytes_a_voxel")
    shares = (
        ("% of the copy's speed", "% of the matrix product's", "said"),
        ("percent_of_copy", "percent_of_peak", "said"),
    )
    lines += table(heads + shares[0], of["speed"], speeds + shares[1])
    launches = ("backend", "kernel", "count", "microseconds", "percent")
    lines += table(("backend", "kernel of a step", "launches", "µs together", "% of all"), of["launch"], launches)
    metrics = [r for r in records if r["kind"] == "metric"]
    names = sorted({name for r in metrics for name in r["values"]})
    rows = [{"kernel": r["kernel"], **r["values"]} for r in metrics]
    return "\n".join([*lines, *table(("kernel, by ncu", *names), rows, ("kernel", *names))]).rstrip() + "\n"


def table(heads: Sequence[str], rows: Sequence[Record], keys: Sequence[str]) -> list[str]:
    """A Markdown table with an empty line after it; nothing without rows. A column that no row fills is left out."""
    columns = [
        (head, key) for head, key in zip(heads, keys, strict=True) if any(row.get(key) is not None for row in rows)
    ]
    if not columns:
        return []
    cells = [[shown(row.get(key)) for _, key in columns] for row in rows]
    return [line([head for head, _ in columns]), line(["---"] * len(columns)), *map(line, cells), ""]


def line(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def shown(value: Any) -> str:
    """A value as a reader wants it: four digits, no line break, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return " ".join(str(value).replace("|", "\\|").split())
