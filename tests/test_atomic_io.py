"""Files are written whole or not at all; an error says what helps."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from sslfast import UserError
from sslfast.atomic_io import make_folder, whole_file


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "No space left on device. Free some space"),
        (errno.EDQUOT, "Free some space"),
        (errno.EROFS, "Read-only file system. Choose a folder that you may write to"),
        (errno.EACCES, "Permission denied. Choose a folder that you may write to"),
    ],
)
def test_the_remedy_fits_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str) -> None:
    (tmp_path / "a").write_text("before")

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match=rf"cannot write .*/a: .*{remedy}"), whole_file(tmp_path / "a") as part:
        part.write_text("after")
    assert (tmp_path / "a").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_was_written_is_on_the_disk_before_it_takes_the_place_of_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[bytes] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.pread(file, 100, 0)))
    replace = os.replace

    def move(part: Path, path: Path) -> None:
        assert synced == [b"after"]
        replace(part, path)

    monkeypatch.setattr(os, "replace", move)
    with whole_file(tmp_path / "a") as part:
        part.write_bytes(b"after")
    assert (tmp_path / "a").read_bytes() == b"after"


def test_a_folder_that_may_not_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(UserError, match=rf"cannot write to the folder {tmp_path}: permission denied. Choose another"):
        make_folder(tmp_path)
