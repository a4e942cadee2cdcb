"""Options, fixtures, and the names of parameters. What tests share otherwise is in helpers/.

    python -m pytest -n auto --dist loadfile                              everything; the kernels are the C++ ones
    python -m pytest --backend triton-interpreted tests/ops               what depends on the backend, with another one

Inputs are random, and the same in every run; `--seed $RANDOM` makes others.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.register_assert_rewrite("helpers")
from helpers import options  # noqa: E402
from helpers.options import TARGETS, Target  # noqa: E402

# Minutes each: first, so that other cores do the rest meanwhile
LONG = (
    "test_kernel_library.py",
    "test_docs_commands.py",
    "test_kernel_library_cuda.py",
    "test_registers.py",
    "test_losses_distributed.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sslfast")
    group.addoption(
        "--backend",
        default="cpu",
        choices=tuple(TARGETS),
        help="the kernels to test (default: cpu). With another one than cpu, only the tests that depend on it run",
    )
    group.addoption("--seed", type=int, default=0, help="seed of the random inputs (default: 0)")


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # pytest-xdist else begins with the file of the most tests
    options.choose(config.option.backend, config.option.seed)
    if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # they share the cores
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // workers))
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    prepare(options.TARGET, is_worker=hasattr(config, "workerinput"))


def prepare(target: Target, is_worker: bool) -> None:
    """Makes this process compute with the target's kernels; none is loaded yet."""
    os.environ["TRITON_INTERPRET"] = str(int(target.interpreted))
    if target.interpreted:
        from benchmarks.gpu.rehearsal import mend_interpreter

        mend_interpreter()
    if target.emulated:
        from benchmarks.gpu.rehearsal import emulated_library
        from sslfast.ops.backend import LINEAR_LOGITS

        LINEAR_LOGITS.clear()  # the kernels of a GPU read stored logits
        if not is_worker:  # which inherits it
            os.environ["SSLFAST_PREBUILT"] = str(emulated_library().parent)


def pytest_report_header() -> str:
    return f"--backend {options.TARGET.name} --seed {options.SEED}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what does not depend on the backend, unless it is the default."""
    items.sort(key=lambda item: item.path.name not in LONG)
    if options.TARGET.name != "cpu":
        depend = ["target" in getattr(item, "fixturenames", ()) for item in items]
        others = [item for item, depends in zip(items, depend, strict=True) if not depends]
        items[:] = [item for item, depends in zip(items, depend, strict=True) if depends]
        config.hook.pytest_deselected(items=others)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Says what varies: `classes=3`, `bfloat16`, `7x3x5`, `no teacher`."""
    if isinstance(val, torch.dtype):
        return str(val).removeprefix("torch.")
    if isinstance(val, bool):
        return argname if val else f"no {argname}"
    if isinstance(val, (int, float)) or val is None:
        return f"{argname}={val}"
    if isinstance(val, tuple) and val and all(isinstance(part, int) for part in val):
        return "x".join(map(str, val))
    if isinstance(val, (tuple, list)) and val and all(isinstance(part, (str, int, float)) for part in val):
        return " ".join(map(str, val))
    if isinstance(val, dict):
        return ", ".join(f"{key}={part}" for key, part in val.items()) or f"default {argname}"
    return None


@pytest.fixture
def target() -> Iterator[Target]:
    """The backend that `--backend` names computes every op, and tensors are made on its device; it must run here."""
    from sslfast.ops.backend import backend, unavailable

    reason = unavailable(options.TARGET.backend)
    assert reason is None, reason
    with backend(options.TARGET.backend), torch.device(options.TARGET.device):
        yield options.TARGET


@pytest.fixture(autouse=True)
def fresh_seed(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(options.SEED + zlib.crc32(request.node.name.encode()) % 1000)  # hash() differs between processes


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tests decode into a cache folder of their own, in which the compiled kernels are those of the cache."""
    from sslfast.atomic_io import cache_folder

    folder = tmp_path_factory.mktemp("cache")
    kernels = cache_folder() / "kernels"
    with contextlib.suppress(OSError):  # of a home that cannot be written to
        kernels.mkdir(parents=True, exist_ok=True)
        (folder / "kernels").symlink_to(kernels.resolve())
    before = os.environ.get("SSLFAST_CACHE")
    os.environ["SSLFAST_CACHE"] = str(folder)
    yield folder
    os.environ.pop("SSLFAST_CACHE") if before is None else os.environ.update(SSLFAST_CACHE=before)
