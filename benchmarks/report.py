"""How every benchmark writes its results: a CSV and a Markdown table, with machine, versions and date."""

from __future__ import annotations

import csv
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import astuple, fields
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sslfast.atomic_io import whole_file

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

RESULTS = Path(__file__).parent / "results"
SOURCES = ("csrc", "kernels", "sslfast", "benchmarks/*.py")


def write(name: str, rows: Sequence[DataclassInstance], note: str) -> str:
    """Writes the rows as NAME.csv and, with the note below, as NAME.md; returns the latter's text.

    Args:
        name: file name in benchmarks/results/, or a path without its suffix.
        rows: at least one; the names of their fields head the columns.
    """
    heads, cells = [field.name for field in fields(rows[0])], [astuple(row) for row in rows]
    with whole_file(RESULTS / f"{name}.csv") as part, open(part, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([heads, *cells])
    words = [re.sub(r"\b(mb|iqr)\b", lambda m: m[0].upper(), head.replace("_", " ")) for head in heads]
    lines = markdown(words, [map(shown, row) for row in cells])
    return write_page(name, [*lines, "", f"{provenance()}. {note}"])


def write_page(name: str, lines: Iterable[str]) -> str:
    """Writes the lines as NAME.md and returns its text."""
    text = "\n".join(lines) + "\n"
    with whole_file(RESULTS / f"{name}.md") as part:
        part.write_text(text)
    return text


def markdown(heads: Sequence[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def shown(value: Any) -> str:
    """A value as a reader wants it: four digits, no line break, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return " ".join(str(value).replace("|", "\\|").split())


def provenance() -> str:
    """What a result was made of and with, in one line."""
    import torch

    of = versions()
    machine = f"{processor()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    return f"{of['date']}, commit {of['commit']}, {machine}, torch {of['torch']}, Python {of['python']}"


def versions() -> dict[str, str]:
    """The date, the commit and what runs it."""
    import torch

    commit = output_of("git", "rev-parse", "--short=12", "HEAD") or "unknown"
    if output_of("git", "status", "--porcelain", "--", *SOURCES):
        commit += " with changes"
    python = platform.python_version()
    return {"date": str(date.today()), "commit": commit, "python": python, "torch": torch.__version__}


def processor() -> str:
    """The name of this machine's processor."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].split(":")[1].strip() if names else platform.machine()


def output_of(*command: str) -> str | None:
    """What a command prints, or None where it cannot run."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
