"""The ops and the whole step under pytest-benchmark: python -m pytest benchmarks --benchmark-only"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.cases import Case, Inputs, op_implementations, step_implementations
from benchmarks.loss import time_once

CASE = Case("la", 2, 16, "fp32")
OPS = (
    "dual_supervised",
    "reliability",
    "pseudo_supervised",
    "rectified_consistency",
    "masked_consistency",
    "class_prototypes",
    "sample_voxels",
    "voxel_infonce",
)


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return Inputs(CASE, "contiguous")


@pytest.mark.parametrize("implementation", ["eager", "sslfast"])
@pytest.mark.parametrize("op", OPS)
def test_op(benchmark: Any, inputs: Inputs, op: str, implementation: str) -> None:
    benchmark.group = op
    benchmark(time_once, op_implementations(inputs, CASE)[op][implementation], inputs.leaves)


@pytest.mark.parametrize("implementation", ["eager, host percentile", "eager, kthvalue", "sslfast"])
def test_step(benchmark: Any, inputs: Inputs, implementation: str) -> None:
    benchmark.group = f"dual_contrastive, {torch.get_num_threads()} threads"
    call = step_implementations(inputs, CASE)[implementation]
    benchmark.pedantic(time_once, (call, inputs.leaves), rounds=3, warmup_rounds=1)
