"""The results of a run: JSON lines, each on disk as soon as it is known, and the Markdown page made of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import markdown, shown

RESULTS = "results.jsonl"
PAGE = "results.md"

Record = dict[str, Any]

# The columns of the page by the names of the records' values
PART = {"name": "part", "result": "result", "seconds": "s", "limit": "limit s", "summary": "summary"}
CHECK = {
    "backend": "backend",
    "case": "case",
    "ok": "equal to the reference",
    "loss": "loss off by",
    "gradient": "gradient off by",
    "error": "error",
}
SPEED = {
    "op": "op",
    "case": "input",
    "implementation": "implementation",
    "wall_ms": "wall ms",
    "device_ms": "device ms",
    "times_slower": "× the best of ours",
    "peak_mb": "peak MB",
    "bytes_a_voxel": "B/voxel at least",
    "percent_of_copy": "% of the copy's speed",
    "percent_of_peak": "% of the matrix product's",
    "error": "error",
}
LAUNCH = {
    "backend": "backend",
    "kernel": "kernel of a step",
    "count": "launches",
    "microseconds": "µs together",
    "percent": "% of all",
}


def digest_of_tree() -> str:
    """Digest of the sources, which identifies them where a copy of a checkout has no commit."""
    root = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for folder in ("sslfast", "csrc", "kernels", "benchmarks", "tests"):
        for file in sorted((root / folder).rglob("*")):
            if file.suffix in (".py", ".h", ".cuh", ".cpp", ".cu"):
                digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def append(folder: Path, kind: str, **values: Any) -> None:
    """Adds a record to the folder's results; it is on the disk when this returns."""
    with (folder / RESULTS).open("ab+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        if file.read(1) not in (b"\n", b""):  # the writer of the last line was killed
            file.write(b"\n")
        file.write(json.dumps({"kind": kind, **values}).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path) -> list[Record]:
    """All records; an unfinished line is left out."""
    records = []
    path = folder / RESULTS
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def write_page(folder: Path) -> str:
    """Makes `results.md` of whatever records there are, and gives its text."""
    text = render(read(folder))
    (folder / PAGE).write_text(text)
    return text


def render(records: Sequence[Record]) -> str:
    """The page: the machine, the result of each part, and what they measured."""
    of = {kind: [r for r in records if r["kind"] == kind] for kind in ("machine", "part", "check", "speed", "launch")}
    lines = []
    for machine in of["machine"][-1:]:
        lines += [f"{key}: {shown(value)}  " for key, value in machine.items() if key != "kind"] + [""]
    lines += table(PART, of["part"])
    lines += table(CHECK, of["check"]) + table(SPEED, of["speed"]) + table(LAUNCH, of["launch"])
    counters = [{"kernel": r["kernel"], **r["values"]} for r in records if r["kind"] == "metric"]
    names = sorted({name for row in counters for name in row if name != "kernel"})
    lines += table({"kernel": "kernel, by ncu", **{name: name for name in names}}, counters)
    return "\n".join(lines).rstrip() + "\n"


def table(columns: Mapping[str, str], rows: Sequence[Record]) -> list[str]:
    """A Markdown table with an empty line after it; nothing without rows. A column that no row fills is left out.

    Args:
        columns: their heads by the keys of the rows.
    """
    filled = {key: head for key, head in columns.items() if any(row.get(key) is not None for row in rows)}
    if not filled:
        return []
    return [*markdown([*filled.values()], [[shown(row.get(key)) for key in filled] for row in rows]), ""]
