"""Fresh random inputs for every run; the seed is printed with a failure and can be set by SSLFAST_TEST_SEED."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

SEED = int(os.environ.get("SSLFAST_TEST_SEED") or random.SystemRandom().randrange(2**31))


def pytest_report_header() -> str:
    return f"SSLFAST_TEST_SEED={SEED}"


@pytest.fixture(autouse=True)
def fresh_seed(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(SEED + hash(request.node.name) % 1000)


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tests decode into a cache folder of their own."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("SSLFAST_CACHE")
    os.environ["SSLFAST_CACHE"] = str(folder)
    yield folder
    os.environ.pop("SSLFAST_CACHE") if before is None else os.environ.update(SSLFAST_CACHE=before)
