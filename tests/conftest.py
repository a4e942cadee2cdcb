"""Fresh random inputs for every run; the seed is printed with a failure and can be set by SSLFAST_TEST_SEED."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from sslfast.atomic_io import cache_folder
from sslfast.methods import find_method
from sslfast.methods.method import Method
from sslfast.ops.backend import LINEAR_LOGITS

SEED = int(os.environ.get("SSLFAST_TEST_SEED") or random.SystemRandom().randrange(2**31))
os.environ["SSLFAST_TEST_SEED"] = str(SEED)  # of every process of this run

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # they share the cores
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // workers))
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))

if os.environ.get("SSLFAST_TEST_EMULATED") == "1":  # the CUDA kernels' code, in the place of the C++ kernels
    LINEAR_LOGITS.clear()

LONG = ("test_cuda.py", "test_triton.py")  # minutes each: first, so that other cores do the rest meanwhile


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # pytest-xdist else begins with the file of the most tests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)


def pytest_report_header() -> str:
    return f"SSLFAST_TEST_SEED={SEED}"


@pytest.fixture(autouse=True)
def fresh_seed(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(SEED + zlib.crc32(request.node.name.encode()) % 1000)  # hash() differs between processes


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tests decode into a cache folder of their own, in which the compiled kernels are those of the cache."""
    folder = tmp_path_factory.mktemp("cache")
    kernels = cache_folder() / "kernels"
    with contextlib.suppress(OSError):  # of a home that cannot be written to
        kernels.mkdir(parents=True, exist_ok=True)
        (folder / "kernels").symlink_to(kernels.resolve())
    before = os.environ.get("SSLFAST_CACHE")
    os.environ["SSLFAST_CACHE"] = str(folder)
    yield folder
    os.environ.pop("SSLFAST_CACHE") if before is None else os.environ.update(SSLFAST_CACHE=before)


def write_volume(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    """Writes a NIfTI file and gives its path."""
    import nibabel as nib  # here, so that the tests of the kernels run without it

    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([2.0, 2.0, 2.0, 1.0]) if affine is None else affine), path)
    return path


def write_cases(
    folder: Path, cases: int, labelled: int, size: tuple[int, int, int] = (20, 18, 16), classes: int = 2
) -> Path:
    """A dataset in plain folders: bright boxes in noise, one a class; the first `labelled` cases have a label file."""
    random = np.random.default_rng(SEED)
    for i in range(cases):
        image = random.normal(size=size).astype(np.float32)
        label = np.zeros(size, np.uint8)
        for c in range(1, classes):
            corner = random.integers(2, 6, 3)
            box = tuple(slice(int(k) + 4 * (c - 1), int(k) + 4 * (c - 1) + 6) for k in corner)
            image[box] += 3 * c
            label[box] = c
        write_volume(folder / "images" / f"case_{i}.nii.gz", image)
        if i < labelled:
            write_volume(folder / "labels" / f"case_{i}.nii.gz", label)
    return folder


def make_method(name: str, num_classes: int, steps: int, seed: int, **wanted: object) -> Method:
    """The method of this name, with those of the wanted options that it has."""
    method = find_method(name)
    own = {field.name for field in dataclasses.fields(method.Options)}
    return method(num_classes, steps, seed, method.Options(**{k: v for k, v in wanted.items() if k in own}))
