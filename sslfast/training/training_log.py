"""The curves of a run: log.csv, and the same values for TensorBoard."""

from __future__ import annotations

import csv
import shutil
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from sslfast.atomic_io import whole_file
from sslfast.errors import UserError


class TrainingLog:
    """Appends rows to `folder`/log.csv and points to `folder`/tensorboard.

    Args:
        folder: folder of the run.
        first_step: first step of this process. Rows that a killed run logged from this step on are dropped, and so are
            rows that cannot be read; a warning then says where the file is kept as it was.

    Raises:
        UserError: log.csv cannot be read or written.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        self.path = folder / "log.csv"
        self.rows: list[dict[str, Any]] = []
        if first_step:
            self.rows = [row for row in self._read() if int(row["step"]) < first_step]
        self.names = list(self.rows[0]) if self.rows else []
        self._rewrite()
        self.tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step or None)

    def _read(self) -> list[dict[str, Any]]:
        """The rows of log.csv that are whole; a copy is kept of a file with others."""
        if not self.path.exists():
            print(f"warning: {self.path} is missing; it begins anew.", file=sys.stderr)
            return []
        try:
            with open(self.path, newline="", encoding="utf-8", errors="replace") as file:
                text = [*file]
            lines = [*csv.reader(line.replace("\0", "") for line in text if line.endswith("\n"))]
        except (OSError, csv.Error) as error:
            raise UserError(
                f"{self.path} cannot be read: {error}. Remove it to go on without the rows so far."
            ) from error
        names = lines[0] if lines else []
        rows = [dict(zip(names, line, strict=True)) for line in lines[1:] if len(line) == len(names)]
        rows = [row for row in rows if _is_whole(row)]
        if not rows or len(rows) != len(text) - 1:
            copy = self.path.with_name("log-damaged.csv")
            with whole_file(copy) as part:
                shutil.copyfile(self.path, part)
            print(
                f"warning: {self.path} was damaged; the {len(rows)} rows that can be read are kept. {copy} is the file "
                "as it was.",
                file=sys.stderr,
            )
        return rows

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.tensorboard.close()

    def logged(self) -> list[tuple[int, dict[str, float]]]:
        """Step and values of each row."""
        return [
            (int(row["step"]), {name: float(v) for name, v in row.items() if name != "step" and v not in ("", None)})
            for row in self.rows
        ]

    def write(self, step: int, row: dict[str, float]) -> None:
        """Adds the values of one step.

        Raises:
            UserError: the file cannot be written, for example on a full disk.
        """
        self.rows.append({"step": step, **row})
        new = [name for name in self.rows[-1] if name not in self.names]
        self.names += new
        if new:
            self._rewrite()
        else:
            try:
                with open(self.path, "a", newline="") as file:
                    csv.DictWriter(file, self.names).writerow(self.rows[-1])
            except OSError as error:
                raise UserError(
                    f"cannot write {self.path}: {error.strerror}. Free some space, then continue with --resume."
                ) from error
        for name, value in row.items():
            self.tensorboard.add_scalar(name, value, step)

    def _rewrite(self) -> None:
        with whole_file(self.path) as part, open(part, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.names)
            writer.writeheader()
            writer.writerows(self.rows)


def _is_whole(row: dict[str, str]) -> bool:
    """True if there is a step, and every value is a number or empty."""
    try:
        [float(value) for value in row.values() if value]
        return int(row["step"]) >= 0
    except (KeyError, ValueError):
        return False
