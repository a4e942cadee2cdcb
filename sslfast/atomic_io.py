"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import platform
import re
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sslfast.errors import UserError

MACHINE = f"{zlib.crc32(platform.node().encode()):08x}"  # in the names of temporary files
DAY = 24 * 3600  # seconds


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, and moves that file to `path` when the block ends.

    If the block is interrupted, by a full disk or a killed process, `path` holds its old content or the new one, never
    a part.

    Raises:
        UserError: the folder cannot be written or the disk is full; the message names the file.
    """
    path = Path(path)
    part = path.with_name(f".part-{os.getpid()}-{MACHINE}-{path.name}")
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


def remove_parts(folder: Path, *, nested: bool = False, shared: bool = False) -> None:
    """Removes the temporary files that killed processes left in `folder`.

    Args:
        nested: in the folders of `folder`, too.
        shared: other processes may be writing there, perhaps on other machines. Their files stay, and those of another
            machine are removed only if they have not changed for a day.
    """
    for part in folder.rglob(".part-*") if nested else folder.glob(".part-*"):
        with suppress(OSError):
            if not shared or _is_left_over(part):
                part.unlink()


def _is_left_over(part: Path) -> bool:
    match = re.match(r"\.part-(\d+)-(?:([0-9a-f]{8})-)?", part.name)
    if match and match[2] in (MACHINE, None):
        try:
            os.kill(int(match[1]), 0)  # signal 0 only asks if there is such a process
        except (ProcessLookupError, OverflowError):
            return True
        return False
    return time.time() - part.stat().st_mtime > DAY


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
