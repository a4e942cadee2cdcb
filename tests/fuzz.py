"""Mutated files against the readers: python tests/fuzz.py --help."""

from __future__ import annotations

import argparse
import gzip
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
from tqdm import tqdm

from sslfast import UserError
from sslfast.data.nifti import read_image, read_label

SECONDS = 10.0  # that a file may take
MEMORY = 1.5  # times the peak memory of the largest valid file that a mutated one may take
LIMITS = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\0\0\x80\x7f", b"\0\0\xc0\x7f", b"\xff\xff\xff\x7f", b"\0\0\0\x80")
Read = Callable[[Path], object]


def mutate(content: bytes, random: np.random.Generator, head: int) -> bytes:
    """One to four changes: bytes of the head or of the whole set, bits flipped, parts cut out, doubled or cut off."""
    data = bytearray(content)
    for _ in range(random.integers(1, 5)):
        size = len(data)
        at = int(random.integers(max(1, min(size, head) if random.random() < 0.7 else size)))
        kind = random.integers(6)
        if kind == 0:
            data[at : at + 1] = bytes([int(random.integers(256))])
        elif kind == 1:
            data[at : at + 4] = LIMITS[random.integers(len(LIMITS))]
        elif kind == 2 and size:
            data[at % size] ^= 1 << int(random.integers(8))
        elif kind == 3:
            del data[at : at + int(random.integers(1, 40))]
        elif kind == 4:
            data[at:at] = data[at : at + int(random.integers(1, 40))]
        elif random.random() < 0.3:
            del data[at:]
    return bytes(data)


def fuzz(
    seeds: dict[str, bytes], reads: list[Read], count: int, seed: int, head: int
) -> tuple[Counter[str], list[str]]:
    """Reads `count` mutated files of the valid `seeds`, by name.

    Returns:
        How often a file was read and refused; what went wrong: an exception that is no UserError, a message that does
        not name the file, more time or memory than allowed.
    """
    outcomes: Counter[str] = Counter()
    faults: list[str] = []
    random = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        largest = 0
        for name, content in seeds.items():
            (Path(folder) / name).write_bytes(content)
            for read in reads:
                largest = max(largest, measure(read, Path(folder) / name)[1])
        for i in tqdm(range(count), desc="mutated files", unit="file", leave=False):
            name = [*seeds][i % len(seeds)]
            path = Path(folder) / name
            content = seeds[name]
            if name.endswith(".gz") and random.random() < 0.7:  # mutated within a valid compression
                path.write_bytes(gzip.compress(mutate(gzip.decompress(content), random, head), 1))
            else:
                path.write_bytes(mutate(content, random, head))
            for read in reads:
                seconds, memory, error = measure(read, path)
                outcomes["read" if error is None else "refused" if isinstance(error, UserError) else "fault"] += 1
                wrong = [f"{type(error).__name__}: {error}"] if error and not isinstance(error, UserError) else []
                wrong += (
                    [f"the message does not name the file: {error}"] if error and path.name not in str(error) else []
                )
                wrong += [f"{seconds:.0f} s"] if seconds > SECONDS else []
                wrong += [f"{memory / largest:.1f} x the memory"] if memory > MEMORY * largest + 1e6 else []
                faults += [f"seed {seed}, file {i}, {name}: {one}" for one in wrong]
    return outcomes, faults


def measure(read: Read, path: Path) -> tuple[float, int, Exception | None]:
    """Seconds and peak bytes of reading a file, and its exception."""
    tracemalloc.start()
    started = time.perf_counter()
    error = None
    try:
        read(path)
    except Exception as caught:
        error = caught
    seconds, memory = time.perf_counter() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return seconds, memory, error


def niftis() -> dict[str, bytes]:
    """Valid volumes: an image and a label, as they are, compressed, scaled, big-endian, with an extension."""
    random = np.random.default_rng(0)
    affine = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.1, 0.2, 0.3) @ np.diag([1, 2, 3]), [4, 5, 6])
    image = nib.Nifti1Image(random.normal(size=(24, 20, 16)).astype(np.float32), affine)
    label = nib.Nifti1Image(random.integers(0, 3, (24, 20, 16)).astype(np.uint8), affine)
    scaled = nib.Nifti1Image(random.normal(size=(24, 20, 16)), affine)
    scaled.set_data_dtype(np.int16)
    scaled.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"a comment"))
    swapped = nib.Nifti1Image(np.asarray(image.dataobj), affine, nib.Nifti1Header(endianness=">"))
    files = {"image": image, "label": label, "scaled": scaled, "swapped": swapped}
    files["two"] = nib.Nifti2Image(np.asarray(image.dataobj), affine)
    raw = {name: file.to_bytes() for name, file in files.items()}
    return {f"{name}.nii": one for name, one in raw.items()} | {
        f"{name}_gz.nii.gz": gzip.compress(one, mtime=0) for name, one in raw.items()
    }


def fuzz_niftis(count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """`fuzz` of the NIfTI readers."""
    return fuzz(niftis(), [read_image, read_label], count, seed, head=352)


def main() -> int:
    """The exit status: 1 if anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--niftis", type=int, default=10_000, help="mutated NIfTI files")
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    outcomes, faults = fuzz_niftis(chosen.niftis, chosen.seed)
    print(f"NIfTI: {dict(outcomes)}")
    print("\n".join(faults[:50]) or "no fault")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
