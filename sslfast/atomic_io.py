"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sslfast.errors import UserError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, and moves that file to `path` when the block ends.

    If the block is interrupted, by a full disk or a killed process, `path` holds its old content or the new one, never
    a part.

    Raises:
        UserError: the folder cannot be written or the disk is full; the message names the file.
    """
    path = Path(path)
    part = path.with_name(f".part-{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "Free some space or choose another folder" if full else "Choose a folder that you may write to"
        raise UserError(f"cannot write {path}: {error.strerror or error}. {remedy}.") from error
    finally:
        part.unlink(missing_ok=True)


def make_folder(path: Path) -> Path:
    """Creates `path` and its parents, and returns `path`.

    Raises:
        UserError: the folder cannot be created or written; the message names it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror or error}. Choose another.") from error
    if not os.access(path, os.W_OK):
        raise UserError(f"cannot write to the folder {path}: permission denied. Choose another.")
    return path


def cache_folder() -> Path:
    """The folder for downloads and decoded volumes: $SSLFAST_CACHE, else ~/.cache/sslfast."""
    return Path(os.environ.get("SSLFAST_CACHE") or Path.home() / ".cache" / "sslfast").expanduser()
