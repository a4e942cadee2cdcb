"""The backend to test and the seed, which `conftest.pytest_configure` sets before a test is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

ROOT = Path(__file__).parents[2]
Value = TypeVar("Value")


@dataclass(frozen=True)
class Target:
    """A choice of `--backend`."""

    name: str
    backend: str  # as `sslfast.backend` calls it
    device: str
    interpreted: bool = False  # Triton's kernels in Python: slow; and cuts a bfloat16 off where the hardware rounds it
    emulated: bool = False  # the CUDA kernels' code, compiled for the CPU in the place of the C++ kernels


TARGETS = {
    target.name: target
    for target in (
        Target("reference", "reference", "cpu"),
        Target("cpu", "cpu", "cpu"),
        Target("cuda-emulated", "cpu", "cpu", emulated=True),
        Target("triton-interpreted", "triton", "cpu", interpreted=True),
        Target("cuda", "cuda", "cuda"),
        Target("triton", "triton", "cuda"),
    )
}

TARGET: Target  # there is none yet, so that importing it too early fails
SEED: int


def choose(backend: str, seed: int) -> None:
    """Sets `TARGET` and `SEED`."""
    global TARGET, SEED
    TARGET, SEED = TARGETS[backend], seed


def some(values: list[Value], few: int) -> list[Value]:
    """All of them, or the first few where each costs seconds."""
    return values[:few] if TARGET.interpreted else values


def only_on(*targets: str) -> pytest.MarkDecorator:
    """Marks a test for these choices of `--backend` alone."""
    return pytest.mark.skipif(TARGET.name not in targets, reason=f"about the backend {' or '.join(targets)}")


def not_on(*targets: str) -> pytest.MarkDecorator:
    """Marks a test for all choices of `--backend` but these."""
    return pytest.mark.skipif(TARGET.name in targets, reason=f"not about the backend {' or '.join(targets)}")


def kernels_and_reference() -> pytest.MarkDecorator:
    """Gives the parameter `name` the backend that is tested, and the reference."""
    return pytest.mark.parametrize("name", list(dict.fromkeys([TARGET.backend, "reference"])))


on_every_backend = pytest.mark.usefixtures("target")
"""Marks a test that depends on the backend: it runs with every choice of `--backend`, others with the default only."""
