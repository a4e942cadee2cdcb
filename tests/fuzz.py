"""Mutated files against the readers: python tests/fuzz.py --help."""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import logging
import sys
import tempfile
import time
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from tqdm import tqdm

from sslfast import UserError
from sslfast.cli import run_command, write_config
from sslfast.data.folder import open_dataset
from sslfast.data.nifti import read_image, read_label
from sslfast.methods import find_method
from sslfast.model import Model
from sslfast.networks import build_networks
from sslfast.options import NetworkOptions, Preprocessing
from sslfast.train import config_class
from sslfast.training.checkpoint import load_model, save_checkpoint
from sslfast.training.config import TrainConfig

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
    seeds: Mapping[str, bytes],
    reads: Sequence[Read],
    count: int,
    seed: int,
    head: int,
    prepare: Read | None = None,
    slack: float = 1e6,
) -> tuple[Counter[str], list[str]]:
    """Reads `count` mutated files of the valid `seeds`, by their names.

    Args:
        head: bytes at the start of a file that are changed more often.
        prepare: is called with the folder of the files before they are written.
        slack: bytes that are allowed on top of `MEMORY`.

    Returns:
        How often a file was read and refused; and what went wrong: an exception that is no UserError, a message that
        does not name the file, more time or memory than allowed.
    """
    outcomes: Counter[str] = Counter()
    faults: list[str] = []
    random = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / name for name in seeds}
        if prepare:
            prepare(Path(folder))
        largest = 0
        for name, path in paths.items():
            path.write_bytes(seeds[name])
            for read in reads:
                read(path)  # imports what it needs
                _, memory, error = measure(read, path)
                assert error is None, f"the valid {name} is refused: {error}"
                largest = max(largest, memory)
        for i in tqdm(range(count), desc="mutated files", unit="file", leave=False):
            name = [*seeds][i % len(seeds)]
            path, content = paths[name], seeds[name]
            if name.endswith(".gz") and random.random() < 0.7:  # mutated within a valid compression
                path.write_bytes(gzip.compress(mutate(gzip.decompress(content), random, head), 1))
            else:
                path.write_bytes(mutate(content, random, head))
            for read in reads:
                seconds, memory, error = measure(read, path)
                refused = isinstance(error, UserError)
                outcomes["read" if error is None else "refused" if refused else "fault"] += 1
                wrong = [f"{type(error).__name__}: {error}"] if error and not refused else []
                wrong += [f"the message does not name the file: {error}"] if refused and name not in str(error) else []
                wrong += [f"{seconds:.0f} s"] if seconds > SECONDS else []
                wrong += [f"{memory / largest:.1f} x the memory"] if memory > MEMORY * largest + slack else []
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

    def read_as_label(path: Path) -> None:
        try:
            read_label(path)
        except UserError as error:
            if "must hold whole numbers" not in str(error):  # most of the files are images
                raise

    return fuzz(niftis(), [read_image, read_as_label], count, seed, head=352)


def fuzz_checkpoints(count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """`fuzz` of checkpoints; whatever is changed is refused."""
    options = NetworkOptions(width=2, depth=2)
    networks = build_networks(options, 2)
    model = Model(options, Preprocessing(), {0: "background", 1: "x"}, (8, 8, 8), *networks)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        save_checkpoint(path, {"model": model.state()})
        content = path.read_bytes()

    def read(path: Path) -> None:
        load_model(path)
        if path.read_bytes() != content:
            raise AssertionError("a changed checkpoint is read")

    return fuzz({"checkpoint.pt": content}, [read], count, seed, head=len(content))


def fuzz_texts(count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """`fuzz` of the config file of a run and of a dataset's description, half of the files each."""
    with tempfile.TemporaryDirectory() as folder:
        options = find_method(TrainConfig.method).Options()
        write_config(TrainConfig("data", Path("run"), options=options), Path(folder) / "config.yaml")
        config = (Path(folder) / "config.yaml").read_bytes()
    pair = {"image": "imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz"}
    named = {
        "labels": {"0": "background", "1": "heart", "5": "liver"},
        "training": [pair],
        "test": ["imagesTr/b.nii.gz"],
    }

    def make_files(folder: Path) -> None:
        for name in ("imagesTr/a.nii.gz", "imagesTr/b.nii.gz", "labelsTr/a.nii.gz"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).touch()

    def open_folder(path: Path) -> None:
        open_dataset(path.parent)

    first = fuzz({"config.yaml": config}, [_parse], count // 2, seed, len(config), slack=5e7)  # help
    description = json.dumps(named).encode()
    second = fuzz({"dataset.json": description}, [open_folder], count - count // 2, seed, len(description), make_files)
    return first[0] + second[0], first[1] + second[1]


def _parse(path: Path) -> None:
    """Parses a config file and checks its settings, without a run."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            status = run_command(TrainConfig, TrainConfig.check, ["--config", str(path)], refine=config_class)
        except SystemExit as ending:  # of flags that cannot be parsed, which are printed
            status = int(ending.code or 0)
    if status == 2:
        raise UserError(f"{path}: {said.getvalue()}")
    assert status == 0, said.getvalue()


KINDS = {"niftis": (fuzz_niftis, 10_000), "checkpoints": (fuzz_checkpoints, 1000), "texts": (fuzz_texts, 1000)}


def main() -> int:
    """The exit status: 1 if anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for kind, (_, count) in KINDS.items():
        parser.add_argument(f"--{kind}", type=int, default=count, help=f"how many mutated {kind} to read")
    parser.add_argument("--seed", type=int, default=1, help="seed of the changes")
    chosen = vars(parser.parse_args())
    quieten()
    failed = False
    for kind, (run, _) in KINDS.items():
        outcomes, faults = run(chosen[kind], chosen["seed"])
        print(f"{kind}: {outcomes['read']} read, {outcomes['refused']} refused, {len(faults)} faults")
        print("".join(f"  {fault}\n" for fault in faults[:50]), end="")
        failed |= bool(faults)
    return int(failed)


def quieten() -> None:
    """Silences what nibabel says of odd headers."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")


if __name__ == "__main__":
    sys.exit(main())
